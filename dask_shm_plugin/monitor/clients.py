"""The counters of clients: a client tells its scheduler what it has moved, since it sends no metrics with heartbeats."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from dask_shm_plugin import metrics
from dask_shm_plugin.arena.arena import Arena

logger = logging.getLogger("dask_shm_plugin")

TOPIC = "dask-shm-clients"
"""The topic of the scheduler's event log in which clients tell."""

_PAUSE_S = 0.5
_MAX_ARENAS, _MAX_PROCESSES = 64, 256
"""Number of arenas, and of processes per arena, that are kept apart; the counters of the oldest processes are added up."""

_COUNTED_BEFORE: dict[bytes, dict[str, Any]] = {}
"""By arena: the counters of this process when its first client there began. All its clients share the counters."""


class ClientCounters:
    """Tells a scheduler the counters of a client's process, after the client has moved values.

    Parameters
    ----------
    scheduler
        The rpc to the scheduler. One without the package keeps the messages unread.

    Notes
    -----
    To be used on the client's event loop. Nothing waits for the scheduler.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._before = metrics.COUNTERS.snapshot()
        self._told: dict[str, Any] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def tell_soon(self, arena: Arena) -> None:
        """Tell the counters within half a second, if they have changed."""
        if self._timer is None:
            _COUNTED_BEFORE.setdefault(arena.arena_id, self._before)
            self._timer = asyncio.get_running_loop().call_later(_PAUSE_S, self._begin, arena)

    def stop(self) -> None:
        """Tell nothing any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _begin(self, arena: Arena) -> None:
        self._timer = None
        self._task = asyncio.create_task(self._tell(arena))

    async def _tell(self, arena: Arena) -> None:
        try:
            counters, member = metrics.since(_COUNTED_BEFORE[arena.arena_id]), arena.member
            if counters != self._told and metrics.events(counters):
                process = f"{member.slot}:{member.incarnation}"
                message = {"arena": arena.arena_id.hex(), "process": process, "counters": counters}
                await self._scheduler.log_event(topic=TOPIC, msg=message)
                self._told = counters
        except Exception:
            logger.debug("the scheduler does not know what this client has moved", exc_info=True)


class CountersOfClients:
    """Keeps what clients tell, by arena and process, also after a client has gone: counters must not fall.

    Notes
    -----
    This is no plugin of the scheduler: Dask would call it in each transition of each task.
    """

    def __init__(self) -> None:
        self._told: dict[str, dict[str, dict[str, Any]]] = {}
        self._read_until = 0.0

    def read(self, scheduler: Any) -> None:
        """Read what clients have told a scheduler since the last call; a message of another form says nothing."""
        for at, message in scheduler.get_events(TOPIC):
            if at > self._read_until:
                self._read_until = at
                with contextlib.suppress(TypeError, KeyError):
                    metrics.events(message["counters"])
                    self._note(str(message["arena"]), str(message["process"]), message["counters"])

    def _note(self, arena: str, process: str, counters: dict[str, Any]) -> None:
        told = self._told.setdefault(arena, {})
        told[process] = counters
        if len(self._told) > _MAX_ARENAS:
            del self._told[next(iter(self._told))]
        if len(told) > _MAX_PROCESSES:
            oldest = next(process for process in told if process)
            metrics.add(told.setdefault("", {}), told.pop(oldest))

    def of(self, arena: str) -> dict[str, dict[str, Any]]:
        """Return the counters of the clients of an arena, by process."""
        return self._told.get(arena, {})
