"""Large blocks lie in large pages if the kernel makes them; this changes only the time that an access takes."""

from __future__ import annotations

import ctypes
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from other_processes import Process, wait_until

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.block import Block
from dask_shm_plugin.linux import limits, pagemap, syscalls
from dask_shm_plugin.mapping import large_pages
from dask_shm_plugin.table.layout import BLOCKS_FROM
from dask_shm_plugin.units import LARGE, PAGE

CAPACITY = 64 << 20
#: A block of this size takes four large pages and a rest.
SIZE = 4 * LARGE + 3 * PAGE + 5

served = pytest.mark.skipif(
    not large_pages.are_served(), reason="this kernel makes no large pages, or does not report private copies of them"
)


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Create an arena that keeps all its pages; it must be empty at the end."""
    arena = Arena.create(CAPACITY, warm=CAPACITY)
    yield arena
    arena.holdings.tidy()
    assert arena.stats().used == 0
    arena.validate()
    arena.close()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the time limits, so that large pages are made however long this machine takes to find them."""
    monkeypatch.setattr(large_pages, "_GRACE_S", 60.0)
    monkeypatch.setattr(large_pages, "_TURN_S", 60.0)


def forget_what_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process test the kernel's support anew, and restore the result after the test."""
    monkeypatch.setattr(large_pages, "_are_served", False)
    monkeypatch.setattr(large_pages, "_tried_at", -large_pages._LONG_REST_S)


def data(size: int = SIZE, seed: int = 1) -> np.ndarray:
    """Return random bytes that depend on the seed."""
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def publish(arena: Arena, values: np.ndarray, offset: int = 0) -> Block:
    """Publish a block."""
    with arena.draft(offset + len(values)) as draft:
        draft.write(offset, values.data)
        return draft.seal()


def view_of(block: Block, size: int = SIZE, offset: int = 0) -> np.ndarray:
    """Return a view of a block."""
    return np.frombuffer(block.view(offset, size), np.uint8)


def mapped_large(array: np.ndarray) -> int:
    """Return how many bytes of the mapping under an array are mapped as large pages of shared memory."""
    return figure_of_mapping(array, "ShmemPmdMapped")


def figure_of_mapping(array: np.ndarray, name: str) -> int:
    """Return one of the kernel's figures, in bytes, of the mapping under an array."""
    entry = re.search(
        rf"^{array.ctypes.data // PAGE * PAGE:x}-.*?^{name}: *(\d+) kB",
        Path("/proc/self/smaps").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    assert entry is not None
    return int(entry[1]) << 10


def mapped_in(block: Block) -> int:
    """Return how many bytes of a new view are mapped as large pages after each of its pages was read."""
    view = view_of(block)
    view[::PAGE].sum()
    return mapped_large(view)


def faults_of_reading(array: np.ndarray) -> int:
    """Return the number of page faults while one element of each page is read."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    array[::PAGE].sum()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


@served
def test_a_large_block_lies_in_large_pages(arena: Arena) -> None:
    """Only the rest at its end does not; a reader causes a few page faults, not one for each small page."""
    values = data()
    with publish(arena, values) as block:
        view = view_of(block)
        assert faults_of_reading(view) < 4 * LARGE // PAGE // 16
        assert mapped_large(view) == 4 * LARGE
        np.testing.assert_array_equal(view, values)


@served
@pytest.mark.parametrize("offset", [PAGE, LARGE - 1, LARGE + 7])
def test_a_view_that_begins_within_a_large_page_is_mapped_in_large_pages(arena: Arena, offset: int) -> None:
    """The address of a mapping agrees with its offset, so each whole large page in it is mapped as such."""
    values = data()
    with publish(arena, values, offset) as block:
        view = view_of(block, offset=offset)
        np.testing.assert_array_equal(view, values)
        assert mapped_large(view) >= 2 * LARGE


@served
def test_small_writes_make_large_pages_too(arena: Arena) -> None:
    """A table of many columns is one block, and no single column need cover a large page."""
    values, step = data(), 300_000
    with arena.draft(SIZE) as draft:
        for start in range(0, SIZE, step):
            draft.write(start, values.data[start : start + step])
        with draft.seal() as block:
            view = view_of(block)
            np.testing.assert_array_equal(view, values)
            assert mapped_large(view) == 4 * LARGE


@served
def test_large_pages_take_no_more_memory_than_small_ones(arena: Arena) -> None:
    """The pages of a block take exactly its size."""
    before = arena.stats().resident
    with publish(arena, data()) as block:
        assert arena.stats().resident - before == block.size


def test_small_blocks_lie_in_small_pages(arena: Arena) -> None:
    """A block that covers no whole large page gets none, because the page would be larger than the block."""
    before = arena.stats().resident
    with publish(arena, data(LARGE - PAGE)) as block:
        view = view_of(block, LARGE - PAGE)
        view[::PAGE].sum()
        assert mapped_large(view) == 0
        assert arena.stats().resident - before == block.size


def test_a_write_to_a_view_copies_one_small_page(arena: Arena) -> None:
    """The rest of the large page, and the view of another reader, do not change."""
    values = data()
    with publish(arena, values) as block:
        mine, others = view_of(block), view_of(block)
        at = 2 * LARGE + 5 * PAGE + 1
        mine[::PAGE].sum()
        mine[at] ^= 0xFF
        assert mine[at] == values[at] ^ 0xFF
        mine[at] ^= 0xFF
        np.testing.assert_array_equal(mine, values)
        np.testing.assert_array_equal(others, values)
        start = mine.ctypes.data
        assert pagemap.is_written(start, SIZE)
        assert pagemap.is_written(start + at, 1)
        assert not pagemap.is_written(start, at // PAGE * PAGE)
        assert not pagemap.is_written(start + at // PAGE * PAGE + PAGE, SIZE - at - PAGE)
        assert not pagemap.is_written(others.ctypes.data, SIZE)


def test_reading_one_element_does_not_count_as_writing(arena: Arena) -> None:
    """The kernel has mapped a whole large page by then."""
    with publish(arena, data()) as block:
        view = view_of(block)
        view[LARGE]
        assert not pagemap.is_written(view.ctypes.data, SIZE)


@served
def test_touched_bytes_equal_the_kernels_count_of_shared_memory(arena: Arena) -> None:
    """Large pages that belong to the arena must not count as a worker's own memory."""
    with publish(arena, data()) as block:
        view = view_of(block)
        assert figure_of_mapping(view, "Rss") == 0
        view[LARGE]
        # Of this mapping alone: the housekeeping thread touches pages of the table at any moment.
        assert figure_of_mapping(view, "Rss") == LARGE
        assert pagemap.touched(view.ctypes.data, 4 * LARGE) == LARGE


@served
def test_a_new_block_in_part_of_a_large_page_is_independent_of_its_neighbours(arena: Arena) -> None:
    """The old bytes, other blocks and pages that were given back lie beside it."""
    publish(arena, data(8 * LARGE)).close()
    arena.holdings.tidy()
    sizes = [PAGE, LARGE // 2, LARGE + 5 * PAGE, 3 * PAGE, 2 * LARGE]
    blocks = [publish(arena, data(size, seed)) for seed, size in enumerate(sizes)]
    blocks.pop(1).close()
    del sizes[1]
    arena.holdings.tidy()
    arena.trimmer.trim_all()
    assert arena.segment.resident <= BLOCKS_FROM + arena.stats().used
    for seed, size, block in zip((0, 2, 3, 4), sizes, blocks, strict=True):
        np.testing.assert_array_equal(view_of(block, size), data(size, seed))
        block.close()


@served
def test_all_pages_are_given_back_to_the_system(arena: Arena) -> None:
    """They can be given back in parts that are no whole large pages, too."""
    before = arena.stats().resident
    publish(arena, data()).close()
    arena.holdings.tidy()
    publish(arena, data(LARGE // 2)).close()
    arena.holdings.tidy()
    arena.trimmer.warm = 0
    arena.trimmer._trim_to(LARGE + LARGE // 2)
    assert 0 < arena.stats().resident - before <= LARGE + LARGE // 2
    arena.trimmer.trim_all()
    assert arena.stats().resident == before


@served
def test_a_pinned_large_page_does_not_prevent_that_others_are_given_back(arena: Arena) -> None:
    """The kernel cannot split a page from which it still writes to a pipe, so the free part of that page stays."""
    before = arena.stats().resident
    low, top = publish(arena, data(4 * LARGE)), publish(arena, data(2 * LARGE))
    top.close()
    arena.holdings.tidy()
    with publish(arena, data(LARGE // 2)) as block:
        low.close()
        arena.holdings.tidy()
        view = view_of(block, LARGE // 2)
        reading, writing = os.pipe()
        part = (ctypes.c_size_t * 2)(view.ctypes.data, PAGE)
        assert ctypes.CDLL(None).vmsplice(writing, part, ctypes.c_size_t(1), 0) == PAGE
        arena.trimmer.trim_all()
        assert arena.stats().resident - before <= LARGE
        assert os.read(reading, PAGE) == data(LARGE // 2)[:PAGE].tobytes()
        os.close(reading)
        os.close(writing)
        arena.trimmer.trim_all()
        assert arena.stats().resident - before == LARGE // 2
        del view


def test_small_pages_are_used_if_the_kernel_makes_no_large_ones(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is not asked again and again, because the search for a large page may take long."""
    asked: list[int] = []

    def refuse(address: int, length: int) -> bool:
        asked.append(length)
        return False

    large_pages.are_served()
    monkeypatch.setattr(syscalls, "collapse", refuse)
    monkeypatch.setattr(large_pages, "_TURN_S", -1.0)
    values = data()
    for _ in range(3):
        with publish(arena, values) as block:
            view = view_of(block)
            view[::PAGE].sum()
            assert mapped_large(view) == 0
            np.testing.assert_array_equal(view, values)
            del view
        arena.holdings.tidy()
        arena.trimmer.trim_all()
    assert len(asked) <= 1


@served
def test_a_writer_that_would_have_to_wait_gets_small_pages_that_are_made_large_later(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages are replaced while they are in use, and no view changes, not even one that was written to."""
    values = data()
    with monkeypatch.context() as impatient:
        impatient.setattr(large_pages, "_GRACE_S", -1.0)
        impatient.setattr(large_pages, "_TURN_S", -1.0)  # not even by the housekeeping thread
        block = publish(arena, values)
        untouched, looking, writing = (view_of(block) for _ in range(3))
        looking[::PAGE].sum()
        writing[LARGE + 1] ^= 0xFF
        assert mapped_large(looking) == LARGE  # the first large page, which took too long
    wait_until(lambda: arena.pages.make_up() or mapped_in(block) == 4 * LARGE, "the pages are large")
    for view in (untouched, looking):
        np.testing.assert_array_equal(view, values)
        assert not pagemap.is_written(view.ctypes.data, SIZE)
    assert mapped_large(untouched) == 4 * LARGE
    assert pagemap.is_written(writing.ctypes.data, SIZE)
    writing[LARGE + 1] ^= 0xFF
    np.testing.assert_array_equal(writing, values)
    del untouched, looking, writing
    block.close()


@served
def test_pages_that_cannot_be_made_large_are_not_tried_all_the_time(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If memory is fragmented, the search for a large page is expensive."""
    asked: list[int] = []
    with monkeypatch.context() as refusing:
        refusing.setattr(syscalls, "collapse", lambda address, length: bool(asked.append(address)))
        block = publish(arena, data())
        assert arena.pages.are_behind or len(asked) > 1
        arena.pages.make_up()
        assert not arena.pages.are_behind
        arena.pages.make_up()
        assert len(asked) == 2
    block.close()


@served
def test_no_page_is_made_large_if_too_little_memory_is_left(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head-room is read once per turn and not per page, because most pages are large already."""
    asked: list[int] = []
    left = iter([0, 1 << 40])

    def head_room() -> int:
        asked.append(next(left))
        return asked[-1]

    large = large_pages.LargePages(arena.segment, arena.pages._window)
    with publish(arena, data()) as block:
        monkeypatch.setattr(limits, "head_room", head_room)
        large.make_later(BLOCKS_FROM + block._extent.offset, block.size, 0)
        large.make_up()
        assert len(large._small) == 4
        large.make_up()
        assert len(large._small) == 0
        large.make_up()
        monkeypatch.undo()
        assert asked == [0, 1 << 40]


@served
def test_two_threads_may_make_pages_large_at_the_same_time(arena: Arena) -> None:
    """One thread may find that the other has just taken the last page."""
    large = large_pages.LargePages(arena.segment, arena.pages._window)

    class Late:
        def __enter__(self) -> None:
            large._small.clear()

        def __exit__(self, *_: object) -> None:
            pass

    large.make_later(BLOCKS_FROM, LARGE, 0)
    large._lock = Late()  # type: ignore[assignment]
    large.make_up()


@served
def test_small_pages_that_were_given_back_are_not_made_large(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large page in their place would take memory that no block needs."""
    before = arena.stats().resident
    with monkeypatch.context() as impatient:
        impatient.setattr(large_pages, "_GRACE_S", -1.0)
        impatient.setattr(large_pages, "_TURN_S", -1.0)
        publish(arena, data()).close()
        arena.holdings.tidy()
        arena.trimmer.trim_all()
    arena.pages.make_up()
    assert arena.stats().resident == before


@served
def test_a_large_block_in_the_place_of_small_blocks_gets_large_pages(arena: Arena) -> None:
    """The small pages of the earlier blocks are replaced."""
    small = [publish(arena, data(LARGE // 2)) for _ in range(12)]
    for block in small:
        block.close()
    arena.holdings.tidy()
    values = data()
    with publish(arena, values) as block:
        wait_until(lambda: arena.pages.make_up() or mapped_in(block) == 4 * LARGE, "the pages are large")
        np.testing.assert_array_equal(view_of(block), values)


def test_no_large_pages_are_made_if_the_kernel_does_not_report_private_copies(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Linux 6.11, the page table shows large pages of a file as private ones."""
    written = pagemap.is_written
    monkeypatch.setattr(pagemap, "is_written", lambda address, length: length > PAGE or written(address, length))
    forget_what_is_served(monkeypatch)
    assert not large_pages.are_served()
    with publish(arena, data()) as block:
        view = view_of(block)
        np.testing.assert_array_equal(view, data())
        assert mapped_large(view) == 0


@served
def test_a_failed_test_of_the_kernels_support_is_repeated_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process may have had no free descriptor; but the test is not repeated for each value."""
    forget_what_is_served(monkeypatch)
    with monkeypatch.context() as without:
        tried: list[str] = []
        without.setattr(os, "memfd_create", lambda *args: tried.append("memfd") or os.open("/missing", 0))
        assert not large_pages.are_served()
        assert not large_pages.are_served()
        assert tried == ["memfd"]
    assert not large_pages.are_served()
    monkeypatch.setattr(large_pages, "_tried_at", large_pages._tried_at - 2 * large_pages._LONG_REST_S)
    assert large_pages.are_served()


@served
def test_other_processes_map_and_rewrite_large_pages(arena: Arena, joined: Callable[[], Process]) -> None:
    """A process reads the bytes of another one in large pages, and writes new ones where they are free."""
    other = joined()
    for seed in range(3):
        values = data(seed=seed)
        with publish(arena, values) as block:
            other("block = arena.attach_block(block)", block=block.descriptor)
            assert other("bytes(block.view(0, size))", size=SIZE) == values.tobytes()
        other("block.close(); arena.holdings.tidy()")
        arena.holdings.tidy()
        other("draft = arena.draft(len(values)); draft.write(0, memoryview(values))", values=values[::-1].tobytes())
        theirs = other("(block := draft.seal()).descriptor")
        with arena.attach_block(theirs) as block:
            np.testing.assert_array_equal(view_of(block), values[::-1])
        other("block.close(); arena.holdings.tidy()")


def test_large_pages_are_aligned_to_the_beginning_of_the_segment() -> None:
    """A part of the segment that covers no whole large page has none."""
    assert large_pages.within(0, LARGE) == (0, LARGE)
    assert large_pages.within(PAGE, LARGE) == (LARGE, LARGE)
    assert large_pages.within(PAGE, 2 * LARGE) == (LARGE, 2 * LARGE)
    assert BLOCKS_FROM % LARGE == 0
