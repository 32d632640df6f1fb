"""The allocator of an arena: it reserves, seals and gives up drafts."""

from __future__ import annotations

import contextlib
import time

from dask_shm_plugin.arena.guard import GuardedTable
from dask_shm_plugin.arena.holdings import Holdings
from dask_shm_plugin.arena.references import Hold
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import ArenaUnavailable, StaleBlock
from dask_shm_plugin.table.blocks import TRIMMING
from dask_shm_plugin.table.free_space import FreeSpace
from dask_shm_plugin.table.layout import BlockId, Extent
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.table.state_word import SEALED
from dask_shm_plugin.table.table import Table


class Allocator:
    """Reserves space in an arena for one of its members.

    Parameters
    ----------
    access
        The guarded table of the arena.
    holdings
        The references of this process; a draft counts as one of them.
    member
        This process.
    warm
        Length of one period of the high-water mark, in seconds; see :meth:`Table.note_use`.

    Attributes
    ----------
    is_closing
        Whether :meth:`reserve` refuses because the process is leaving the arena; read under the mutex.
    parts
        Several arenas divide the capacity into so many parts, and this one may take one of them.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, access: GuardedTable, holdings: Holdings, member: Member, warm: float) -> None:
        self._access, self._holdings, self._member, self._warm = access, holdings, member, warm
        self._free_space = FreeSpace()
        self.is_closing = False
        self.parts = 1

    def reserve(self, hold: Hold, length: int, size: int, *, stays_warm: bool = True) -> Extent | None:
        """Enter a draft in the table and return its extent, or return None if the arena has no room for it.

        Parameters
        ----------
        hold
            Becomes the reference to the draft.
        length
            Bytes of the draft, a multiple of the page size.
        size
            Bytes of the draft that will be used.
        stays_warm
            Whether its pages count among those that stay resident for a while after it is released.

        Raises
        ------
        ArenaUnavailable
            The process is leaving the arena.
        TableFull
            All rows of the table are taken.
        """

        def reserve(table: Table) -> Extent | None:
            if self.is_closing:
                raise ArenaUnavailable("this process is leaving the arena")
            room = self._free_space.room(table)
            use = table.capacity - room.left + length
            offset = room.place(length) if use <= table.capacity // self.parts else None
            if offset is None:
                return None
            extent = Extent(offset, length)
            if stays_warm:
                table.note_use(use, time.monotonic(), self._warm)
            self._take(table, hold, extent, size)
            return extent

        return self._access.run(reserve)

    @step("shorten")
    def shorten(self, hold: Hold, extent: Extent, length: int, rest: Hold) -> Extent:
        """Give the end of a draft of this process back; return the place of the rest, a draft to which ``rest`` refers.

        The caller makes sure that this process does not write to the end any more, and keeps ``rest`` from before the
        call: an interrupt may come after it.

        Raises
        ------
        TableFull
            All rows of the table are taken: the draft is as before.
        """
        left = Extent(extent.offset, length)

        def shorten(table: Table) -> None:
            # The drafts overlap for a moment. If this process is killed then, both are reclaimed.
            self._take(table, rest, left, length)
            if self._holdings.references.remove(hold.note):
                table.release(hold.row, self._member)

        self._access.run(shorten)
        return left

    def take_if_free(self, extent: Extent) -> Hold | None:
        """Reserve an extent as a draft that is never written, so that its pages can be given back; None if not free."""
        hold = Hold()

        def take(table: Table) -> bool:
            if not self._free_space.room(table).has(*extent):
                return False
            table.count_trim()
            self._take(table, hold, extent, TRIMMING)
            return True

        return hold if self._access.run(take) else None

    def count_trim(self) -> None:
        """Let all members look again which pages exist: some that this process has in a draft are gone."""
        self._access.run(lambda table: table.count_trim())

    def seal(self, row: BlockId) -> None:
        """Turn a draft of this process into a sealed block that this process refers to."""
        self._access.run(lambda table: table.seal(row, self._member))

    def is_sealed(self, row: BlockId) -> bool:
        """Tell whether a row to which this process refers is a sealed block."""

        def look(table: Table) -> bool:
            with contextlib.suppress(StaleBlock):
                return bool(table.blocks.demand(row, SEALED))
            return False

        return self._access.run(look)

    @step("abandon")
    def abandon(self) -> None:
        """Release the drafts that have lost their hold: now, or soon if the table is locked for too long."""
        self._holdings.tidy()

    def holders(self, row: BlockId) -> int:
        """Return how many members refer to a block now; takes no mutex."""
        return self._access.table.holders(row.index)

    def _take(self, table: Table, hold: Hold, extent: Extent, size: int) -> None:
        row = table.reserve(extent, size, self._member, time.monotonic())
        # A draft counts as a reference: the process must not leave the arena while one of its threads writes the draft.
        self._holdings.references.add(row, hold)
