"""Trimming: giving the pages of freed memory back to the operating system.

Drafts and blocks and the private memory of the workers take together as many bytes as they took at most within the last
seconds (the high-water mark), or fewer. The difference may stay resident as free pages. They are given back when they, or
a new page, exceed it by more than 8 MiB. So a node has hardly more memory than its work has needed recently, and an idle
arena has no free page.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from dask_shm_plugin.arena.allocator import Allocator
from dask_shm_plugin.arena.budget import NEAR, Budget
from dask_shm_plugin.arena.guard import GuardedTable
from dask_shm_plugin.exceptions import MemoryExhausted
from dask_shm_plugin.linux import limits
from dask_shm_plugin.linux.segment import Segment
from dask_shm_plugin.table import placement
from dask_shm_plugin.table.layout import Extent
from dask_shm_plugin.table.table import Table
from dask_shm_plugin.units import round_up

_STEP_BYTES = 64 << 20
_SLACK_BYTES = 8 << 20
"""Bytes by which pages may exceed the high-water mark before free pages are looked for and given back."""
_TRIM_TIME_S = 0.2
"""Seconds for which a draft waits until free pages have been given back to the operating system."""


class Trimmer:
    """Gives free pages of one arena back to the operating system.

    Parameters
    ----------
    allocator
        Reserves the extents whose pages are given back, as drafts.
    segment
        The segment of the arena.
    access
        The guarded table of the arena.
    blocks_from
        Where in the segment the blocks begin, in bytes.
    budget
        The sum of the memory limits of this node's workers.
    warm
        Seconds for which freed memory stays resident at least, unless memory runs short; it stays for twice as long at
        most.

    Notes
    -----
    Thread-safe. A hole is punched only in an extent that is reserved as a draft. There must never be a moment when
    another writer could reserve that extent.
    """

    def __init__(
        self,
        allocator: Allocator,
        segment: Segment,
        access: GuardedTable,
        blocks_from: int,
        budget: Budget,
        warm: float,
    ) -> None:
        self._allocator, self._segment, self._access = allocator, segment, access
        self._blocks_from, self._budget, self.warm = blocks_from, budget, warm
        self._is_refused = False

    def trim(self) -> None:
        """Give free pages back whose bytes were not needed recently; all of them if the node or its workers run short."""
        table, most = self._access.table, self._most_needed()
        # Processes forget which parts are mapped whenever pages were given back, which is not worth it for a few pages.
        spare = max(0, min(self._allowed(most) + _SLACK_BYTES, table.capacity - _held(table)))
        is_short = most and (limits.head_room() < spare or self._budget.use(self.pages()) > NEAR)
        self._trim_to(spare if most and not is_short else 0)

    def trim_all(self) -> None:
        """Give all free pages back to the operating system."""
        self._trim_to(0)

    def make_room(self, missing: int) -> None:
        """Give free pages back if ``missing`` more bytes of pages would exceed the high-water mark or the capacity.

        Raises
        ------
        MemoryExhausted
            The pages would exceed the capacity, and the kernel takes no pages back.
        """
        capacity, pages = self._access.table.capacity, self.pages() + missing
        allowed = self._allowed(self._most_needed())
        if pages > min(_held(self._access.table) + allowed + _SLACK_BYTES, capacity):
            self._trim_to(allowed - missing)
            if self._is_refused and pages > capacity:
                raise MemoryExhausted(
                    "this kernel or sandbox takes no pages back (fallocate with FALLOC_FL_PUNCH_HOLE), and there are "
                    "pages for the whole capacity; raise shm.capacity"
                )

    def pages(self) -> int:
        """Return the resident bytes of the segment outside the table: those of blocks, free space and directories."""
        return self._segment.resident - self._access.table.reserved_bytes()

    def wait(self) -> None:
        """Wait until no process is giving pages back, for ``_TRIM_TIME_S`` seconds at most."""
        until = time.monotonic() + _TRIM_TIME_S
        while self._access.table.blocks.is_trimmed() and time.monotonic() < until:
            time.sleep(0.001)

    def _most_needed(self) -> int:
        return self._access.table.most_needed(time.monotonic(), self.warm)

    def _allowed(self, most: int) -> int:
        """Return the bytes that free pages may have: as many as are needed less now than at the high-water mark."""
        table = self._access.table
        return max(0, most - _held(table) - table.members.private())

    def give_back(self, extents: list[Extent]) -> None:
        """Give the pages of some extents back, as far as these are free; also pages that were reserved and never written.

        To :meth:`trim`, which looks for data, such pages are holes. A writer that is killed leaves them. The extents are
        taken out of the list, to which another thread may add meanwhile.
        """
        while extents:
            extent = extents.pop()
            hold = self._allocator.take_if_free(extent)
            if hold is not None:
                with contextlib.suppress(OSError):
                    self._segment.give_back(self._blocks_from + extent.offset, extent.length)
                del hold
                self._allocator.abandon()

    def _trim_to(self, spare: int) -> None:
        stuck: dict[int, int] = {}
        while (
            not self._is_refused
            and (extent := find(self._segment, self._access.table, self._blocks_from, spare, stuck)) is not None
        ):
            hold = self._allocator.take_if_free(extent)
            if hold is None:
                return
            begin, length = self._blocks_from + extent.offset, extent.length
            try:
                self._segment.give_back(begin, length)
                # A pinned large page cannot be split, so its free part stays resident. It must not be found again.
                first = self._segment.first_page(begin, length)
                if first is not None:
                    stuck[first] = begin + length
            except OSError:
                self._is_refused = True
            finally:
                del hold
                self._allocator.abandon()


def _held(table: Table) -> int:
    """Return the bytes of pages that drafts and blocks have, or are to have."""
    return int(np.sum(np.minimum(table.blocks.taken_by_now()[:, 1], np.uint64(table.span)))) - table.members.bare()


def find(
    segment: Segment, table: Table, blocks_from: int, spare: int, stuck: Mapping[int, int] = MappingProxyType({})
) -> Extent | None:
    """Return a free extent with pages to give back, or None; the highest first, because blocks are placed low.

    It takes no mutex, because the kernel may let a query wait for a writer. The caller must make sure that the extent
    is still free.

    Parameters
    ----------
    segment, table
        The segment and the table of one arena.
    blocks_from
        Where in the segment the blocks begin, in bytes.
    spare
        Bytes of free pages to keep. Negative to make room for the pages of drafts that are not written yet.
    stuck
        Parts of the segment that could not be given back: maps the offset of each to its end, in bytes.
    """
    # A row that is damaged or being changed may hold any number, so numbers are bounded to prevent an overflow. The
    # extent is checked again under the mutex.
    taken = np.minimum(table.blocks.taken_by_now(), np.uint64(table.span))
    # Too low while drafts are written, so this test is skipped when everything is to be given back (``spare`` is zero).
    free = segment.resident - table.reserved_bytes() - _held(table)
    if spare and free <= spare:
        return None
    at_most = min(_STEP_BYTES, round_up(free - spare)) if spare else _STEP_BYTES
    for offset, length in placement.gaps(taken, table.span)[::-1]:
        end = blocks_from + int(offset + length)
        first = segment.first_page(end - int(length), int(length))
        while first is not None and first in stuck:
            first = segment.first_page(stuck[first], end - stuck[first])
        if first is not None:
            return Extent(first - blocks_from, min(end - first, at_most))
    return None
