"""The pages under an arena's blocks: they are made only where memory is left, for beyond that the kernel kills."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dask_shm_plugin import limits
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import FileSizeLimited, MemoryExhausted, NoHeadRoom
from dask_shm_plugin.layout import Extent
from dask_shm_plugin.segment import Segment
from dask_shm_plugin.table import Table
from dask_shm_plugin.trimming import Trimmer
from dask_shm_plugin.window import Window

T = TypeVar("T")

_SMALLEST_IN_WINDOW = 64 << 10
_AT_ONCE = 64 << 20
"""Bytes of which pages are made before head-room is looked for again."""


class Pages:
    """What is written to the blocks of an arena, and read from them without a mapping.

    Parameters
    ----------
    segment
        Of the arena.
    blocks_from
        Where in the segment the blocks begin.
    table
        Returns the table, which knows the drafts of every member, and when pages were given back.
    trimmer
        Gives back warm memory that nobody needs, to keep within the capacity and where pages are missing.

    Notes
    -----
    Thread-safe. That an extent is a draft of this process is the caller's to know.

    Head-room is read, not reserved. So each writer demands room for its own next step *and* for the steps that the other
    writers may be in the middle of: they have looked before, when its pages were not there yet. Whoever begins later sees
    this draft in the table. There must never be a moment when two writers rely on the same room.
    """

    def __init__(
        self,
        segment: Segment,
        blocks_from: int,
        table: Callable[[], Table],
        trimmer: Trimmer,
    ) -> None:
        self._segment, self._blocks_from, self._table = segment, blocks_from, table
        self._trimmer = trimmer
        self._window = Window(segment)

    def reserve(self, extent: Extent, offset: int, length: int) -> None:
        """Make pages of a draft exist.

        Raises
        ------
        NoHeadRoom, MemoryExhausted
            There is no memory for them.
        """
        for done in range(0, length, _AT_ONCE):
            part = min(_AT_ONCE, length - done)
            self._make(extent, offset + done, part, self._segment.reserve, part)

    @step("write")
    def write(self, extent: Extent, offset: int, data: memoryview) -> None:
        """Copy flat bytes into a draft.

        Raises
        ------
        NoHeadRoom, MemoryExhausted
            There is no memory for them.
        """
        for done in range(0, len(data), _AT_ONCE):
            part = data[done : done + _AT_ONCE]
            if not self._write_warm(self._blocks_from + extent.offset + offset + done, part):
                self._make(extent, offset + done, len(part), self._segment.write, part)

    def read(self, extent: Extent, offset: int, length: int) -> memoryview:
        """Copy bytes of a block to which this process refers into private memory."""
        return self._segment.read(self._blocks_from + extent.offset + offset, length)

    def close(self) -> None:
        """Let go of what writing needs, as soon as nobody writes."""
        self._window.close()

    def _write_warm(self, start: int, data: memoryview) -> bool:
        """Write where all pages exist; return False where they do not. Nobody gives back pages under a draft."""
        length = len(data)
        if length < _SMALLEST_IN_WINDOW:
            return False
        # Asked for before it is looked: what was given back since is looked for again.
        trims = self._table().trims
        if not self._window.knows(start, length, trims):
            if not self._window.sees(start, length) and (
                self._segment.missing(start, length) or not self._window.fill(start, length)
            ):
                return False
            self._window.learn(start, length, trims)
        self._window.write(start, data)
        return True

    def _make(self, extent: Extent, offset: int, length: int, how: Callable[[int, T], None], what: T) -> None:
        """Do a step that makes pages; before giving up, give back warm memory, whose pages may be those that are missing."""
        start = self._blocks_from + extent.offset + offset
        missing = self._segment.missing(start, length)
        if missing:
            self._trimmer.make_room(missing)
        if missing and not self._is_room(missing, extent):
            self._trimmer.trim_all()
            if not self._is_room(missing, extent):
                raise NoHeadRoom(
                    f"the machine or its control group has less than {missing} bytes left; free memory or raise the limit"
                )
        try:
            how(start, what)
        except FileSizeLimited:
            raise
        except MemoryExhausted:
            self._trimmer.trim_all()
            how(start, what)

    def _is_room(self, missing: int, extent: Extent) -> bool:
        others = [(int(at), int(length)) for at, length in self._table().drafts() if at != extent.offset]
        # Asking the kernel how far each has come may have to wait for it: only where it matters.
        at_most = sum(min(length, _AT_ONCE) for _, length in others)
        # The room is always read last: pages that others make meanwhile are then counted twice, and not never.
        if limits.head_room() >= missing + at_most:
            return True
        steps = sum(min(self._segment.missing(self._blocks_from + at, length), _AT_ONCE) for at, length in others)
        return limits.head_room() >= missing + steps
