"""What nanny, worker and client have in common: becoming a member, and saying once why not."""

from __future__ import annotations

import asyncio
import logging
import weakref
from typing import Any, Protocol

from dask_shm_plugin import handles, membership, seams
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.config import Options
from dask_shm_plugin.exceptions import ArenaUnavailable, SharedMemoryError
from dask_shm_plugin.notices import warn_once

logger = logging.getLogger("dask_shm_plugin")


class Half(Protocol):
    """A nanny's or a worker's plugin, as far as it is switched on and off."""

    async def start(self, server: Any) -> None:
        """Step in front of a server's calls."""

    async def stop(self) -> None:
        """Put everything back; harmless when it was never started."""


class _Seat:
    """Where at most one half of a server sits; who comes or goes has it for himself."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.half: Half | None = None


_SEATS: weakref.WeakKeyDictionary[Any, _Seat] = weakref.WeakKeyDictionary()


async def switch_on(server: Any, half: Half) -> None:
    """Start a half in the place of the one that is on; says why when that fails, and does not raise.

    Two clients may register at the same time. Dask (2026.8.0) does not wait for the ``setup`` of the one plugin before
    it tears it down for the other, nor does a nanny ever tear down what it replaces.
    """
    seat = _SEATS.setdefault(server, _Seat())
    async with seat.turn:
        earlier, seat.half = seat.half, half
        if earlier is not None:
            await earlier.stop()
        try:
            await half.start(server)
        except Exception as error:
            warn_once(f"Sharing is off in this process: {type(error).__name__}: {error}")
            logger.debug("could not start %r", half, exc_info=True)


async def switch_off(server: Any, half: Half) -> None:
    """Stop a half, unless another one has taken its place."""
    seat = _SEATS.setdefault(server, _Seat())
    async with seat.turn:
        if seat.half is half:
            seat.half = None
            await half.stop()


class Role:
    """One role of this process in one cluster.

    Parameters
    ----------
    kind
        "nanny", "worker" or "client".
    scheduler
        The rpc to the scheduler, which knows the cluster's name.
    address
        Where the role listens.
    options
        The settings.
    """

    def __init__(self, kind: str, scheduler: Any, address: str, options: Options) -> None:
        self.kind, self.address, self.options = kind, address, options
        self._scheduler = scheduler
        self.cluster: str | None = None

    async def join(self, *, create: bool) -> Arena | None:
        """Join the arena of this node, or make it; return None when there is none or it cannot be used."""
        reason = seams.why_not()
        if reason:
            warn_once(f"Sharing is off: {reason}")
            return None
        try:
            if self.cluster is None:
                self.cluster = await seams.cluster_of(self._scheduler)
            return await asyncio.to_thread(self._join, self.cluster, create=create)
        except SharedMemoryError as error:
            warn_once(f"Sharing is off in this process: {error}")
        except Exception as error:
            warn_once(f"Sharing is off in this process: {type(error).__name__}: {error}")
            logger.debug("could not join", exc_info=True)
        return None

    def _join(self, cluster: str, *, create: bool) -> Arena | None:
        if self.options.capacity_here() == 0:
            raise ArenaUnavailable("shm.capacity is zero")
        capacity = self.options.capacity_here if create else None
        arena = membership.join(cluster, self.kind, self.address, capacity=capacity, warm=self.options.warm)
        if arena is not None:
            handles.set_views(arena.arena_id, self.options.views)
        return arena

    async def withdraw(self) -> None:
        """Let others not find the role any more; the membership stays until :meth:`leave`."""
        if self.cluster is not None:
            await asyncio.to_thread(membership.withdraw, self.cluster, self.kind, self.address)

    async def leave(self) -> None:
        """End the role."""
        if self.cluster is None:
            return
        try:
            await asyncio.to_thread(membership.leave, self.cluster, self.kind, self.address)
        except RuntimeError:  # the interpreter is going down and starts no more threads
            membership.leave(self.cluster, self.kind, self.address)
