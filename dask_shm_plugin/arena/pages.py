"""The pages of an arena's blocks: made only while memory is left, because beyond that the kernel kills processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from dask_shm_plugin.arena.budget import Budget
from dask_shm_plugin.arena.guard import GuardedTable
from dask_shm_plugin.arena.trimming import Trimmer
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import FileSizeLimited, LimitsReached, MemoryExhausted, NoHeadRoom
from dask_shm_plugin.linux import limits, turns
from dask_shm_plugin.linux.segment import Segment
from dask_shm_plugin.mapping.large_pages import LargePages
from dask_shm_plugin.mapping.shared import WriteMapping
from dask_shm_plugin.table.layout import Extent
from dask_shm_plugin.units import LARGE, round_up

T = TypeVar("T")

_MIN_MAPPED_BYTES = 64 << 10
_STEP_BYTES = 64 << 20
"""Bytes of pages that are made before the head-room is checked again; a multiple of the size of a large page."""

_PLENTY_BYTES = 1 << 30
"""Head-room (bytes) from which writers of several arenas cannot exhaust it together within one step each."""


class Pages:
    """Writes the drafts of an arena, makes their pages, and reads blocks without a mapping.

    Parameters
    ----------
    segment
        The segment of the arena.
    blocks_from
        Where in the segment the blocks begin, in bytes.
    access
        The guarded table; it contains the drafts of all members and counts how often pages were given back.
    trimmer
        Gives free pages back, so that the arena keeps within its capacity, and if memory for new pages is missing.
    budget
        The sum of the memory limits of this node's workers.

    Notes
    -----
    Thread-safe. The caller must make sure that an extent is a draft of this process.

    Head-room is read, not reserved. So each writer demands room for its own next step *and* for the next step of every
    other draft: their writers may have read the head-room before the pages of this step existed. A writer that begins
    later finds this draft in the table. There must never be a moment when two writers rely on the same room.
    """

    def __init__(
        self, segment: Segment, blocks_from: int, access: GuardedTable, trimmer: Trimmer, budget: Budget
    ) -> None:
        self._segment, self._blocks_from, self._access = segment, blocks_from, access
        self._trimmer, self._budget = trimmer, budget
        self._window = WriteMapping(segment)
        self._large = LargePages(segment, self._window)

    def reserve(self, extent: Extent, offset: int, length: int) -> None:
        """Make pages of a draft exist.

        Parameters
        ----------
        extent
            The draft.
        offset, length
            The part of the draft, in bytes.

        Raises
        ------
        NoHeadRoom, MemoryExhausted, LimitsReached
            There is no memory for the pages.
        """
        for start, part in _steps(self._blocks_from + extent.offset + offset, length):
            self._make(extent, start, part, self._segment.reserve, part)

    @step("write")
    def write(self, extent: Extent, offset: int, data: memoryview, keep: Callable[[], object] = lambda: None) -> None:
        """Copy flat bytes into a draft.

        Parameters
        ----------
        extent
            The draft.
        offset
            Where the bytes go, in bytes from the beginning of the draft.
        data
            The bytes.
        keep
            Returns an object that keeps the draft alive; each thread that helps to copy holds it until it is done.

        Raises
        ------
        NoHeadRoom, MemoryExhausted, LimitsReached
            There is no memory for the pages.
        """
        begin = self._blocks_from + extent.offset + offset
        for start, length in _steps(begin, len(data)):
            part = data[start - begin : start - begin + length]
            if not self._write_in_place(extent, start, part, keep):
                self._make(extent, start, length, self._segment.write, part)

    def read(self, extent: Extent, offset: int, length: int) -> memoryview:
        """Copy bytes of a block into private memory; this process must refer to the block."""
        return self._segment.read(self._blocks_from + extent.offset + offset, length)

    def make(self, extent: Extent) -> None:
        """Make all pages of a draft exist, large ones where these can be had.

        Raises
        ------
        NoHeadRoom, MemoryExhausted, LimitsReached
            There is no memory for the pages.
        """
        for start, length in _steps(self._blocks_from + extent.offset, extent.length):
            if self._segment.missing(start, length) and not self._make_large(extent, start, length):
                self._make(extent, start, length, self._segment.reserve, length)

    def bytes_of(self, extent: Extent) -> npt.NDArray[np.uint8]:
        """Return the bytes of a draft in the write mapping; none may be touched before :meth:`lay_open`.

        Raises
        ------
        MappingRefused
            This process cannot map the arena.
        """
        return self._window.part(self._blocks_from + extent.offset, extent.length)

    def lay_open(self, extent: Extent, offset: int, length: int) -> None:
        """Make all pages of a part of a draft exist in the write mapping, so that it can be written in place.

        Parameters
        ----------
        extent
            The draft.
        offset, length
            The part of the draft, in bytes, aligned to pages.

        Raises
        ------
        NoHeadRoom, MemoryExhausted, LimitsReached
            There is no memory for the pages.
        """
        begin = self._blocks_from + extent.offset + offset
        for start, part in _steps(begin, length):
            trims = self._access.table.trims  # read first, as in `_write_in_place`
            if self._window.knows(start, part, trims):
                continue
            if not (self._window.sees(start, part) or self._has_pages(extent, start, part)):
                self._make(extent, start, part, self._segment.reserve, part)
                if not self._window.fill(start, part):
                    continue
            self._window.learn(start, part, trims)

    def look_at(self, extent: Extent, length: int) -> npt.NDArray[np.uint8]:
        """Return the first ``length`` bytes of a block in the write mapping; the caller holds the block, and only reads.

        Raises
        ------
        MappingRefused
            This process cannot map the arena.
        """
        begin, trims = self._blocks_from + extent.offset, self._access.table.trims
        part = self._window.part(begin, length)
        # Filled at once, the page table of a block costs less than a fault for every few pages.
        if not self._window.knows(begin, extent.length, trims) and self._window.fill(begin, extent.length):
            self._window.learn(begin, extent.length, trims)
        return part

    def close(self) -> None:
        """Unmap the write mapping and end its threads, as soon as no thread writes."""
        self._window.close()

    def _write_in_place(self, extent: Extent, start: int, data: memoryview, keep: Callable[[], object]) -> bool:
        """Write through the mapping if all pages exist or can be made large, and return whether that was possible.

        No process gives back the pages of a draft, so pages that were found stay until the bytes are written.
        """
        length = len(data)
        if length < _MIN_MAPPED_BYTES:
            return False
        # Read before the pages are looked at. If pages are given back in between, the old number makes sure that this
        # part is looked at again the next time.
        trims = self._access.table.trims
        if not self._window.knows(start, length, trims):
            if not (self._window.sees(start, length) or self._has_pages(extent, start, length)):
                return False
            self._window.learn(start, length, trims)
        self._window.write(start, data, keep)
        return True

    def make_later(self, extent: Extent) -> None:
        """Note that a block may have small pages, which :meth:`make_up` can replace by large ones."""
        if extent.length >= LARGE:
            self._large.make_later(self._blocks_from + extent.offset, extent.length, self._access.table.trims)

    @property
    def are_behind(self) -> bool:
        """Whether there are small pages that could be made large."""
        return self._large.are_behind

    def make_up(self) -> None:
        """Replace small pages by large ones, for a bounded time."""
        self._large.make_up()

    def _has_pages(self, extent: Extent, start: int, length: int) -> bool:
        """Make missing pages of a part of a draft, if they can be large, and map all; return whether all are mapped."""
        is_there = not self._segment.missing(start, length) or self._make_large(extent, start, length)
        return is_there and self._window.fill(start, length)

    def _make_large(self, extent: Extent, start: int, length: int) -> bool:
        """Make the pages of a part of a draft, rounded out to large pages; return whether all large ones were made."""
        begin, end = self._blocks_from + extent.offset, self._blocks_from + extent.offset + extent.length
        first = max(begin, start // LARGE * LARGE)
        last = min(end, round_up(start + length, LARGE))
        with self._room(extent, first, last - first):
            try:
                return self._large.make(first, last - first)
            except MemoryExhausted:
                return False

    def _make(self, extent: Extent, start: int, length: int, how: Callable[[int, T], None], what: T) -> None:
        """Make the pages of one step by ``how``; if memory is exhausted, give all free pages back and try again."""
        with self._room(extent, start, length):
            try:
                how(start, what)
            except FileSizeLimited:
                raise
            except MemoryExhausted:
                self._trimmer.trim_all()
                how(start, what)

    @contextlib.contextmanager
    def _room(self, extent: Extent, start: int, length: int) -> Iterator[None]:
        """Insist on head-room for the missing pages of one step; where it is scarce, let no other arena take it."""
        if self._find_room(extent, start, length) >= _PLENTY_BYTES:
            yield
            return
        with turns.one_at_a_time():
            self._find_room(extent, start, length)
            yield

    def _find_room(self, extent: Extent, start: int, length: int) -> int:
        """Insist on room for the missing pages of one step; return how many bytes would be left after it, at least."""
        missing = self._segment.missing(start, length)
        if not missing:
            return _PLENTY_BYTES
        self._trimmer.make_room(missing)
        is_beyond = self._budget.use(self._trimmer.pages() + missing) > 1
        left = self._left_after(missing, extent)
        if is_beyond or left < 0:
            self._trimmer.trim_all()
            if is_beyond and self._budget.use(self._trimmer.pages() + missing) > 1:
                raise LimitsReached(
                    "the workers of this node use as much memory, shared values included, as their limits allow "
                    "altogether; release results, or raise memory_limit"
                )
            left = self._left_after(missing, extent)
            if left < 0:
                raise NoHeadRoom(
                    f"the machine or its control group has less than {missing} bytes left; "
                    "free memory or raise the limit"
                )
        return left

    def _left_after(self, missing: int, extent: Extent) -> int:
        others = [(int(at), int(length)) for at, length in self._access.table.blocks.drafts() if at != extent.offset]
        # An upper bound first: the kernel may let a query for the missing pages of a draft wait for its writer.
        at_most = sum(min(length, _STEP_BYTES) for _, length in others)
        # The head-room is always read last: pages that other writers make meanwhile then count twice, not zero times.
        left = limits.head_room() - missing - at_most
        if left >= 0:
            return left
        steps = sum(min(self._segment.missing(self._blocks_from + at, length), _STEP_BYTES) for at, length in others)
        return limits.head_room() - missing - steps


def _steps(start: int, length: int) -> Iterator[tuple[int, int]]:
    """Split a part of a segment into steps and yield the offset and length of each; no large page is in two steps."""
    end = start + length
    while start < end:
        step_end = min(end, (start // _STEP_BYTES + 1) * _STEP_BYTES)
        yield start, step_end - start
        start = step_end
