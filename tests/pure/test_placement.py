"""A block goes into the tightest gap that holds it, and of equals into the lowest."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_shm_plugin.placement import gaps, place

PAGE = 4096


def taken_of(*parts: tuple[int, int]) -> np.ndarray:
    """Return parts in use as the table gives them."""
    return np.array(parts, dtype=np.uint64).reshape(-1, 2)


@st.composite
def arenas(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Draw parts in use, in any order, and the capacity of an arena that holds them; also full and empty ones."""
    page = draw(st.sampled_from([1, PAGE]))
    runs = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=12))
    parts, offset = [], 0
    for is_taken, pages in runs:
        if is_taken:
            parts.append((offset * page, pages * page))
        offset += pages
    return taken_of(*draw(st.permutations(parts))), offset * page


def bytewise(taken: np.ndarray, capacity: int) -> list[tuple[int, int]]:
    """Find the gaps in the plainest way: look at each byte."""
    used = np.zeros(capacity + 2, dtype=bool)
    used[[0, -1]] = True
    for offset, length in taken.tolist():
        used[1 + offset : 1 + offset + length] = True
    edges = np.flatnonzero(used[1:] != used[:-1]).tolist()
    return [(start, end - start) for start, end in zip(edges[::2], edges[1::2], strict=True)]


@given(arenas())
def test_gaps_are_what_is_not_taken(arena: tuple[np.ndarray, int]) -> None:
    """Every free byte lies in exactly one gap, by offset, and no gap is empty or touches the next."""
    assert [tuple(gap) for gap in gaps(*arena).tolist()] == bytewise(*arena)


@given(arenas())
def test_gaps_do_not_depend_on_the_order_of_the_rows(arena: tuple[np.ndarray, int]) -> None:
    """The table has no order."""
    taken, capacity = arena
    np.testing.assert_array_equal(gaps(taken, capacity), gaps(taken[::-1], capacity))


@given(arenas(), st.integers(1, 12), st.sampled_from([1, PAGE]))
def test_a_place_is_the_tightest_gap_and_of_equals_the_lowest(
    arena: tuple[np.ndarray, int], units: int, unit: int
) -> None:
    """There is a place if and only if a gap is long enough, and it is the beginning of the best of these."""
    length = units * unit
    fitting = [(size, offset) for offset, size in bytewise(*arena) if size >= length]
    assert place(*arena, length) == (min(fitting)[1] if fitting else None)


@given(arenas(), st.integers(1, 12))
def test_a_place_overlaps_nothing_and_lies_inside(arena: tuple[np.ndarray, int], pages: int) -> None:
    """What is placed can be entered beside all others."""
    taken, capacity = arena
    offset = place(taken, capacity, pages)
    if offset is not None:
        parts = sorted([*taken.tolist(), [offset, pages]])
        assert all(start + length <= following for (start, length), (following, _) in pairwise(parts))
        assert offset >= 0
        assert offset + pages <= capacity


@given(arenas())
def test_an_arena_can_be_filled_to_the_last_page(arena: tuple[np.ndarray, int]) -> None:
    """Placing single pages ends when, and only when, none is free; each goes to a place of its own."""
    taken, capacity = arena
    unit = PAGE if capacity % PAGE == 0 and not np.any(taken % PAGE) else 1
    free = sum(length for _, length in bytewise(taken, capacity)) // unit
    for left in reversed(range(free)):
        offset = place(taken, capacity, unit)
        assert offset is not None, f"{left + 1} pages are still free"
        taken = np.concatenate((taken, taken_of((offset, unit))))
    assert place(taken, capacity, 1) is None


def test_an_empty_arena_is_one_gap() -> None:
    """The first block goes to the beginning."""
    assert gaps(taken_of(), 8 * PAGE).tolist() == [[0, 8 * PAGE]]
    assert place(taken_of(), 8 * PAGE, 8 * PAGE) == 0
    assert place(taken_of(), 8 * PAGE, 8 * PAGE + 1) is None


def test_freed_space_is_used_again_before_untouched_space() -> None:
    """A gap between blocks is tighter than the rest of the arena, and warm."""
    taken = taken_of((0, 2 * PAGE), (4 * PAGE, 2 * PAGE))
    assert place(taken, 1 << 40, PAGE) == 2 * PAGE


def test_offsets_beyond_four_gib_are_exact() -> None:
    """Arenas may be as large as memory."""
    assert place(taken_of((0, 1 << 45)), (1 << 45) + PAGE, PAGE) == 1 << 45


@pytest.mark.parametrize("length", [1, PAGE])
def test_an_offset_is_a_plain_integer(length: int) -> None:
    """It goes into struct, mmap and memoryview, which want no NumPy scalars."""
    assert type(place(taken_of(), PAGE, length)) is int
