"""Where there is room: what the table says, kept, and brought up to date by the rows that have changed since.

Free space is computed from the rows of the table, so that a death leaves nothing to repair. With ten thousand blocks that
takes as long as to copy some megabytes. So a process keeps what it has computed, and the rows that it has seen. A row with
the same deciding word is the same: every change writes that word last, and no generation comes twice.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dask_shm_plugin import stateword
from dask_shm_plugin.layout import BLOCKS, SPREAD
from dask_shm_plugin.placement import Room
from dask_shm_plugin.table import Table

Rows = npt.NDArray[np.uint64]
"""Deciding word, offset and length of some rows, shape (n, 3)."""

_MANY = 64
"""Changed rows from which it is quicker to begin anew."""


class FreeSpace:
    """The free space of one table, for those who hold the arena's mutex."""

    def __init__(self) -> None:
        self._room: Room | None = None
        self._seen: Rows = np.zeros((BLOCKS, 3), np.uint64)

    def room(self, table: Table) -> Room:
        """Return the room of now.

        Raises
        ------
        TableCorrupt
            A row does not say what was written there.
        """
        rows = table.rows()
        changed = np.flatnonzero(rows[:, 0] != self._seen[: len(rows), 0])
        room, self._room = self._room, None  # should anything go wrong meanwhile
        if room is None or len(changed) > _MANY:
            room = Room(rows[stateword.states(rows[:, 0]) != stateword.FREE, 1:], table.capacity, SPREAD)
        else:
            _follow(room, self._seen[changed], rows[changed])
        self._seen[changed] = rows[changed]
        self._room = room
        return room


def _follow(room: Room, before: Rows, after: Rows) -> None:
    pairs = zip(before.tolist(), after.tolist(), strict=True)
    # A draft that was sealed lies where it was.
    moved = [(old, new) for old, new in pairs if _is_taken(old[0]) != _is_taken(new[0]) or old[1:] != new[1:]]
    # What was given up may have been taken anew, under another row.
    for (word, *part), _ in moved:
        if _is_taken(word):
            room.give(*part)
    for _, (word, *part) in moved:
        if _is_taken(word):
            room.take(*part)


def _is_taken(word: int) -> bool:
    return stateword.unpack(word)[1] != stateword.FREE
