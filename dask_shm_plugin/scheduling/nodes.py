"""Tell which workers share an arena, and which values lie in it.

A worker names its arena in the metrics of its heartbeats, so no knowledge about it can outlive it. Workers and
clients tell in a topic of the scheduler's event log which keys they have published.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

TOPIC = "dask-shm"
"""The topic of the event log in which published keys are told."""

LARGE_BYTES = 8 << 20
"""Smallest value whose place in an arena the scheduler considers; smaller ones are treated as by stock Dask."""


def news(arena_id: str, keys: Iterable[Any]) -> dict[str, Any]:
    """Return the message that tells that the values of some keys lie in an arena."""
    return {"arena": arena_id, "published": list(keys)}


def arena_of(ws: Any) -> str | None:
    """Return the id of a worker's arena, or None if the worker does not share; ``ws`` is a ``WorkerState``."""
    said = ws.metrics.get("shm")
    return said.get("arena") if said else None


def is_large(ts: Any) -> bool:
    """Return whether a value is large enough for its place to matter; ``ts`` is a ``TaskState``."""
    return bool(ts.nbytes >= LARGE_BYTES)


def has_large_input(ts: Any) -> bool:
    """Return whether any input of a task is large."""
    return any(dts.nbytes >= LARGE_BYTES for dts in ts.dependencies)


class Nodes:
    """The arenas and published values that a scheduler knows.

    Parameters
    ----------
    scheduler
        A running scheduler.

    Notes
    -----
    To be used on the scheduler's event loop.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._published: weakref.WeakKeyDictionary[Any, tuple[int | None, set[str]]] = weakref.WeakKeyDictionary()

    def heard(self, message: Any) -> bool:
        """Note published keys; return whether any of them is that of a large value.

        A message of another form, as another version of the package may send it, says nothing.
        """
        try:
            arena_id, keys = str(message["arena"]), list(message["published"])
        except (TypeError, KeyError):
            return False
        found = [ts for key in keys if (ts := self._scheduler.tasks.get(key)) is not None]
        for ts in found:
            run_id, arenas = self._published.get(ts, (None, set()))
            # A task that ran again has a new value.
            self._published[ts] = ts.run_id, (arenas if run_id == ts.run_id else set()) | {arena_id}
        return bool(found)

    def is_published(self, ts: Any, arena_id: str | None) -> bool:
        """Return whether a value lies in an arena, and is held by a worker that uses this arena."""
        run_id, arenas = self._published.get(ts, (None, ()))
        return arena_id in arenas and run_id == ts.run_id and self.is_held_in(ts, arena_id)

    def is_held_in(self, ts: Any, arena_id: str | None) -> bool:
        """Return whether a worker that uses an arena holds a value, in the arena or privately."""
        return arena_id is not None and any(arena_of(ws) == arena_id for ws in ts.who_has or ())

    def workers_of(self, arena_id: str | None) -> set[Any]:
        """Return the running workers that use an arena."""
        return {ws for ws in self._scheduler.running if arena_of(ws) == arena_id} if arena_id else set()

    def published(self) -> Iterator[tuple[Any, dict[str, set[Any]]]]:
        """Yield each published large value, and its holders by arena."""
        for ts in list(self._published):
            if ts.who_has and is_large(ts):
                holders = {
                    arena_id: {ws for ws in ts.who_has if arena_of(ws) == arena_id}
                    for arena_id in self._published[ts][1]
                    if self.is_published(ts, arena_id)
                }
                if holders:
                    yield ts, holders

    def copies(self, ts: Any, holders: Iterable[Any]) -> list[set[Any]]:
        """Group holders of a value by physical copy, the most widely held copy first.

        Holders that map a published value from one arena hold one copy; any other holder has its own.
        """
        by_copy: dict[Any, set[Any]] = {}
        for ws in holders:
            arena_id = arena_of(ws)
            is_mapped = is_large(ts) and self.is_published(ts, arena_id)
            by_copy.setdefault(arena_id if is_mapped else ws, set()).add(ws)
        return sorted(by_copy.values(), key=len, reverse=True)
