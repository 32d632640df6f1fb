"""The costs of moving a value that can be counted, and never seconds: locks, copies, mappings, bytes on the wire."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from distributed import Client
from observing import (
    BIG,
    LITTLE,
    addresses,
    array,
    fresh,
    is_shared,
    loopback,
    outside,
    totals,
    undisturbed,
    wait_until,
)

from dask_shm_plugin.linux import mutex, segment
from dask_shm_plugin.mapping import shared
from dask_shm_plugin.node import membership
from dask_shm_plugin.table.layout import BLOCKS_FROM

pytestmark = pytest.mark.slow

SIZE = 8 * BIG


class Meter:
    """Counts the operations of the package in one process, except those of its housekeeping thread."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._undo: list[Callable[[], None]] = []
        self._watch(mutex.Mutex, "run", lambda *args: ("locks", 1))
        self._watch(segment.Segment, "write", written)
        self._watch(shared.WriteMapping, "write", lambda _, offset, data, *keep: ("copied", len(data)))
        self._watch(segment.Segment, "map_private", lambda *args: ("mapped", 1))
        self._watch(segment.Segment, "missing", lambda *args: ("asked for pages", 1))

    def _watch(self, owner: Any, name: str, classify: Callable[..., tuple[str, int]]) -> None:
        old = getattr(owner, name)

        def watched(*args: Any) -> Any:
            if threading.current_thread().name != "dask-shm-tidy":
                event, count = classify(*args)
                self.counts[event] += count
            return old(*args)

        setattr(owner, name, watched)
        self._undo.append(lambda: setattr(owner, name, old))

    def stop(self) -> dict[str, int]:
        """Put all functions back in place, and return the counts."""
        for undo in self._undo:
            undo()
        return dict(self.counts)


def written(_: segment.Segment, offset: int, data: memoryview) -> tuple[str, int]:
    """Classify a write to the segment: one to the blocks is a copy, one to a directory makes a listing."""
    return ("copied", len(data)) if offset >= BLOCKS_FROM else ("listed", 1)


_meters: list[Meter] = []


def begin() -> None:
    """Count from now on, in this process."""
    for arena in membership.all_arenas():
        arena.holdings.tidy()
        arena.holdings.mappings.clear()
    _meters.append(Meter())


def end() -> dict[str, int]:
    """Return what was counted since :func:`begin`."""
    return _meters.pop().stop()


class Count:
    """The counts of the client and of each worker."""

    client: dict[str, int]
    workers: dict[str, dict[str, int]]


@pytest.fixture
def counting(four: Client) -> Iterator[Callable[[Callable[[], Any]], Count]]:
    """A function that calls another one and returns the counts of all processes for that call."""

    def count(do: Callable[[], Any]) -> Count:
        result = Count()
        four.run(begin)
        begin()
        do()
        result.client, result.workers = end(), four.run(end)
        return result

    yield count
    assert _meters == []


def moved(client: Client, size: int, source: str, reader: str) -> Any:
    """Let one worker make a value in private memory and another one read it; return the value's future."""
    made = client.submit(outside, array, fresh(), size, workers=[source], pure=False)
    assert client.submit(is_shared, made, workers=[reader], pure=False).result() == (size > LITTLE)
    return made


def test_small_values_and_tiny_tasks_cost_nothing(four: Client, counting: Callable[..., Count]) -> None:
    """Below the threshold, the package takes no lock, copies nothing and maps nothing, however a value moves."""
    a, b, *_ = addresses(four)

    def work() -> None:
        four.gather(four.map(abs, range(100), pure=False))
        four.gather([moved(four, LITTLE, a, b) for _ in range(5)])
        four.gather(four.scatter([array(fresh(), LITTLE)], broadcast=True))

    done = counting(work)
    assert done.client == {}
    assert list(done.workers.values()) == [{}] * 4


def test_a_broadcast_costs_one_copy_and_one_mapping_per_worker(four: Client, counting: Callable[..., Count]) -> None:
    """The client locks to reserve and to seal, each worker to attach; one worker lists the value, and none is asked."""
    kept = []
    done = counting(lambda: kept.append(four.scatter(array(fresh(), SIZE), broadcast=True, hash=False)))
    assert done.client["copied"] == SIZE * 8
    assert done.client["locks"] <= 3
    first, *others = sorted(done.workers.values(), key=lambda counts: -counts.get("listed", 0))
    assert first == {"locks": 2, "mapped": 1, "listed": 1}
    assert others == [{"locks": 1, "mapped": 1}] * 3


def test_a_read_of_a_published_value_costs_one_lock_and_one_mapping(
    four: Client, counting: Callable[..., Count]
) -> None:
    """The reader attaches to the block and maps it, without a request to the owner."""
    a, b, c, _ = addresses(four)
    before = totals(four).adopted
    made = moved(four, SIZE, a, b)
    # The owner adopts the value after it has answered, which may be later than the reader's result.
    wait_until(lambda: totals(four).adopted == before + 1, "the owner has adopted the value")
    done = counting(lambda: four.submit(is_shared, made, workers=[c], pure=False).result())
    assert done.workers[c] == {"locks": 1, "mapped": 1}
    # Dask may choose the worker that only received the value: then this one is asked, and lists the value, too.
    assert [done.workers[a], done.workers[b]] in ([{}, {}], [{}, {"locks": 1, "listed": 1}])
    assert done.client == {}


def test_the_first_fetch_of_a_result_costs_one_copy(four: Client, counting: Callable[..., Count]) -> None:
    """The copy goes into the arena; then the publisher maps it in place of its own."""
    a, b, *_ = addresses(four)
    done = counting(lambda: moved(four, SIZE, a, b))
    assert done.workers[a]["copied"] == SIZE * 8
    assert done.workers[a]["mapped"] == 1
    assert done.workers[b] == {"locks": 1, "mapped": 1}


@pytest.mark.parametrize("size", [SIZE, 4 * SIZE])
def test_the_bytes_on_the_wire_do_not_grow_with_the_value(four: Client, size: int) -> None:
    """A handle takes a few hundred bytes and a task a few thousand, for a value of any size."""
    a, b, c, _ = addresses(four)
    made = moved(four, size, a, b)

    def carried() -> int:
        before = loopback()
        four.submit(is_shared, made, workers=[c], pure=False).result()
        return loopback() - before

    assert undisturbed(carried, lambda sent: sent < SIZE) < SIZE
