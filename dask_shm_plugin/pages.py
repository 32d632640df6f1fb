"""The pages under an arena's blocks: they are made only where memory is left, for beyond that the kernel kills."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from dask_shm_plugin import limits
from dask_shm_plugin.access import Access
from dask_shm_plugin.budget import Budget
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import FileSizeLimited, LimitsReached, MemoryExhausted, NoHeadRoom
from dask_shm_plugin.largepages import LargePages
from dask_shm_plugin.layout import Extent
from dask_shm_plugin.segment import Segment, round_up
from dask_shm_plugin.syscalls import LARGE
from dask_shm_plugin.trimming import Trimmer
from dask_shm_plugin.window import Window

T = TypeVar("T")

_SMALLEST_IN_WINDOW = 64 << 10
_AT_ONCE = 64 << 20
"""Bytes of which pages are made before head-room is looked for again; a multiple of a large page."""


class Pages:
    """What is written to the blocks of an arena, and read from them without a mapping.

    Parameters
    ----------
    segment
        Of the arena.
    blocks_from
        Where in the segment the blocks begin.
    access
        To the table, which knows the drafts of every member, and when pages were given back.
    trimmer
        Gives back warm memory that nobody needs, to keep within the capacity and where pages are missing.
    budget
        What the workers of this node may use altogether.

    Notes
    -----
    Thread-safe. That an extent is a draft of this process is the caller's to know.

    Head-room is read, not reserved. So each writer demands room for its own next step *and* for the steps that the other
    writers may be in the middle of: they have looked before, when its pages were not there yet. Whoever begins later sees
    this draft in the table. There must never be a moment when two writers rely on the same room.
    """

    def __init__(self, segment: Segment, blocks_from: int, access: Access, trimmer: Trimmer, budget: Budget) -> None:
        self._segment, self._blocks_from, self._access = segment, blocks_from, access
        self._trimmer, self._budget = trimmer, budget
        self._window = Window(segment)
        self._large = LargePages(segment, self._window)

    def reserve(self, extent: Extent, offset: int, length: int) -> None:
        """Make pages of a draft exist.

        Raises
        ------
        NoHeadRoom, MemoryExhausted
            There is no memory for them.
        """
        for start, part in _steps(self._blocks_from + extent.offset + offset, length):
            self._make(extent, start, part, self._segment.reserve, part)

    @step("write")
    def write(self, extent: Extent, offset: int, data: memoryview, keep: Callable[[], object] = lambda: None) -> None:
        """Copy flat bytes into a draft, which lives at least as long as what ``keep`` returns.

        Raises
        ------
        NoHeadRoom, MemoryExhausted
            There is no memory for them.
        """
        begin = self._blocks_from + extent.offset + offset
        for start, length in _steps(begin, len(data)):
            part = data[start - begin : start - begin + length]
            if not self._write_in_place(extent, start, part, keep):
                self._make(extent, start, length, self._segment.write, part)

    def read(self, extent: Extent, offset: int, length: int) -> memoryview:
        """Copy bytes of a block to which this process refers into private memory."""
        return self._segment.read(self._blocks_from + extent.offset + offset, length)

    def close(self) -> None:
        """Let go of what writing needs, as soon as nobody writes."""
        self._window.close()

    def _write_in_place(self, extent: Extent, start: int, data: memoryview, keep: Callable[[], object]) -> bool:
        """Write where all pages exist, or large ones can be made; return False elsewhere. Nobody gives back a draft's pages."""
        length = len(data)
        if length < _SMALLEST_IN_WINDOW:
            return False
        # Asked for before it is looked: what was given back since is looked for again.
        trims = self._access.table.trims
        if not self._window.knows(start, length, trims):
            if not (self._window.sees(start, length) or self._has_pages(extent, start, length)):
                return False
            self._window.learn(start, length, trims)
        self._window.write(start, data, keep)
        return True

    def make_later(self, extent: Extent) -> None:
        """Take note of a block, the pages of which may be small."""
        if extent.length >= LARGE:
            self._large.make_later(self._blocks_from + extent.offset, extent.length, self._access.table.trims)

    @property
    def are_behind(self) -> bool:
        """Whether some had to be small that could be large."""
        return self._large.are_behind

    def make_up(self) -> None:
        """Make pages large that had to be small, for a bounded time."""
        self._large.make_up()

    def _has_pages(self, extent: Extent, start: int, length: int) -> bool:
        """Tell whether all pages of a part of a draft exist, or could be made large, and are mapped now."""
        is_there = not self._segment.missing(start, length) or self._make_large(extent, start, length)
        return is_there and self._window.fill(start, length)

    def _make_large(self, extent: Extent, start: int, length: int) -> bool:
        """Make the pages of a part of a draft, and those beside it with which they are large; return False if they are not."""
        begin, end = self._blocks_from + extent.offset, self._blocks_from + extent.offset + extent.length
        first = max(begin, start // LARGE * LARGE)
        last = min(end, round_up(start + length, LARGE))
        self._find_room(extent, first, last - first)
        try:
            return self._large.make(first, last - first)
        except MemoryExhausted:
            return False

    def _make(self, extent: Extent, start: int, length: int, how: Callable[[int, T], None], what: T) -> None:
        """Do a step that makes pages; before giving up, give back warm memory, whose pages may be those that are missing."""
        self._find_room(extent, start, length)
        try:
            how(start, what)
        except FileSizeLimited:
            raise
        except MemoryExhausted:
            self._trimmer.trim_all()
            how(start, what)

    def _find_room(self, extent: Extent, start: int, length: int) -> None:
        missing = self._segment.missing(start, length)
        if not missing:
            return
        self._trimmer.make_room(missing)
        is_beyond = self._budget.use(self._trimmer.pages() + missing) > 1
        if is_beyond or not self._is_room(missing, extent):
            self._trimmer.trim_all()
            if is_beyond and self._budget.use(self._trimmer.pages() + missing) > 1:
                raise LimitsReached(
                    "the workers of this node use as much memory, shared values included, as their limits allow altogether; "
                    "release results, or raise memory_limit"
                )
            if not self._is_room(missing, extent):
                raise NoHeadRoom(
                    f"the machine or its control group has less than {missing} bytes left; free memory or raise the limit"
                )

    def _is_room(self, missing: int, extent: Extent) -> bool:
        others = [(int(at), int(length)) for at, length in self._access.table.blocks.drafts() if at != extent.offset]
        # Asking the kernel how far each has come may have to wait for it: only where it matters.
        at_most = sum(min(length, _AT_ONCE) for _, length in others)
        # The room is always read last: pages that others make meanwhile are then counted twice, and not never.
        if limits.head_room() >= missing + at_most:
            return True
        steps = sum(min(self._segment.missing(self._blocks_from + at, length), _AT_ONCE) for at, length in others)
        return limits.head_room() >= missing + steps


def _steps(start: int, length: int) -> Iterator[tuple[int, int]]:
    """Split a part of a segment so that no large page lies in two steps: yield where each begins, and its length."""
    end = start + length
    while start < end:
        step_end = min(end, (start // _AT_ONCE + 1) * _AT_ONCE)
        yield start, step_end - start
        start = step_end
