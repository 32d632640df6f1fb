"""The scheduler keeps the counters of its clients, in bounded memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from dask_shm_plugin import metrics
from dask_shm_plugin.monitor import clients
from dask_shm_plugin.monitor.clients import CountersOfClients


def told(process: int, size: int = 1, arena: str = "a") -> dict[str, Any]:
    """Return the message of a client that has published one value."""
    counters = {event: {"count": 0, "bytes": 0} for event in metrics.EVENTS}
    return {
        "arena": arena,
        "process": f"{process}:1",
        "counters": counters | {"published": {"count": 1, "bytes": size}, "sent": {}},
    }


def after(*messages: Any) -> CountersOfClients:
    """Return the counters after some messages, which are read twice."""
    kept = CountersOfClients()
    for _ in range(2):
        kept.read(SimpleNamespace(get_events=lambda topic: tuple(enumerate(messages, start=1))))
    return kept


def published(kept: CountersOfClients, arena: str = "a") -> int:
    """Return the sum of the published bytes."""
    return sum(counters["published"]["bytes"] for counters in kept.of(arena).values())


def test_the_last_counters_of_each_process_count() -> None:
    """A process tells sums since it began."""
    assert published(after(told(1, 5), told(2, 100), told(1, 7), told(3, 1000, arena="b"))) == 107


def test_no_count_is_lost_when_there_have_been_very_many_processes() -> None:
    """The oldest ones are added up."""
    many = 3 * clients._MAX_PROCESSES
    kept = after(*(told(process) for process in range(many)))
    assert published(kept) == many
    assert len(kept.of("a")) <= clients._MAX_PROCESSES + 1


def test_the_oldest_arenas_are_forgotten() -> None:
    """Each restart of all workers makes a new one."""
    kept = after(*(told(1, arena=str(number)) for number in range(2 * clients._MAX_ARENAS)))
    assert published(kept, "0") == 0
    assert published(kept, str(2 * clients._MAX_ARENAS - 1)) == 1


def test_a_message_of_another_form_says_nothing() -> None:
    """Another version of the package may use the same topic."""
    assert published(after(None, 1, "text", {}, {"arena": "a", "process": "1", "counters": {}}, told(1, 5))) == 5
