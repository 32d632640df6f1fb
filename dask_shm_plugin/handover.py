"""How a scattered value reaches its workers: those who can map it get its handle, all others bytes."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from dask_shm_plugin.codec import Published
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.handles import NotRebuilt

logger = logging.getLogger("dask_shm_plugin")

Data = dict[Any, Any]

_PATIENCE = 10.0
"""Seconds for what takes milliseconds where nothing has died."""


class Targets(NamedTuple):
    """The running workers that a scatter may use: those who can map, and those who need bytes."""

    members: list[str]
    others: list[str]


class HandOver(NamedTuple):
    """One scatter: its values as Dask would send them, and those that are published."""

    data: Data
    published: dict[Any, Published]
    targets: Targets
    options: dict[str, Any]

    @property
    def handles(self) -> Data:
        """The values, with handles in the place of what is published."""
        return _with_handles(self.data, self.published)


class Courier:
    """Hands over the scatters of one client.

    Parameters
    ----------
    client
        A running client.
    scatter
        Dask's own way, through the scheduler.
    """

    def __init__(self, client: Any, scatter: Callable[..., Any]) -> None:
        self._scheduler, self._scatter = client.scheduler, scatter
        self._turns = itertools.count()

    @step("hand over")
    async def deliver(self, what: HandOver, broadcast: bool | int) -> list[Any]:
        """Bring the values to one worker each, to all, or to some number of them; return the keys."""
        if broadcast:
            await self._broadcast(what, broadcast)
        else:
            await self._distribute(what)
        return list(what.data)

    async def _broadcast(self, what: HandOver, broadcast: bool | int) -> None:
        (members, others), keys = what.targets, list(what.data)
        everyone = broadcast is True
        n = len(members) if everyone else min(int(broadcast), len(members))
        await self._scatter(data=what.handles, workers=members, broadcast=False, **what.options)
        if n > 1:
            await self._let_members_have(keys, n, members)
        if others and (everyone or broadcast > len(members)):
            n_all = None if everyone else broadcast
            await self._scheduler.replicate(keys=keys, n=n_all, workers=members + others, branching_factor=2)

    async def _let_members_have(self, keys: list[Any], n: int, members: list[str]) -> None:
        """Let so many members map the values now; the others do when they need them.

        Dask's tree spares wires. Here each of its rounds would take time and move nothing, so there is only one.
        """
        having = asyncio.ensure_future(
            self._scheduler.replicate(keys=keys, n=n, workers=members, branching_factor=len(members))
        )
        having.add_done_callback(consume)
        # A worker that dies meanwhile costs `Scheduler.replicate` 30 s (distributed 2026.8.0: it tries to connect again), and
        # all other calls of it wait for that. The values are where they can be mapped from: a scatter need not wait.
        done, _ = await asyncio.wait([having], timeout=_PATIENCE)
        for one in done:
            one.result()

    async def _distribute(self, what: HandOver) -> None:
        """Like Dask, take one worker after the other."""
        (members, others), handles = what.targets, what.handles
        everyone = members + others
        turn = {key: everyone[next(self._turns) % len(everyone)] for key in what.data}
        to_members = {key: handles[key] for key in what.data if turn[key] in members}
        to_others = {key: what.data[key] for key in what.data if turn[key] in others}
        if to_members:
            await self._scatter(data=to_members, workers=members, broadcast=False, **what.options)
        if to_others:
            await self._scatter(data=to_others, workers=others, broadcast=False, **what.options)


class DirectRpc:
    """The client's rpc, for one scatter: members get handles, and bytes if these are of no use to them."""

    def __init__(self, rpc: Any, members: set[str], published: dict[Any, Published]) -> None:
        self._rpc, self._members, self._published = rpc, members, published

    def __call__(self, address: str) -> Any:
        """Return what calls one worker."""
        call = self._rpc(address)
        return _DirectCall(call, self._published) if address in self._members else call


class _DirectCall:
    def __init__(self, call: Any, published: dict[Any, Published]) -> None:
        self._call, self._published = call, published

    async def update_data(self, data: Data) -> Any:
        try:
            return await self._call.update_data(data=_with_handles(data, self._published))
        except NotRebuilt as error:
            raise error.args[0] from None
        except Exception:
            logger.debug("a direct scatter is repeated with bytes", exc_info=True)
        return await self._call.update_data(data=data)

    async def close_rpc(self) -> None:
        await self._call.close_rpc()


def consume(task: asyncio.Future[Any]) -> None:
    """Take note of how something ended that nobody may be waiting for any more."""
    if not task.cancelled():
        task.exception()


def _with_handles(data: Data, published: dict[Any, Published]) -> Data:
    return {key: published[key].message if key in published else value for key, value in data.items()}
