"""The pages under an arena's blocks: they are made only where memory is left, for beyond that the kernel kills."""

from __future__ import annotations

from collections.abc import Callable

from dask_shm_plugin import limits
from dask_shm_plugin.exceptions import NoHeadRoom
from dask_shm_plugin.segment import Segment
from dask_shm_plugin.table import Extent

_AT_ONCE = 64 << 20
"""Bytes that are written before head-room is looked for again."""


class Pages:
    """What is written to the blocks of an arena, and read from them without a mapping.

    Parameters
    ----------
    segment
        Of the arena.
    blocks_from
        Where in the segment the blocks begin.
    make_room
        Gives so much warm memory back that a number of bytes more keep within the capacity.
    find_more
        Gives all warm memory that nobody needs back to the operating system.

    Notes
    -----
    Thread-safe: it keeps nothing. That an extent is a draft of this process is the caller's to know.
    """

    def __init__(
        self, segment: Segment, blocks_from: int, make_room: Callable[[int], None], find_more: Callable[[], None]
    ) -> None:
        self._segment, self._blocks_from = segment, blocks_from
        self._make_room, self._find_more = make_room, find_more

    def reserve(self, extent: Extent, offset: int, length: int) -> None:
        """Make pages of a draft exist.

        Raises
        ------
        NoHeadRoom, MemoryExhausted
            There is no memory for them.
        """
        start = self._blocks_from + extent.offset + offset
        self._find_head_room(start, length)
        self._segment.reserve(start, length)

    def write(self, extent: Extent, offset: int, data: memoryview) -> None:
        """Copy flat bytes into a draft.

        Raises
        ------
        NoHeadRoom, MemoryExhausted
            There is no memory for them.
        """
        start = self._blocks_from + extent.offset + offset
        self._find_head_room(start, len(data))
        for done in range(0, len(data), _AT_ONCE):
            part = data[done : done + _AT_ONCE]
            if done:
                # The others may have been writing meanwhile.
                self._find_head_room(start + done, len(part))
            self._segment.write(start + done, part)

    def read(self, extent: Extent, offset: int, length: int) -> memoryview:
        """Copy bytes of a block to which this process refers into private memory."""
        return self._segment.read(self._blocks_from + extent.offset + offset, length)

    def _find_head_room(self, start: int, length: int) -> None:
        missing = self._segment.missing(start, length)
        if not missing:
            return
        self._make_room(missing)
        if limits.head_room() < missing:
            self._find_more()
            if limits.head_room() < missing:
                raise NoHeadRoom(
                    f"the machine or its control group has less than {missing} bytes left; free memory or raise the limit"
                )
