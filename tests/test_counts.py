"""What moving a value costs, in things that can be counted: locks, copies, mappings, bytes on the wire. Never in seconds."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from distributed import Client
from observing import BIG, LITTLE, addresses, array, fresh, is_shared, loopback, undisturbed

from dask_shm_plugin import liveness, membership, segment, window
from dask_shm_plugin.layout import BLOCKS_FROM

SIZE = 8 * BIG


class Meter:
    """Counts what the package does in one process, but not what its tidying thread does meanwhile."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._undo: list[Callable[[], None]] = []
        self._watch(liveness.Mutex, "run", lambda *args: ("locks", 1))
        self._watch(segment.Segment, "write", written)
        self._watch(window.Window, "write", lambda _, offset, data, *keep: ("copied", len(data)))
        self._watch(segment.Segment, "map_private", lambda *args: ("mapped", 1))
        self._watch(segment.Segment, "missing", lambda *args: ("asked for pages", 1))

    def _watch(self, owner: Any, name: str, what: Callable[..., tuple[str, int]]) -> None:
        old = getattr(owner, name)

        def watched(*args: Any) -> Any:
            if threading.current_thread().name != "dask-shm-tidy":
                event, count = what(*args)
                self.counts[event] += count
            return old(*args)

        setattr(owner, name, watched)
        self._undo.append(lambda: setattr(owner, name, old))

    def stop(self) -> dict[str, int]:
        """Undo everything, and return the counts."""
        for undo in self._undo:
            undo()
        return dict(self.counts)


def written(_: segment.Segment, offset: int, data: memoryview) -> tuple[str, int]:
    """Return how a write counts: what is written to blocks was copied."""
    return ("copied", len(data)) if offset >= BLOCKS_FROM else ("listed", 1)


_meters: list[Meter] = []


def begin() -> None:
    """Count from now on, in this process."""
    for arena in membership.all_arenas():
        arena.holdings.tidy()
        arena.holdings.forget_mappings()
    _meters.append(Meter())


def end() -> dict[str, int]:
    """Return what was counted since :func:`begin`."""
    return _meters.pop().stop()


class Count:
    """What the client and the workers have counted."""

    client: dict[str, int]
    workers: dict[str, dict[str, int]]


@pytest.fixture
def counting(four: Client) -> Iterator[Callable[[Callable[[], Any]], Count]]:
    """Do something, and count what it costs in all processes."""

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
    """Let one worker make a value and another one look at it; return the value's future."""
    made = client.submit(array, fresh(), size, workers=[source], pure=False)
    assert client.submit(is_shared, made, workers=[reader], pure=False).result() == (size > LITTLE)
    return made


def test_small_values_and_tiny_tasks_cost_nothing(four: Client, counting: Callable[..., Count]) -> None:
    """Neither a lock nor a system call of ours, however they move."""
    a, b, *_ = addresses(four)

    def work() -> None:
        four.gather(four.map(abs, range(100), pure=False))
        four.gather([moved(four, LITTLE, a, b) for _ in range(5)])
        four.gather(four.scatter([array(fresh(), LITTLE)], broadcast=True))

    done = counting(work)
    assert done.client == {}
    assert list(done.workers.values()) == [{}] * 4


def test_a_broadcast_is_one_copy_and_one_mapping_each(four: Client, counting: Callable[..., Count]) -> None:
    """The client takes the lock to reserve and to seal, each worker to attach; one lists it, and is asked by nobody."""
    kept = []
    done = counting(lambda: kept.append(four.scatter(array(fresh(), SIZE), broadcast=True, hash=False)))
    assert done.client["copied"] == SIZE * 8
    assert done.client["locks"] <= 3
    first, *others = sorted(done.workers.values(), key=lambda counts: -counts.get("listed", 0))
    assert first == {"locks": 2, "mapped": 1, "listed": 1}
    assert others == [{"locks": 1, "mapped": 1}] * 3


def test_what_is_published_is_mapped_and_nothing_else(four: Client, counting: Callable[..., Count]) -> None:
    """Its owner is not even asked; its reader attaches and maps."""
    a, b, c, _ = addresses(four)
    made = moved(four, SIZE, a, b)
    done = counting(lambda: four.submit(is_shared, made, workers=[c], pure=False).result())
    assert done.workers[c] == {"locks": 1, "mapped": 1}
    # Of those who have it, the one who has only received it must be asked, refers to the block once more, and lists it.
    assert [done.workers[a], done.workers[b]] in ([{}, {}], [{}, {"locks": 1, "listed": 1}])
    assert done.client == {}


def test_a_result_is_copied_once_when_it_is_first_asked_for(four: Client, counting: Callable[..., Count]) -> None:
    """The copy is in the arena; its maker then maps it in the place of its own."""
    a, b, *_ = addresses(four)
    done = counting(lambda: moved(four, SIZE, a, b))
    assert done.workers[a]["copied"] == SIZE * 8
    assert done.workers[a]["mapped"] == 1
    assert done.workers[b] == {"locks": 1, "mapped": 1}


@pytest.mark.parametrize("size", [SIZE, 4 * SIZE])
def test_what_goes_over_the_wire_does_not_grow_with_the_value(four: Client, size: int) -> None:
    """A handle is a few hundred bytes, and a task a few thousand."""
    a, b, c, _ = addresses(four)
    made = moved(four, size, a, b)

    def carried() -> int:
        before = loopback()
        four.submit(is_shared, made, workers=[c], pure=False).result()
        return loopback() - before

    assert undisturbed(carried, lambda sent: sent < SIZE) < SIZE
