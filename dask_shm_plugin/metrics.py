"""The counters of a process and their names.

``published``  values copied into the arena, and the bytes copied
``born``       arrays that were allocated in the arena and sealed there without a copy, and the bytes of their drafts
``attached``   values mapped from the arena instead of being received, and their bytes
``found``      attached values that were found in the arena without asking the worker that has them
``landed``     values that came from another node and were put into the arena, and their bytes
``received``   landed values that were received straight into the arena, and their bytes
``adopted``    values of which the publisher replaced its private copy by the shared one, and their bytes
``shuffled``   messages of shuffles whose data were mapped instead of received, and their bytes
``sent``       values that were large enough to be shared but were sent as bytes, by reason
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from typing import Any

EVENTS = ("published", "born", "attached", "found", "landed", "received", "adopted", "shuffled")


class Counters:
    """The counts of one process.

    Notes
    -----
    Thread-safe. Finalizers must not use it: they may run inside the lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, list[int]] = {event: [0, 0] for event in EVENTS}
        self._sent: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])

    def count(self, event: str, size: int) -> None:
        """Count one value of ``size`` bytes under one of ``EVENTS``."""
        with self._lock:
            self._counts[event][0] += 1
            self._counts[event][1] += size

    def count_sent(self, reason: str, size: int) -> None:
        """Count one value of ``size`` bytes that was sent instead of shared, under the reason."""
        with self._lock:
            self._sent[reason][0] += 1
            self._sent[reason][1] += size

    def snapshot(self) -> dict[str, Any]:
        """Return the counts as plain data: ``{"published": {"count", "bytes"}, ..., "sent": {reason: {...}}}``."""
        with self._lock:
            counts: dict[str, Any] = {event: _named(pair) for event, pair in self._counts.items()}
            counts["sent"] = {reason: _named(pair) for reason, pair in self._sent.items()}
            return counts


def _named(pair: list[int]) -> dict[str, int]:
    return {"count": pair[0], "bytes": pair[1]}


def since(before: dict[str, Any]) -> dict[str, Any]:
    """Return the counts of this process since an earlier snapshot, as plain data."""
    now = COUNTERS.snapshot()
    counts: dict[str, Any] = {event: _less(now[event], before[event]) for event in EVENTS}
    sent = {reason: _less(pair, before["sent"].get(reason, _named([0, 0]))) for reason, pair in now["sent"].items()}
    counts["sent"] = {reason: pair for reason, pair in sent.items() if pair["count"]}
    return counts


def _less(pair: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: pair[name] - before[name] for name in pair}


def events(counts: dict[str, Any]) -> int:
    """Return how many events a snapshot counts."""
    pairs = [*(counts[event] for event in EVENTS), *counts["sent"].values()]
    return sum(int(pair["count"]) for pair in pairs)


def add(total: dict[str, Any], more: dict[str, Any]) -> None:
    """Add the snapshot ``more`` to the snapshot ``total``, in place; another version may not count some of the events."""
    for event in EVENTS:
        _add_pair(total.setdefault(event, _named([0, 0])), more.get(event, _named([0, 0])))
    sent = total.setdefault("sent", {})
    for reason, pair in more["sent"].items():
        _add_pair(sent.setdefault(reason, {"count": 0, "bytes": 0}), pair)


def _add_pair(total: dict[str, int], more: dict[str, int]) -> None:
    total["count"] += more["count"]
    total["bytes"] += more["bytes"]


COUNTERS = Counters()

if hasattr(os, "register_at_fork"):
    # A forked child has counts of its own. Another thread of the parent may have held the lock during the fork.
    os.register_at_fork(after_in_child=lambda: COUNTERS.__init__())  # type: ignore[misc]
