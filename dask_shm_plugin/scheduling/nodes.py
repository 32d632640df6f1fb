"""Tell which workers share an arena, and which values lie in it.

A worker names its arena in the metrics of its heartbeats, so no knowledge about it can outlive it. Workers and
clients tell in a topic of the scheduler's event log which keys they have published, and which no longer are.
"""

from __future__ import annotations

import time
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

TOPIC = "dask-shm"
"""The topic of the event log in which published keys are told."""

LARGE_BYTES = 8 << 20
"""Smallest value whose place in an arena the scheduler considers; smaller ones are treated as by stock Dask."""

MAX_INPUTS = 32
"""A task with more inputs is placed as by stock Dask: the inputs are looked at for each worker that may run it."""

_PATIENCE_S = 30.0
"""How long news about a key waits until the scheduler knows the key: a direct scatter registers it last."""


def news(arena_id: str, published: Iterable[Any], withdrawn: Iterable[Any] = (), holder: str = "") -> dict[str, Any]:
    """Return the message that tells which keys have values that lie in an arena, and which no longer have.

    ``holder`` is the address of the worker that tells. A client tells of the workers to which it has scattered.
    """
    return {"arena": arena_id, "holder": holder, "published": list(published), "withdrawn": list(withdrawn)}


def arena_of(ws: Any) -> str | None:
    """Return the id of a worker's arena, or None if the worker does not share; ``ws`` is a ``WorkerState``."""
    return arena_in(ws.metrics)


def arena_in(metrics: dict[str, Any]) -> str | None:
    """Return the id of a worker's arena from the metrics of its heartbeats, or None if it does not share."""
    said = metrics.get("shm")
    return said.get("arena") if isinstance(said, dict) else None


def is_large(ts: Any) -> bool:
    """Return whether a value is large enough for its place to matter; ``ts`` is a ``TaskState``."""
    return bool(ts.nbytes >= LARGE_BYTES)


def has_large_input(ts: Any) -> bool:
    """Return whether the place of a task's inputs matters: some are large, and they are few enough to look at."""
    inputs = ts.dependencies
    # Without inputs, no generator is made: this is asked twice for each tiny task.
    return bool(inputs) and len(inputs) <= MAX_INPUTS and any(dts.nbytes >= LARGE_BYTES for dts in inputs)


class _Known:
    """The arenas in which the value of one run of a task lies; ``ts`` is None until the scheduler knows the key.

    ``private`` are the addresses of holders that have spilled or replaced their copy. Others of the arena still map it.
    """

    def __init__(self, ts: Any) -> None:
        self.arenas: set[str] = set()
        self.private: set[str] = set()
        self._ref: weakref.ref[Any] | None = None
        self._run_id: int | None = None
        self._since = time.monotonic()
        if ts is not None:
            self.bind(ts)

    def bind(self, ts: Any) -> None:
        self._ref, self._run_id = weakref.ref(ts), ts.run_id

    def is_of(self, ts: Any) -> bool:
        """Return whether this is about the present value of a task: one that has run again has another."""
        if self._ref is None:
            self.bind(ts)
        return self._ref is not None and self._run_id == ts.run_id and self._ref() is ts

    def arena_of_holder(self, ws: Any) -> str | None:
        """Return the arena from which a holder has mapped the value, or None if its copy is private."""
        arena_id = arena_of(ws)
        return arena_id if arena_id in self.arenas and ws.address not in self.private else None

    @property
    def is_over(self) -> bool:
        """Whether the task is gone, or has not come."""
        if self._ref is None:
            return time.monotonic() - self._since > _PATIENCE_S
        return self._ref() is None


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
        self._known: dict[Any, _Known] = {}

    def heard(self, message: Any) -> list[Any]:
        """Note published and withdrawn keys; return the keys that were published.

        A message of another form, as another version of the package may send it, says nothing.
        """
        try:
            arena_id, holder = str(message["arena"]), str(message["holder"])
            published, withdrawn = list(message["published"]), message["withdrawn"]
        except (TypeError, KeyError):
            return []
        for key in withdrawn:
            if key in self._known:
                self._known[key].private.add(holder)
        for key in published:
            ts, known = self._scheduler.tasks.get(key), self._known.get(key)
            if known is None or (ts is not None and not known.is_of(ts)):
                known = self._known[key] = _Known(ts)
            known.arenas.add(arena_id)
            known.private.discard(holder)
        return published

    def is_published(self, ts: Any, arena_id: str | None) -> bool:
        """Return whether a value lies in an arena, and is held by a worker that uses this arena."""
        known = self._of(ts)
        if known is None or arena_id not in known.arenas:
            return False
        return any(known.arena_of_holder(ws) == arena_id for ws in ts.who_has or ())

    def _of(self, ts: Any) -> _Known | None:
        known = self._known.get(ts.key)
        return known if known is not None and known.is_of(ts) else None

    def is_held_in(self, ts: Any, arena_id: str | None) -> bool:
        """Return whether a worker that uses an arena holds a value, in the arena or privately."""
        return arena_id is not None and any(arena_of(ws) == arena_id for ws in ts.who_has or ())

    def workers(self) -> dict[str | None, set[Any]]:
        """Return the running workers by arena."""
        by_arena: defaultdict[str | None, set[Any]] = defaultdict(set)
        for ws in self._scheduler.running:
            by_arena[arena_of(ws)].add(ws)
        return by_arena

    def holders(self, keys: Iterable[Any] | None = None) -> Iterator[tuple[Any, dict[str, set[Any]]]]:
        """Yield published large values, and the holders of each by arena.

        Parameters
        ----------
        keys
            The keys to look at, by default all.
        """
        for key in list(self._known) if keys is None else keys:
            ts, known = self._scheduler.tasks.get(key), self._known.get(key)
            if known is not None and ts is None and known.is_over:
                del self._known[key]
            elif known is not None and ts is not None and ts.who_has and is_large(ts) and known.is_of(ts):
                by_arena: defaultdict[str, set[Any]] = defaultdict(set)
                known.private.intersection_update([ws.address for ws in ts.who_has])  # others map it when they get it
                for ws in ts.who_has:
                    if arena_id := known.arena_of_holder(ws):
                        by_arena[arena_id].add(ws)
                yield ts, by_arena

    def copies(self, ts: Any, holders: Iterable[Any]) -> list[set[Any]]:
        """Group holders of a value by physical copy: those on running workers first, then the most widely held.

        Holders that map a published value from one arena hold one copy; any other holder has its own.
        """
        known = self._of(ts) if is_large(ts) else None
        by_copy: defaultdict[Any, set[Any]] = defaultdict(set)
        for ws in holders:
            by_copy[(known and known.arena_of_holder(ws)) or ws].add(ws)
        running = self._scheduler.running
        return sorted(by_copy.values(), key=lambda copy: (not copy.isdisjoint(running), len(copy)), reverse=True)
