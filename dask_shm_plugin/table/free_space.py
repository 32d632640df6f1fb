"""The free space of a table, cached, and updated from the rows that have changed since the last call.

Free space is computed from the rows of the table, so that a death leaves nothing to repair. With ten thousand blocks
this takes as long as a copy of some megabytes. So a process keeps the result, and the rows from which it was computed.
A row with an unchanged state word is itself unchanged: every change writes the state word last, and no generation
occurs twice. A stray write to the row's other words is never acted on.
"""

from __future__ import annotations

import numpy as np

from dask_shm_plugin.table import blocks
from dask_shm_plugin.table.layout import BLOCKS, SPREAD
from dask_shm_plugin.table.placement import Room
from dask_shm_plugin.table.state_word import is_taken
from dask_shm_plugin.table.table import Table

_MAX_CHANGED_ROWS = 64
"""With more changed rows than this, it is quicker to compute the free space anew."""


class FreeSpace:
    """The free space of one table.

    Notes
    -----
    The caller must hold the arena's mutex.
    """

    def __init__(self) -> None:
        self._room: Room | None = None
        # State word, offset and length of each row as last seen, and the number of rows seen.
        self._seen, self._rows = np.zeros((BLOCKS, 3), np.uint64), 0

    def room(self, table: Table) -> Room:
        """Return the free space of the table at this moment.

        Raises
        ------
        TableCorrupt
            The tag of a row is not valid.
        """
        words = table.blocks.deciding_words()
        known = min(self._rows, len(words))
        changed = (words[:known] != self._seen[:known, 0]).nonzero()[0].tolist()
        # A row that was never seen counts as changed: a state word zeroed by a stray write equals the initial zero.
        changed.extend(range(known, len(words)))
        room, self._room = self._room, None  # after an exception below, the next call computes it anew
        if room is None or len(changed) > _MAX_CHANGED_ROWS:
            room = self._look_anew(table)
        elif changed:
            self._follow(room, table, changed)
        self._room, self._rows = room, len(words)
        return room

    def _look_anew(self, table: Table) -> Room:
        rows = table.blocks.rows()
        self._seen[: len(rows)] = rows[:, :3]
        return Room(blocks.taken(rows), table.capacity, SPREAD)

    def _follow(self, room: Room, table: Table, changed: list[int]) -> None:
        pairs = [(self._seen[index].tolist(), table.blocks.row(index)[:3]) for index in changed]
        # A draft that was sealed since has not moved.
        moved = [(old, new) for old, new in pairs if is_taken(old[0]) != is_taken(new[0]) or old[1:] != new[1:]]
        # First give, then take: the space of a freed block may belong to a block in another row now.
        for (word, *part), _ in moved:
            if is_taken(word):
                room.give(*part)
        for _, (word, *part) in moved:
            if is_taken(word):
                room.take(*part)
        for index, (_, new) in zip(changed, pairs, strict=True):
            self._seen[index] = new
