"""Where there is room: what the table says, kept, and brought up to date by the rows that have changed since.

Free space is computed from the rows of the table, so that a death leaves nothing to repair. With ten thousand blocks that
takes as long as to copy some megabytes. So a process keeps what it has computed, and the rows that it has seen. A row with
the same deciding word is the same: every change writes that word last, and no generation comes twice. What somebody has
scribbled beside that word is not gone by.
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
_SOME = 1024


class FreeSpace:
    """The free space of one table, for those who hold the arena's mutex."""

    def __init__(self) -> None:
        self._room: Room | None = None
        self._looked_at = 0
        self._seen: Rows = np.zeros((BLOCKS, 3), np.uint64)

    def room(self, table: Table) -> Room:
        """Return the room of now.

        Raises
        ------
        TableCorrupt
            A row does not say what was written there.
        """
        rows = table.rows()
        changed = (rows[:, 0] != self._seen[: len(rows), 0]).nonzero()[0]
        if len(rows) > _SOME:
            table.insist_sound(changed)
        table.insist_sound(self._some_more(len(rows)))
        room, self._room = self._room, None  # should anything go wrong meanwhile
        before, after = self._seen[changed], rows[changed]
        self._seen[changed] = after
        if room is None or len(changed) > _MANY:
            known = self._seen[: len(rows)]
            room = Room(known[stateword.states(known[:, 0]) != stateword.FREE, 1:], table.capacity, SPREAD)
        else:
            _follow(room, before, after)
        self._room = room
        return room

    def _some_more(self, rows: int) -> slice:
        """Return rows that nobody may need now, other ones each time: damage is to be noticed soon, and not paid for each time."""
        begin = self._looked_at if self._looked_at < rows else 0
        self._looked_at = begin + _SOME
        return slice(begin, self._looked_at)


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
