"""How a scattered value reaches its workers: those who can map it get its handle, all others bytes."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from dask_shm_plugin.codec import Published
from dask_shm_plugin.crashpoints import step

logger = logging.getLogger("dask_shm_plugin")

Data = dict[Any, Any]


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

    Notes
    -----
    What goes to all members goes to each of them at once, and the scheduler is told afterwards, as Dask does it with
    ``direct=True``. Through the scheduler it would go to one of them and from there, in steps, from worker to worker.
    """

    def __init__(self, client: Any, scatter: Callable[..., Any]) -> None:
        self._client, self._scheduler, self._scatter = client, client.scheduler, scatter
        self._turns = itertools.count()
        self._reaches_workers = True

    @step("hand over")
    async def deliver(self, what: HandOver, broadcast: bool | int) -> list[Any]:
        """Bring the values to one worker each, to all, or to some number of them; return the keys."""
        if broadcast:
            await self._broadcast(what, broadcast)
        else:
            await self._distribute(what)
        return list(what.data)

    async def _broadcast(self, what: HandOver, broadcast: bool | int) -> None:
        members, others = what.targets
        n = len(members) + len(others) if broadcast is True else broadcast
        if n < len(members):
            await self._scatter(data=what.handles, workers=members, broadcast=n, **what.options)
            return
        await self._give_to_each(what)
        if others and n > len(members):
            await self._replicate(what.data, members + others, None if broadcast is True else n)

    async def _give_to_each(self, what: HandOver) -> None:
        members = what.targets.members
        handles = {key: published.message for key, published in what.published.items()}
        rest = {key: value for key, value in what.data.items() if key not in handles}
        if rest:
            await self._scatter(data=rest, workers=members, broadcast=True, **what.options)
        answers = await asyncio.gather(*(self._give(address, handles) for address in members))
        given = {address: answer for address, answer in zip(members, answers, strict=True) if answer is not None}
        if not given:
            await self._scatter(data=handles, workers=members, broadcast=True, **what.options)
            return
        nbytes = next(iter(given.values()))["nbytes"]
        who_has = {key: list(given) for key in handles}
        await self._scheduler.update_data(who_has=who_has, nbytes=nbytes, client=self._client.id)
        if len(given) < len(members):
            await self._replicate(handles, members, None)

    async def _give(self, address: str, handles: Data) -> Any:
        if not self._reaches_workers:
            return None
        call = self._client.rpc(address)
        try:
            return await call.update_data(data=handles)
        except Exception as error:
            # Who cannot be reached now, behind a firewall perhaps, is not tried again and again.
            self._reaches_workers = not isinstance(error, OSError)
            logger.debug("%s was not given its handles directly", address, exc_info=True)
            return None
        finally:
            await call.close_rpc()

    async def _replicate(self, data: Data, workers: list[str], n: int | None) -> None:
        await self._scheduler.replicate(keys=list(data), n=n, workers=workers, branching_factor=2)

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
        except Exception:
            logger.debug("a direct scatter is repeated with bytes", exc_info=True)
        return await self._call.update_data(data=data)

    async def close_rpc(self) -> None:
        await self._call.close_rpc()


def _with_handles(data: Data, published: dict[Any, Published]) -> Data:
    return {key: published[key].message if key in published else value for key, value in data.items()}
