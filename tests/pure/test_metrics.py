"""The counters: what was published, attached, adopted, and sent instead."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator

import pytest

from dask_shm_plugin import exceptions, metrics
from dask_shm_plugin.metrics import EVENTS, Counters


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_nothing_is_counted_at_first() -> None:
    """All events are there, and no reason."""
    nothing = {"count": 0, "bytes": 0}
    assert Counters().snapshot() == {
        "published": nothing,
        "attached": nothing,
        "found": nothing,
        "adopted": nothing,
        "sent": {},
    }


def test_values_and_their_bytes_are_counted_by_event_and_reason() -> None:
    """Each for itself."""
    counters = Counters()
    for event, size in [("published", 3), ("published", 4), ("attached", 5), ("found", 5), ("adopted", 0)]:
        counters.count(event, size)
    for reason, size in [("arena-full", 7), ("arena-full", 8), ("stale", 0)]:
        counters.count_sent(reason, size)
    assert counters.snapshot() == {
        "published": {"count": 2, "bytes": 7},
        "attached": {"count": 1, "bytes": 5},
        "found": {"count": 1, "bytes": 5},
        "adopted": {"count": 1, "bytes": 0},
        "sent": {"arena-full": {"count": 2, "bytes": 15}, "stale": {"count": 1, "bytes": 0}},
    }


def test_an_event_that_does_not_exist_is_a_mistake() -> None:
    """It is not counted under a new name."""
    counters = Counters()
    with pytest.raises(KeyError):
        counters.count("publishd", 1)
    assert set(counters.snapshot()) == {*EVENTS, "sent"}


def test_a_snapshot_is_plain_data_of_its_own() -> None:
    """It travels in heartbeats, and does not change afterwards."""
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
    """Over the processes of a node: reasons that only one of them knows too."""
    first, second, total = Counters(), Counters(), {}
    first.count("published", 3)
    first.count_sent("stale", 1)
    second.count("published", 4)
    second.count_sent("arena-full", 2)
    one, other = first.snapshot(), second.snapshot()
    for snapshot in (one, other, Counters().snapshot()):
        metrics.add(total, snapshot)
    assert total == {
        "published": {"count": 2, "bytes": 7},
        "attached": {"count": 0, "bytes": 0},
        "found": {"count": 0, "bytes": 0},
        "adopted": {"count": 0, "bytes": 0},
        "sent": {"stale": {"count": 1, "bytes": 1}, "arena-full": {"count": 1, "bytes": 2}},
    }
    assert (one, other) == (first.snapshot(), second.snapshot())


def test_counts_begin_with_any_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may serve one cluster after another; reasons that did not come up since are not mentioned."""
    monkeypatch.setattr(metrics, "COUNTERS", Counters())
    metrics.COUNTERS.count("published", 3)
    metrics.COUNTERS.count_sent("stale", 1)
    before = metrics.COUNTERS.snapshot()
    nothing = {"count": 0, "bytes": 0}
    assert metrics.since(before) == {
        "published": nothing,
        "attached": nothing,
        "found": nothing,
        "adopted": nothing,
        "sent": {},
    }
    metrics.COUNTERS.count("published", 4)
    metrics.COUNTERS.count_sent("arena-full", 2)
    assert metrics.since(before) == {
        "published": {"count": 1, "bytes": 4},
        "attached": nothing,
        "found": nothing,
        "adopted": nothing,
        "sent": {"arena-full": {"count": 1, "bytes": 2}},
    }


def test_no_count_is_lost_among_threads(quick_switches: None) -> None:
    """Values are published in threads and asked for on the event loop."""
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
    """Reasons are the keys of the counters; none hides behind another's name."""
    errors = [error for error in vars(exceptions).values() if isinstance(error, type)]
    assert len(errors) > 8
    assert len({error.reason for error in errors}) == len(errors)
    assert all(issubclass(error, exceptions.SharedMemoryError) for error in errors)
