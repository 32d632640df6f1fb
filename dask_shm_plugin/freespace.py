"""Where there is room: what the table says, kept as long as nobody else has changed it.

Free space is computed from the rows of the table, so that a death leaves nothing to repair. With ten thousand blocks that
takes as long as to copy some megabytes. So a process keeps what it has computed, follows its own changes, and computes anew
when the table's change counter says that there were others.
"""

from __future__ import annotations

from collections.abc import Sequence

from dask_shm_plugin.layout import SPREAD, Extent
from dask_shm_plugin.placement import Room
from dask_shm_plugin.table import Table


class FreeSpace:
    """The free space of one table, for those who hold the arena's mutex."""

    def __init__(self) -> None:
        self._room: Room | None = None
        self._changes = 0

    def place(self, table: Table, length: int) -> int | None:
        """Return the offset for a block of ``length`` bytes, or None where there is no room.

        Raises
        ------
        TableCorrupt
            A row does not say what was written there.
        """
        table.insist_all_sound()
        return self._up_to_date(table).place(length)

    def has(self, table: Table, extent: Extent) -> bool:
        """Tell whether nobody has anything of an extent."""
        table.insist_all_sound()
        return self._up_to_date(table).has(*extent)

    def note_taken(self, table: Table, extent: Extent) -> None:
        """Follow a reservation that was just made."""
        room = self._room_before(table, 1)
        if room is not None:
            room.take(*extent)

    def note_freed(self, table: Table, extents: Sequence[Extent]) -> None:
        """Follow what was just freed, all of it."""
        room = self._room_before(table, len(extents))
        if room is not None:
            for extent in extents:
                room.give(*extent)

    def _room_before(self, table: Table, changes: int) -> Room | None:
        """Return what is known of the state some changes ago, to be brought to the present one."""
        if table.changes != self._changes + changes:
            self._room = None
        self._changes = table.changes
        return self._room

    def _up_to_date(self, table: Table) -> Room:
        if self._room is None or table.changes != self._changes:
            self._room, self._changes = Room(table.taken_by_now(), table.capacity, SPREAD), table.changes
        return self._room
