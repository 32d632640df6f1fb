"""An array that is published keeps its address; its readers see the sealed bytes, and its owner's writes are private."""

from __future__ import annotations

import gc
import itertools
import threading
from typing import Any

import numpy as np
import pytest
from births import KIB, MIB, drafts, figures, in_arena, newborn, own_drafts
from other_processes import wait_until

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.block import Descriptor
from dask_shm_plugin.births import switch
from dask_shm_plugin.births.nursery import Nursery, Sealed
from dask_shm_plugin.exceptions import ArenaBusy
from dask_shm_plugin.linux import pagemap
from dask_shm_plugin.mapping.atlas import ATLAS
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.values import codec, handles
from dask_shm_plugin.values.codec import Published, Serialized

SIZE = 2 * MIB


def publish(value: Any, arena: Arena) -> Published:
    """Publish a value."""
    return codec.publish(Serialized.of(value, {}), arena)


def read(published: Published, arena: Arena) -> np.ndarray:
    """Return the largest part of a published value, as a reader sees it."""
    spans = [part for part in published.handle.parts if isinstance(part, handles.Span)]
    span = max(spans, key=lambda part: part.length)
    view = arena.view(Descriptor(arena.arena_id, span.row), span.offset, span.length)
    return np.frombuffer(view, np.uint8)


def full(number: int, size: int = SIZE) -> np.ndarray:
    """Return an array of one number that was born in the arena."""
    return newborn(np.full, size, number, np.uint8)


def test_a_born_array_is_published_where_it_is(nursery: Nursery, arena: Arena) -> None:
    """Nothing is copied, and the array has the same address and owns its data."""
    array, before = full(7), COUNTERS.snapshot()["born"]
    address = array.ctypes.data
    published = publish(array, arena)
    assert (published.copied, drafts(arena)) == (0, SIZE)
    assert (array.ctypes.data, array.flags.owndata, array.flags.writeable) == (address, True, True)
    assert codec.is_shared(array)
    assert COUNTERS.snapshot()["born"]["bytes"] - before["bytes"] == SIZE
    assert (read(published, arena) == 7).all()
    assert own_drafts(arena) == 0


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_the_owner_writes(nursery: Nursery, arena: Arena, when: str) -> None:
    """A write before the publication is read; one after it is private, and the next publication copies."""
    array = full(1)
    if when == "before":
        array[:5] = 2
    published = publish(array, arena)
    if when == "during":
        view = read(published, arena)
        assert view[0] == 1
    if when != "before":
        array[:5] = 2
        array[-1] = 3
        assert (read(published, arena) == 1).all()
        assert pagemap.is_written(array.ctypes.data, array.nbytes)
    again = publish(array, arena)
    assert again.copied == (0 if when == "before" else SIZE)
    assert (read(again, arena) == array).all()
    assert read(again, arena)[:5].tolist() == [2] * 5


def test_an_array_outlives_its_publication_and_the_publication_the_array(nursery: Nursery, arena: Arena) -> None:
    """The block stays as long as its owner or a reader has it."""
    array = full(4)
    published = publish(array, arena)
    view = read(published, arena)
    del published
    assert (array == 4).all()
    del array
    wait_until(lambda: figures().living == figures().idle // SIZE, "the chunk is given back")
    others = [full(number) for number in (5, 6)]
    assert (view == 4).all()
    assert drafts(arena) == 3 * SIZE
    del view
    gc.collect()
    wait_until(lambda: drafts(arena) == 2 * SIZE, "the block is freed")
    assert [other[0] for other in others] == [5, 6]


def test_a_part_of_less_than_half_is_copied(nursery: Nursery, arena: Arena) -> None:
    """A reader of a small part does not keep all of its array."""
    array = full(3)
    assert publish(array[: SIZE // 3], arena).copied == SIZE // 3
    assert figures().private == 0
    assert publish(array[SIZE // 4 :], arena).copied == 0
    assert publish(array[: SIZE // 3], arena).copied == 0, "now it lies in a block"


def test_views_of_one_array_share_its_block(nursery: Nursery, arena: Arena) -> None:
    """Overlapping parts of a value lie in one block."""
    array = full(3)
    published = publish([array, array[5:], array.reshape(2, -1)], arena)
    assert published.copied == 0
    assert (len(published.blocks), drafts(arena)) == (1, SIZE)


def test_a_view_of_the_owner_sees_its_writes(nursery: Nursery, arena: Arena) -> None:
    """All aliases of an array are the same memory before and after the publication."""
    array = full(3)
    alias = array[SIZE // 2 :]
    published = publish(array, arena)
    alias[-1] = 9
    assert array[-1] == 9
    assert read(published, arena)[-1] == 3
    assert publish(array, arena).copied == SIZE


def test_a_seal_that_fails_leaves_the_array_as_it_is(
    nursery: Nursery, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value is copied if need be, and sealed the next time."""
    array = full(3)

    def refuse(row: object) -> None:
        raise ArenaBusy("not now")

    with monkeypatch.context() as patch:
        patch.setattr(arena.allocator, "seal", refuse)
        assert not switch.seal(array.ctypes.data, array.nbytes)
    assert ATLAS.locate(array.ctypes.data, 1) is None
    assert own_drafts(arena) == SIZE
    assert publish(array, arena).copied == 0
    del array
    wait_until(lambda: figures().living == figures().idle // SIZE, "the chunk is given back")


def test_what_is_written_between_a_seal_and_its_publication_is_published(nursery: Nursery, arena: Arena) -> None:
    """A block that was not sealed by the publication itself is compared with the owner's pages."""
    sealed_before, private_before = full(1), full(1)
    assert switch.seal(sealed_before.ctypes.data, SIZE) is Sealed.NOW
    assert nursery._make_private(private_before.ctypes.data, SIZE)
    for array in (sealed_before, private_before):
        array[:5] = 2
        published = publish(array, arena)
        assert published.copied == SIZE
        assert (read(published, arena) == array).all()


def test_two_threads_seal_one_array_once(nursery: Nursery, arena: Arena) -> None:
    """Both find it sealed."""
    before = COUNTERS.snapshot()["born"]["count"]
    for _ in range(20):
        array, outcomes = full(1), []
        start = threading.Barrier(2)

        def seal(
            array: np.ndarray = array, outcomes: list[Sealed] = outcomes, start: threading.Barrier = start
        ) -> None:
            start.wait()
            outcomes.append(switch.seal(array.ctypes.data, array.nbytes))

        threads = [threading.Thread(target=seal) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == [Sealed.EARLIER, Sealed.NOW]
    assert COUNTERS.snapshot()["born"]["count"] == before + 20


def test_no_store_of_a_running_writer_is_lost_and_sealed_bytes_do_not_change(nursery: Nursery, arena: Arena) -> None:
    """A thread adds to an array without the GIL while the array is published."""
    for number in range(25):
        array = full(0)
        is_over, rounds = threading.Event(), []

        def write(array: np.ndarray = array, is_over: threading.Event = is_over, rounds: list[int] = rounds) -> None:
            for count in itertools.count(1):
                np.add(array, 1, out=array)
                rounds.append(count)
                if is_over.is_set():
                    return

        writer = threading.Thread(target=write)
        writer.start()
        wait_until(lambda rounds=rounds, number=number: len(rounds) > number % 5, "the writer is at work")
        published = publish(array, arena)
        view = read(published, arena).copy()
        is_over.set()
        writer.join()
        assert (array == rounds[-1] % 256).all(), "every page got every addition"
        assert (read(published, arena) == view).all()
        del array
        gc.collect()
        wait_until(lambda: figures().private <= 2 * SIZE, "chunks are given back")


@pytest.mark.parametrize("seed", range(4))
def test_a_random_program_is_as_with_ordinary_memory(nursery: Nursery, arena: Arena, seed: int) -> None:
    """Arrays, aliases, writes, publications, and the ends of all of these in any order."""
    random = np.random.default_rng(seed)
    arrays: list[tuple[np.ndarray, np.ndarray]] = []  # each with a copy in ordinary memory
    sealed: list[tuple[Published, np.ndarray]] = []

    def make() -> None:
        size = int(random.integers(100 * KIB, 3 * MIB))
        array = in_arena(random.integers, 0, 255, size, np.uint8)
        array = in_arena(np.array, array)
        arrays.append((array, np.array(array)))

    def write() -> None:
        array, other = arrays[int(random.integers(len(arrays)))]
        first, number = int(random.integers(len(array))), int(random.integers(255))
        array[first : first + 5000] = number
        other[first : first + 5000] = number

    def alias() -> None:
        array, other = arrays[int(random.integers(len(arrays)))]
        first = int(random.integers(len(array) - 1))
        arrays.append((array[first:], other[first:]))

    def share() -> None:
        array, other = arrays[int(random.integers(len(arrays)))]
        if len(array) > 2 * KIB:
            sealed.append((publish(array, arena), other.copy()))

    def drop() -> None:
        whose: list[Any] = arrays if random.random() < 0.5 and len(arrays) > 1 else sealed
        if whose:
            whose.pop(int(random.integers(len(whose))))

    make()
    for _ in range(150):
        random.choice([make, write, write, alias, share, share, drop, drop])()  # type: ignore[operator]
        while len(arrays) + len(sealed) > 14:
            drop()
        published, expected = sealed[-1] if sealed else (None, None)
        if published is not None:
            assert (read(published, arena) == expected).all()
    assert all((array == other).all() for array, other in arrays)
    assert all((read(published, arena) == expected).all() for published, expected in sealed)
    arrays.clear()
    sealed.clear()
