"""Which freed memory goes back to the operating system.

What stays resident is what drafts and blocks take now, or have taken at most within the last seconds. A new page that would be
more than that takes the place of a free one. So an arena never has more pages than it has recently used, and an idle one has
no free page.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np

from dask_shm_plugin import limits, placement
from dask_shm_plugin.access import Access
from dask_shm_plugin.budget import NEAR, Budget
from dask_shm_plugin.exceptions import MemoryExhausted
from dask_shm_plugin.layout import Extent
from dask_shm_plugin.references import Hold
from dask_shm_plugin.segment import Segment, round_up
from dask_shm_plugin.table import Table

_STEP = 64 << 20
_SLACK = 8 << 20
"""Bytes beyond the high-water mark from which free pages are looked for while others are made: a small block is not worth it."""
_TAKES = 0.2
"""Seconds for which a draft waits for what others are giving back to the system."""


class Trimmed(Protocol):
    """What trimming wants of an arena."""

    def take_if_free(self, extent: Extent) -> Hold | None:
        """Make a part of the arena a draft that nobody will write."""

    def abandon(self) -> None:
        """Give drafts up that nothing holds any more."""


class Trimmer:
    """Gives memory of one arena back.

    Parameters
    ----------
    arena
        Takes the parts to give back as drafts.
    segment
        Of the arena.
    access
        To its table.
    blocks_from
        Where in the segment the blocks begin.
    budget
        What the workers of this node may use altogether.
    warm
        Seconds for which, at least, freed memory stays resident; up to twice as long.

    Notes
    -----
    Thread-safe. Holes are punched under a draft: there must never be a moment when somebody else could reserve that place.
    """

    def __init__(
        self, arena: Trimmed, segment: Segment, access: Access, blocks_from: int, budget: Budget, warm: float
    ) -> None:
        self._arena, self._segment, self._access = arena, segment, access
        self._blocks_from, self._budget, self.warm = blocks_from, budget, warm
        self._is_refused = False

    def trim(self) -> None:
        """Return freed memory that was not needed of late; all of it where the machine or its workers run short."""
        spare = max(0, self._most_used() - self._used())
        is_short = spare and (limits.head_room() < spare or self._budget.use(self.pages()) > NEAR)
        self._trim_to(0 if is_short else spare)

    def trim_all(self) -> None:
        """Return all freed memory to the operating system."""
        self._trim_to(0)

    def make_room(self, missing: int) -> None:
        """Return so much freed memory that ``missing`` more bytes of pages are not more than the high-water mark.

        Raises
        ------
        MemoryExhausted
            The kernel takes no pages back.
        """
        capacity, used, most = self._access.table.capacity, self._used(), self._most_used()
        pages = self.pages() + missing
        if pages > min(max(used, most) + _SLACK, capacity):
            self._trim_to(max(used, most) - used - missing)
            if self._is_refused and pages > capacity:
                raise MemoryExhausted(
                    "this kernel or sandbox takes no pages back (fallocate with FALLOC_FL_PUNCH_HOLE), and there are pages "
                    "for the whole capacity; raise shm.capacity"
                )

    def pages(self) -> int:
        """Return the bytes of pages that there are for blocks."""
        return self._segment.resident - self._access.table.reserved_bytes()

    def wait(self) -> None:
        """Wait, for a bounded time, until nobody gives pages back."""
        until = time.monotonic() + _TAKES
        while self._access.table.blocks.is_trimmed() and time.monotonic() < until:
            time.sleep(0.001)

    def _most_used(self) -> int:
        table = self._access.table
        return min(table.most_used(time.monotonic(), self.warm), table.capacity)

    def _used(self) -> int:
        return int(np.sum(self._access.table.blocks.taken_by_now()[:, 1]))

    def _trim_to(self, spare: int) -> None:
        stuck: dict[int, int] = {}
        while (
            not self._is_refused
            and (extent := find(self._segment, self._access.table, self._blocks_from, spare, stuck)) is not None
        ):
            hold = self._arena.take_if_free(extent)
            if hold is None:
                return
            begin, length = self._blocks_from + extent.offset, extent.length
            try:
                self._segment.give_back(begin, length)
                # A large page that somebody has pinned cannot be split: what is free of it is still there.
                first = self._segment.first_page(begin, length)
                if first is not None:
                    stuck[first] = begin + length
            except OSError:
                self._is_refused = True
            finally:
                del hold
                self._arena.abandon()


def find(
    segment: Segment, table: Table, blocks_from: int, spare: int, stuck: Mapping[int, int] = MappingProxyType({})
) -> Extent | None:
    """Find a part to give back, or None; the highest first, because blocks are placed low.

    Needs no mutex, for asking the kernel may have to wait for those who write. The caller must make sure that what is
    found is still free.

    Parameters
    ----------
    segment, table
        Of one arena.
    blocks_from
        Where in the segment the blocks begin.
    spare
        Bytes of free memory that stay. Less than none, where drafts that are not written yet shall find room.
    stuck
        Where in the segment parts begin that could not be given back, and where they end.
    """
    # What is found is looked at again under the mutex; here, no odd number shall be too large to count with.
    taken = np.minimum(table.blocks.taken_by_now(), np.uint64(table.span))
    # Less than there is, while drafts are written: where all shall go, it is not asked.
    free = segment.resident - table.reserved_bytes() - int(np.sum(taken[:, 1]))
    if spare and free <= spare:
        return None
    at_most = min(_STEP, round_up(free - spare)) if spare else _STEP
    for offset, length in placement.gaps(taken, table.span)[::-1]:
        end = blocks_from + int(offset + length)
        first = segment.first_page(end - int(length), int(length))
        while first is not None and first in stuck:
            first = segment.first_page(stuck[first], end - stuck[first])
        if first is not None:
            return Extent(first - blocks_from, min(end - first, at_most))
    return None
