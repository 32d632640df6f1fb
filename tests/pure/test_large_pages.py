"""Large pages under large blocks: where a kernel makes them, nobody can tell but by the time it takes."""

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

from dask_shm_plugin import largepages, limits, syscalls, views
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.block import Block
from dask_shm_plugin.layout import BLOCKS_FROM
from dask_shm_plugin.segment import PAGE
from dask_shm_plugin.syscalls import LARGE

CAPACITY = 64 << 20
#: Three large pages and something on both sides.
SIZE = 4 * LARGE + 3 * PAGE + 5

served = pytest.mark.skipif(
    not largepages.are_served(), reason="this kernel makes no large pages, or tells nothing of them"
)


@pytest.fixture
def arena() -> Iterator[Arena]:
    """An arena that keeps all its pages, and must be empty in the end."""
    arena = Arena.create(CAPACITY, warm=CAPACITY)
    yield arena
    arena.holdings.tidy()
    assert arena.stats().used == 0
    arena.validate()
    arena.close()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long this machine takes to find large pages, they are waited for."""
    monkeypatch.setattr(largepages, "_GRACE", 60.0)
    monkeypatch.setattr(largepages, "_EACH_TIME", 60.0)


def forget_what_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process find out anew, and know again what it knew when the test is over."""
    monkeypatch.setattr(largepages, "_are_served", False)
    monkeypatch.setattr(largepages, "_tried_at", -largepages._LONG_REST)


def data(size: int = SIZE, seed: int = 1) -> np.ndarray:
    """Return bytes that no other seed makes."""
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def publish(arena: Arena, values: np.ndarray, offset: int = 0) -> Block:
    """Write a block."""
    with arena.draft(offset + len(values)) as draft:
        draft.write(offset, values.data)
        return draft.seal()


def seen(block: Block, size: int = SIZE, offset: int = 0) -> np.ndarray:
    """Return a view of a block."""
    return np.frombuffer(block.view(offset, size), np.uint8)


def mapped_large(array: np.ndarray) -> int:
    """Return how many bytes of the mapping under an array are mapped as large pages of shared memory."""
    entry = re.search(
        rf"^{array.ctypes.data // PAGE * PAGE:x}-.*?^ShmemPmdMapped: *(\d+) kB",
        Path("/proc/self/smaps").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    assert entry is not None
    return int(entry[1]) << 10


def mapped_in(block: Block) -> int:
    """Return how many bytes of a view that is made now are mapped as large pages when it was read."""
    view = seen(block)
    view[::PAGE].sum()
    return mapped_large(view)


def faults_of_reading(array: np.ndarray) -> int:
    """Return how often the kernel had to be asked while one element of each page was read."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    array[::PAGE].sum()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


@served
def test_a_large_block_lies_in_large_pages(arena: Arena) -> None:
    """All but what is left over at its end; its reader asks the kernel a few times, not once for each page."""
    values = data()
    with publish(arena, values) as block:
        view = seen(block)
        assert faults_of_reading(view) < 4 * LARGE // PAGE // 16
        assert mapped_large(view) == 4 * LARGE
        np.testing.assert_array_equal(view, values)


@served
@pytest.mark.parametrize("offset", [PAGE, LARGE - 1, LARGE + 7])
def test_a_part_that_begins_anywhere_is_mapped_in_large_pages(arena: Arena, offset: int) -> None:
    """A mapping agrees with its offset, so that all large pages that it takes as a whole are mapped as such."""
    values = data()
    with publish(arena, values, offset) as block:
        view = seen(block, offset=offset)
        np.testing.assert_array_equal(view, values)
        assert mapped_large(view) >= 2 * LARGE


@served
def test_many_small_writes_make_large_pages_too(arena: Arena) -> None:
    """A table of many columns is one block; none of its columns need take a large page of its own."""
    values, step = data(), 300_000
    with arena.draft(SIZE) as draft:
        for start in range(0, SIZE, step):
            draft.write(start, values.data[start : start + step])
        with draft.seal() as block:
            view = seen(block)
            np.testing.assert_array_equal(view, values)
            assert mapped_large(view) == 4 * LARGE


@served
def test_large_pages_take_no_memory_that_small_ones_would_not(arena: Arena) -> None:
    """Neither beside a block nor where it is over."""
    before = arena.stats().resident
    with publish(arena, data()) as block:
        assert arena.stats().resident - before == block.size


def test_small_blocks_lie_in_small_pages(arena: Arena) -> None:
    """What takes no large page as a whole gets none: it would be larger than the block."""
    before = arena.stats().resident
    with publish(arena, data(LARGE - PAGE)) as block:
        view = seen(block, LARGE - PAGE)
        view[::PAGE].sum()
        assert mapped_large(view) == 0
        assert arena.stats().resident - before == block.size


def test_what_a_reader_writes_stays_with_it(arena: Arena) -> None:
    """One page of a large one is copied; the rest, and what others see, is as it was."""
    values = data()
    with publish(arena, values) as block:
        mine, others = seen(block), seen(block)
        at = 2 * LARGE + 5 * PAGE + 1
        mine[::PAGE].sum()
        mine[at] ^= 0xFF
        assert mine[at] == values[at] ^ 0xFF
        mine[at] ^= 0xFF
        np.testing.assert_array_equal(mine, values)
        np.testing.assert_array_equal(others, values)
        start = mine.ctypes.data
        assert views.is_written(start, SIZE)
        assert views.is_written(start + at, 1)
        assert not views.is_written(start, at // PAGE * PAGE)
        assert not views.is_written(start + at // PAGE * PAGE + PAGE, SIZE - at - PAGE)
        assert not views.is_written(others.ctypes.data, SIZE)


def test_who_has_looked_at_one_element_has_written_nothing(arena: Arena) -> None:
    """The kernel has mapped a whole large page by then."""
    with publish(arena, data()) as block:
        view = seen(block)
        view[LARGE]
        assert not views.is_written(view.ctypes.data, SIZE)


@served
def test_what_is_counted_as_touched_is_what_the_kernel_counts(arena: Arena) -> None:
    """A worker is not to be blamed for large pages that belong to the arena."""

    def shared() -> int:
        return int(re.search(r"RssShmem:\s*(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]

    with publish(arena, data()) as block:
        view = seen(block)
        before = shared()
        view[LARGE]
        assert shared() - before == LARGE
        assert views.touched(view.ctypes.data, 4 * LARGE) == LARGE


@served
def test_the_next_block_in_a_part_of_a_large_page_is_its_own(arena: Arena) -> None:
    """Whatever lies beside it: the old values, other blocks, pages that were given back."""
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
        np.testing.assert_array_equal(seen(block, size), data(size, seed))
        block.close()


@served
def test_all_pages_go_back_to_the_system(arena: Arena) -> None:
    """In parts that are no large pages, too."""
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
def test_a_page_that_somebody_has_pinned_keeps_nothing_else_from_being_given_back(arena: Arena) -> None:
    """It cannot be split while the kernel still writes from it to a pipe, so what is free of it stays."""
    before = arena.stats().resident
    low, top = publish(arena, data(4 * LARGE)), publish(arena, data(2 * LARGE))
    top.close()
    arena.holdings.tidy()
    with publish(arena, data(LARGE // 2)) as block:
        low.close()
        arena.holdings.tidy()
        view = seen(block, LARGE // 2)
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


def test_where_the_kernel_has_none_small_ones_do(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is not asked again and again: to look for one may take it some time."""
    asked: list[int] = []

    def refuse(address: int, length: int) -> bool:
        asked.append(length)
        return False

    largepages.are_served()
    monkeypatch.setattr(syscalls, "collapse", refuse)
    monkeypatch.setattr(largepages, "_EACH_TIME", -1.0)
    values = data()
    for _ in range(3):
        with publish(arena, values) as block:
            view = seen(block)
            view[::PAGE].sum()
            assert mapped_large(view) == 0
            np.testing.assert_array_equal(view, values)
            del view
        arena.holdings.tidy()
        arena.trimmer.trim_all()
    assert len(asked) <= 1


@served
def test_who_would_have_to_wait_gets_small_pages_which_are_made_large_later(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While they are in use: all views see what they saw, and what one has written stays its own."""
    values = data()
    with monkeypatch.context() as impatient:
        impatient.setattr(largepages, "_GRACE", -1.0)
        impatient.setattr(largepages, "_EACH_TIME", -1.0)  # not even by the tidying thread
        block = publish(arena, values)
        untouched, looking, writing = (seen(block) for _ in range(3))
        looking[::PAGE].sum()
        writing[LARGE + 1] ^= 0xFF
        assert mapped_large(looking) == LARGE  # the one by which it was found out
    wait_until(lambda: arena.pages.make_up() or mapped_in(block) == 4 * LARGE, "the pages are large")
    for view in (untouched, looking):
        np.testing.assert_array_equal(view, values)
        assert not views.is_written(view.ctypes.data, SIZE)
    assert mapped_large(untouched) == 4 * LARGE
    assert views.is_written(writing.ctypes.data, SIZE)
    writing[LARGE + 1] ^= 0xFF
    np.testing.assert_array_equal(writing, values)
    del untouched, looking, writing
    block.close()


@served
def test_what_cannot_be_made_up_for_is_not_tried_all_the_time(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is fragmented, to look for a large page is work."""
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
def test_where_too_little_memory_is_left_nothing_is_made_up_for(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for once each time, not at each page: most of them are large already."""
    asked: list[int] = []
    left = iter([0, 1 << 40])

    def head_room() -> int:
        asked.append(next(left))
        return asked[-1]

    large = largepages.LargePages(arena.segment, arena.pages._window)
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
def test_two_threads_may_make_up_at_once(arena: Arena) -> None:
    """One may find that the other has just taken what was left."""
    large = largepages.LargePages(arena.segment, arena.pages._window)

    class Late:
        def __enter__(self) -> None:
            large._small.clear()

        def __exit__(self, *_: object) -> None:
            pass

    large.make_later(BLOCKS_FROM, LARGE, 0)
    large._lock = Late()  # type: ignore[assignment]
    large.make_up()


@served
def test_small_pages_that_were_given_back_are_not_made_anew(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """To make them large later would take memory that nobody wants."""
    before = arena.stats().resident
    with monkeypatch.context() as impatient:
        impatient.setattr(largepages, "_GRACE", -1.0)
        impatient.setattr(largepages, "_EACH_TIME", -1.0)
        publish(arena, data()).close()
        arena.holdings.tidy()
        arena.trimmer.trim_all()
    arena.pages.make_up()
    assert arena.stats().resident == before


@served
def test_a_large_block_in_the_place_of_small_ones_gets_large_pages(arena: Arena) -> None:
    """Whoever came first."""
    small = [publish(arena, data(LARGE // 2)) for _ in range(12)]
    for block in small:
        block.close()
    arena.holdings.tidy()
    values = data()
    with publish(arena, values) as block:
        wait_until(lambda: arena.pages.make_up() or mapped_in(block) == 4 * LARGE, "the pages are large")
        np.testing.assert_array_equal(seen(block), values)


def test_a_kernel_that_does_not_tell_what_was_written_is_not_asked(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Linux 6.11, large pages of a file look like a process's own."""
    written = views.is_written
    monkeypatch.setattr(views, "is_written", lambda address, length: length > PAGE or written(address, length))
    forget_what_is_served(monkeypatch)
    assert not largepages.are_served()
    with publish(arena, data()) as block:
        view = seen(block)
        np.testing.assert_array_equal(view, data())
        assert mapped_large(view) == 0


@served
def test_what_failed_at_first_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have had no descriptor left, or there was no large page just then; but not at each value."""
    forget_what_is_served(monkeypatch)
    with monkeypatch.context() as without:
        tried: list[str] = []
        without.setattr(os, "memfd_create", lambda *args: tried.append("memfd") or os.open("/missing", 0))
        assert not largepages.are_served()
        assert not largepages.are_served()
        assert tried == ["memfd"]
    assert not largepages.are_served()
    monkeypatch.setattr(largepages, "_tried_at", largepages._tried_at - 2 * largepages._LONG_REST)
    assert largepages.are_served()


@served
def test_other_processes_map_and_rewrite_large_pages(arena: Arena, joined: Callable[[], Process]) -> None:
    """What one has written in them, another reads; and writes anew, where they are free."""
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
            np.testing.assert_array_equal(seen(block), values[::-1])
        other("block.close(); arena.holdings.tidy()")


def test_a_draft_without_a_whole_large_page_has_none() -> None:
    """Where the parts begin and end is counted from the segment's beginning."""
    assert largepages.within(0, LARGE) == (0, LARGE)
    assert largepages.within(PAGE, LARGE) == (LARGE, LARGE)
    assert largepages.within(PAGE, 2 * LARGE) == (LARGE, 2 * LARGE)
    assert BLOCKS_FROM % LARGE == 0
