"""The counters of values that were published, attached, found, adopted, or sent instead."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator

import pytest

from dask_shm_plugin import exceptions, metrics
from dask_shm_plugin.metrics import EVENTS, Counters


@pytest.fixture
def frequent_thread_switches() -> Iterator[None]:
    """Let threads take turns as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_nothing_is_counted_at_first() -> None:
    """A new snapshot has all events with zeros, and no reasons."""
    nothing = {"count": 0, "bytes": 0}
    assert Counters().snapshot() == {
        "published": nothing,
        "born": nothing,
        "attached": nothing,
        "found": nothing,
        "landed": nothing,
        "received": nothing,
        "adopted": nothing,
        "shuffled": nothing,
        "sent": {},
    }


def test_values_and_their_bytes_are_counted_by_event_and_reason() -> None:
    """Each event and each reason has its own number of values and bytes."""
    counters = Counters()
    for event, size in [("published", 3), ("published", 4), ("attached", 5), ("found", 5), ("adopted", 0)]:
        counters.count(event, size)
    for reason, size in [("arena-full", 7), ("arena-full", 8), ("stale", 0)]:
        counters.count_sent(reason, size)
    assert counters.snapshot() == {
        "published": {"count": 2, "bytes": 7},
        "born": {"count": 0, "bytes": 0},
        "attached": {"count": 1, "bytes": 5},
        "found": {"count": 1, "bytes": 5},
        "landed": {"count": 0, "bytes": 0},
        "received": {"count": 0, "bytes": 0},
        "adopted": {"count": 1, "bytes": 0},
        "shuffled": {"count": 0, "bytes": 0},
        "sent": {"arena-full": {"count": 2, "bytes": 15}, "stale": {"count": 1, "bytes": 0}},
    }


def test_an_unknown_event_is_an_error() -> None:
    """A misspelt event raises an error, and is not counted under a new name."""
    counters = Counters()
    with pytest.raises(KeyError):
        counters.count("publishd", 1)
    assert set(counters.snapshot()) == {*EVENTS, "sent"}


def test_a_snapshot_is_an_independent_copy_of_plain_data() -> None:
    """A snapshot can be sent in heartbeats as JSON, and does not change afterwards."""
    counters = Counters()
    counters.count_sent("stale", 1)
    before = counters.snapshot()
    counters.count("published", 1)
    counters.count_sent("stale", 1)
    assert before["published"]["count"] == 0
    assert before["sent"]["stale"]["count"] == 1
    assert json.loads(json.dumps(before)) == before
    before["sent"]["stale"]["count"] = 99
    assert counters.snapshot()["sent"]["stale"]["count"] == 2


def test_snapshots_are_added_up() -> None:
    """The snapshots of a node's processes are summed, including reasons that only one of them has."""
    first, second, total = Counters(), Counters(), {}
    first.count("published", 3)
    first.count_sent("stale", 1)
    second.count("published", 4)
    second.count_sent("arena-full", 2)
    one, other = first.snapshot(), second.snapshot()
    del other["received"]  # it comes from a process with an earlier version
    for snapshot in (one, other, Counters().snapshot()):
        metrics.add(total, snapshot)
    assert total == {
        "published": {"count": 2, "bytes": 7},
        "born": {"count": 0, "bytes": 0},
        "attached": {"count": 0, "bytes": 0},
        "found": {"count": 0, "bytes": 0},
        "landed": {"count": 0, "bytes": 0},
        "received": {"count": 0, "bytes": 0},
        "adopted": {"count": 0, "bytes": 0},
        "shuffled": {"count": 0, "bytes": 0},
        "sent": {"stale": {"count": 1, "bytes": 1}, "arena-full": {"count": 1, "bytes": 2}},
    }
    assert one == first.snapshot()
    assert other | {"received": {"count": 0, "bytes": 0}} == second.snapshot()


def test_counts_since_a_snapshot_are_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference to an earlier snapshot leaves out reasons without new values, as for the next cluster."""
    monkeypatch.setattr(metrics, "COUNTERS", Counters())
    metrics.COUNTERS.count("published", 3)
    metrics.COUNTERS.count_sent("stale", 1)
    before = metrics.COUNTERS.snapshot()
    nothing = {"count": 0, "bytes": 0}
    assert metrics.since(before) == {
        "published": nothing,
        "born": nothing,
        "attached": nothing,
        "found": nothing,
        "landed": nothing,
        "received": nothing,
        "adopted": nothing,
        "shuffled": nothing,
        "sent": {},
    }
    metrics.COUNTERS.count("published", 4)
    metrics.COUNTERS.count_sent("arena-full", 2)
    assert metrics.since(before) == {
        "published": {"count": 1, "bytes": 4},
        "born": nothing,
        "attached": nothing,
        "found": nothing,
        "landed": nothing,
        "received": nothing,
        "adopted": nothing,
        "shuffled": nothing,
        "sent": {"arena-full": {"count": 1, "bytes": 2}},
    }


def test_no_count_is_lost_among_threads(frequent_thread_switches: None) -> None:
    """The event loop and the threads that publish values count at the same time."""
    counters = Counters()

    def work() -> None:
        for _ in range(2000):
            counters.count("published", 2)
            counters.count_sent("stale", 3)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = counters.snapshot()
    assert counted["published"] == {"count": 16000, "bytes": 32000}
    assert counted["sent"] == {"stale": {"count": 16000, "bytes": 48000}}


def test_each_error_has_a_reason_of_its_own() -> None:
    """Reasons are the keys of the counters, so no two errors share one."""
    errors = [error for error in vars(exceptions).values() if isinstance(error, type)]
    assert len(errors) > 8
    assert len({error.reason for error in errors}) == len(errors)
    assert all(issubclass(error, exceptions.SharedMemoryError) for error in errors)
