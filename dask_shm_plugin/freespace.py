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

_MANY = 64
"""Changed rows from which it is quicker to begin anew."""


class FreeSpace:
    """The free space of one table, for those who hold the arena's mutex."""

    def __init__(self) -> None:
        self._room: Room | None = None
        self._seen = np.zeros((BLOCKS, 3), np.uint64)  # deciding word, offset, length

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
            room = Room(rows[_are_taken(rows), 1:], table.capacity, SPREAD)
        else:
            _follow(room, self._seen[changed], rows[changed])
        self._seen[changed] = rows[changed]
        self._room = room
        return room


def _follow(room: Room, before: npt.NDArray[np.uint64], after: npt.NDArray[np.uint64]) -> None:
    # A draft that was sealed lies where it was.
    differ = (_are_taken(before) != _are_taken(after)) | np.any(before[:, 1:] != after[:, 1:], axis=1)
    # What was given up may have been taken anew, under another row.
    for _, offset, length in before[differ & _are_taken(before)].tolist():
        room.give(offset, length)
    for _, offset, length in after[differ & _are_taken(after)].tolist():
        room.take(offset, length)


def _are_taken(rows: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    taken: npt.NDArray[np.bool_] = stateword.states(rows[:, 0]) != stateword.FREE
    return taken
