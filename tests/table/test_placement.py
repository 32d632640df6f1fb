"""A block goes into the lowest gap that is long enough, and no capacity is lost to gaps between blocks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_shm_plugin.table.layout import SPREAD
from dask_shm_plugin.table.placement import Room, gaps

PAGE = 4096


def taken_of(*parts: tuple[int, int]) -> np.ndarray:
    """Return parts in use in the form in which the table gives them."""
    return np.array(parts, dtype=np.uint64).reshape(-1, 2)


@st.composite
def arenas(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Draw the parts in use of an arena, in any order, and its capacity; the arena may be full or empty."""
    page = draw(st.sampled_from([1, PAGE]))
    runs = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=12))
    parts, offset = [], 0
    for is_taken, pages in runs:
        if is_taken:
            parts.append((offset * page, pages * page))
        offset += pages
    return taken_of(*draw(st.permutations(parts))), offset * page


def bytewise(taken: np.ndarray, capacity: int) -> list[tuple[int, int]]:
    """Find the gaps in the simplest way, by a look at each byte."""
    used = np.zeros(capacity + 2, dtype=bool)
    used[[0, -1]] = True
    for offset, length in taken.tolist():
        used[1 + offset : 1 + offset + length] = True
    edges = np.flatnonzero(used[1:] != used[:-1]).tolist()
    return [(start, end - start) for start, end in zip(edges[::2], edges[1::2], strict=True)]


@given(arenas())
def test_each_free_byte_lies_in_exactly_one_gap(arena: tuple[np.ndarray, int]) -> None:
    """Gaps are sorted by offset, and no gap is empty or touches the next."""
    assert [tuple(gap) for gap in gaps(*arena).tolist()] == bytewise(*arena)


@given(arenas())
def test_gaps_do_not_depend_on_the_order_of_the_rows(arena: tuple[np.ndarray, int]) -> None:
    """The rows of the table are not sorted by offset."""
    taken, capacity = arena
    np.testing.assert_array_equal(gaps(taken, capacity), gaps(taken[::-1], capacity))


@given(arenas(), st.integers(1, 12), st.sampled_from([1, PAGE]))
def test_a_block_goes_to_the_beginning_of_the_lowest_gap_that_is_long_enough(
    arena: tuple[np.ndarray, int], units: int, unit: int
) -> None:
    """There is a place if and only if some gap is long enough."""
    length = units * unit
    fitting = [offset for offset, size in bytewise(*arena) if size >= length]
    assert Room(*arena).place(length) == (fitting[0] if fitting else None)


@given(arenas(), st.integers(1, 12), st.integers(2, 4))
def test_a_larger_span_of_offsets_does_not_raise_the_capacity(
    arena: tuple[np.ndarray, int], length: int, spread: int
) -> None:
    """There is always a gap for as many bytes as are left of the capacity, and never for more."""
    taken, capacity = arena
    offset = Room(taken, capacity, spread).place(length)
    if length > capacity - int(taken[:, 1].sum()):
        assert offset is None
    else:
        lowest = [start for start, size in bytewise(taken, spread * capacity) if size >= length]
        assert offset == lowest[0]


@given(arenas(), st.integers(1, 12))
def test_a_place_overlaps_nothing_and_lies_inside(arena: tuple[np.ndarray, int], pages: int) -> None:
    """A block at the returned offset can be added to the table."""
    taken, capacity = arena
    offset = Room(taken, capacity).place(pages)
    if offset is not None:
        parts = sorted([*taken.tolist(), [offset, pages]])
        assert all(start + length <= following for (start, length), (following, _) in pairwise(parts))
        assert offset >= 0
        assert offset + pages <= capacity


@given(arenas())
def test_an_arena_can_be_filled_to_the_last_page(arena: tuple[np.ndarray, int]) -> None:
    """Placing single pages fails when, and only when, none is free, and each page gets a place of its own."""
    taken, capacity = arena
    unit = PAGE if capacity % PAGE == 0 and not np.any(taken % PAGE) else 1
    free = sum(length for _, length in bytewise(taken, capacity)) // unit
    for left in reversed(range(free)):
        offset = Room(taken, capacity).place(unit)
        assert offset is not None, f"{left + 1} pages are still free"
        taken = np.concatenate((taken, taken_of((offset, unit))))
    assert Room(taken, capacity).place(1) is None


def test_an_empty_arena_is_one_gap() -> None:
    """The first block goes to the beginning."""
    assert gaps(taken_of(), 8 * PAGE).tolist() == [[0, 8 * PAGE]]
    assert Room(taken_of(), 8 * PAGE).place(8 * PAGE) == 0
    assert Room(taken_of(), 8 * PAGE).place(8 * PAGE + 1) is None


def test_freed_space_is_reused_before_untouched_space() -> None:
    """A gap between blocks lies lower than the untouched rest of the arena, and is warm."""
    taken = taken_of((0, 2 * PAGE), (4 * PAGE, 2 * PAGE))
    assert Room(taken, 1 << 40).place(PAGE) == 2 * PAGE


def test_offsets_beyond_four_gib_are_exact() -> None:
    """An arena may be as large as the memory of the machine."""
    assert Room(taken_of((0, 1 << 45)), (1 << 45) + PAGE).place(PAGE) == 1 << 45


@pytest.mark.parametrize("length", [1, PAGE])
def test_an_offset_is_a_plain_integer(length: int) -> None:
    """The offset is passed to struct, mmap and memoryview, which expect no NumPy scalars."""
    assert type(Room(taken_of(), PAGE).place(length)) is int


def mixed_load(seed: int, capacity: int) -> list[tuple[bool, int, int]]:
    """Return a sequence of reservations and releases: blocks from 64 KiB to 1 GiB with random lifetimes.

    Each item is (whether it is a reservation, number of the block, bytes). All blocks together would take about a fifth
    more than the capacity.
    """
    random, count = np.random.default_rng(seed), 1000
    sizes = np.exp(random.uniform(np.log(64 << 10), np.log(1 << 30), count)).astype(np.int64) // PAGE * PAGE
    begins = np.cumsum(random.exponential(1, count))
    ends = begins + random.exponential(1.2 * capacity / sizes.mean(), count)
    order = np.argsort(np.concatenate((begins, ends))).tolist()
    return [(at < count, at % count, int(sizes[at % count])) for at in order]


def lowest_gap(taken: np.ndarray, capacity: int, length: int, spread: int) -> int | None:
    """Place a block in the lowest gap."""
    return Room(taken, capacity, spread).place(length)


def worst_fit(taken: np.ndarray, capacity: int, length: int, spread: int) -> int | None:
    """Place a block in the largest gap, with no bound but the last offset."""
    free = gaps(taken, capacity)
    offset, size = free[np.argmax(free[:, 1])].tolist() if len(free) else (0, 0)
    return offset if size >= length else None


def usable(load: list[tuple[bool, int, int]], capacity: int, placing: Callable[..., int | None], spread: int) -> float:
    """Return the smallest fraction of the capacity, blocks and request together, at which a request was refused."""
    blocks: dict[int, tuple[int, int]] = {}
    least = 1.0
    for is_wanted, number, size in load:
        if not is_wanted:
            blocks.pop(number, None)
            continue
        offset = placing(taken_of(*blocks.values()), capacity, size, spread)
        if offset is None:
            least = min(least, (sum(length for _, length in blocks.values()) + size) / capacity)
        else:
            blocks[number] = (offset, size)
    return least


@pytest.mark.parametrize("seed", range(3))
def test_a_mixed_load_leaves_the_whole_capacity_usable(seed: int) -> None:
    """With more offsets than bytes, only a lack of capacity refuses a block of up to an eighth of the capacity."""
    capacity = 8 << 30
    load = mixed_load(seed, capacity)
    assert usable(load, capacity, lowest_gap, SPREAD) == 1
    assert usable(load, capacity, worst_fit, 1) < 0.6, "this load does not show that worst fit is a bad placement"
    assert usable(load, capacity, lowest_gap, 1) < 0.8, (
        "this load does not show that the lowest gap needs more offsets than bytes"
    )


@given(arenas(), st.lists(st.tuples(st.integers(0, 12), st.integers(1, 3)), max_size=12))
def test_a_room_that_is_updated_equals_a_room_that_is_computed_anew(
    arena: tuple[np.ndarray, int], steps: list[tuple[int, int]]
) -> None:
    """Any sequence of parts taken and given back leads to the same places."""
    taken, capacity = arena
    parts = [tuple(part) for part in taken.tolist()]
    room = Room(taken, capacity, 2)
    for which, length in steps:
        offset = room.place(length)
        if which < len(parts):
            room.give(*parts.pop(which))
        elif offset is not None:
            assert room.has(offset, length)
            room.take(offset, length)
            assert not room.has(offset, length)
            parts.append((offset, length))
        anew = Room(taken_of(*parts), capacity, 2)
        for size in (1, 2, 5, capacity or 1):
            assert room.place(size) == anew.place(size)


def test_a_part_is_free_only_if_all_of_it_is() -> None:
    """The first and the last byte of the part count as well."""
    room = Room(taken_of((2, 3), (9, 1)), 20)
    free = [(offset, length) for offset in range(20) for length in (1, 2, 4) if room.has(offset, length)]
    used = {2, 3, 4, 9}
    assert free == [
        (offset, length)
        for offset in range(20)
        for length in (1, 2, 4)
        if offset + length <= 20 and not used & set(range(offset, offset + length))
    ]
