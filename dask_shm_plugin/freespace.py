"""Where there is room: what the table says, kept, and brought up to date by the rows that have changed since.

Free space is computed from the rows of the table, so that a death leaves nothing to repair. With ten thousand blocks that
takes as long as to copy some megabytes. So a process keeps what it has computed, and the rows that it has seen. A row with
the same deciding word is the same: every change writes that word last, and no generation comes twice. What somebody has
scribbled beside that word is not gone by.
"""

from __future__ import annotations

import numpy as np

from dask_shm_plugin import blockbook
from dask_shm_plugin.layout import BLOCKS, SPREAD
from dask_shm_plugin.placement import Room
from dask_shm_plugin.stateword import is_taken
from dask_shm_plugin.table import Table

_MANY = 64
"""Changed rows from which it is quicker to begin anew."""


class FreeSpace:
    """The free space of one table, for those who hold the arena's mutex."""

    def __init__(self) -> None:
        self._room: Room | None = None
        # Deciding word, offset and length of each row, and how many of them it has seen.
        self._seen, self._rows = np.zeros((BLOCKS, 3), np.uint64), 0

    def room(self, table: Table) -> Room:
        """Return the room of now.

        Raises
        ------
        TableCorrupt
            A row does not say what was written there.
        """
        words = table.blocks.deciding_words()
        known = min(self._rows, len(words))
        changed = (words[:known] != self._seen[:known, 0]).nonzero()[0].tolist()
        # A row that was not seen yet has changed, whatever stands there: somebody may have scribbled zeros.
        changed.extend(range(known, len(words)))
        room, self._room = self._room, None  # should anything go wrong meanwhile
        if room is None or len(changed) > _MANY:
            room = self._look_anew(table)
        elif changed:
            self._follow(room, table, changed)
        self._room, self._rows = room, len(words)
        return room

    def _look_anew(self, table: Table) -> Room:
        rows = table.blocks.rows()
        self._seen[: len(rows)] = rows[:, :3]
        return Room(blockbook.taken(rows), table.capacity, SPREAD)

    def _follow(self, room: Room, table: Table, changed: list[int]) -> None:
        pairs = [(self._seen[index].tolist(), table.blocks.row(index)[:3]) for index in changed]
        # A draft that was sealed lies where it was.
        moved = [(old, new) for old, new in pairs if is_taken(old[0]) != is_taken(new[0]) or old[1:] != new[1:]]
        # What was given up may have been taken anew, under another row.
        for (word, *part), _ in moved:
            if is_taken(word):
                room.give(*part)
        for _, (word, *part) in moved:
            if is_taken(word):
                room.take(*part)
        for index, (_, new) in zip(changed, pairs, strict=True):
            self._seen[index] = new
