"""Where there is room: what the table says, kept, and brought up to date by the rows that have changed since.

Free space is computed from the rows of the table, so that a death leaves nothing to repair. With ten thousand blocks that
takes as long as to copy some megabytes. So a process keeps what it has computed, and the rows that it has seen. Before a row is
taken or freed, changes are counted: where the count is as it was, nothing need be looked at. A row with the same deciding
word is the same: every change writes that word last, and no generation comes twice. What somebody has scribbled beside
that word is not gone by.
"""

from __future__ import annotations

import contextlib

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
_SOME = 512


class FreeSpace:
    """The free space of one table, for those who hold the arena's mutex."""

    def __init__(self) -> None:
        self._room: Room | None = None
        self._changes = 0
        self._looked_at = 0
        self._seen: Rows = np.zeros((BLOCKS, 3), np.uint64)

    def room(self, table: Table) -> Room:
        """Return the room of now.

        Raises
        ------
        TableCorrupt
            A row does not say what was written there.
        """
        rows, changes = table.rows(), table.changes
        table.insist_sound(self._some_more(len(rows)))
        if self._room is not None and self._changes == changes:
            return self._room
        changed = np.flatnonzero(rows[:, 0] != self._seen[: len(rows), 0])
        table.insist_sound(changed)
        room, self._room = self._room, None  # should anything go wrong meanwhile
        before, after = self._seen[changed], rows[changed]
        self._seen[changed] = after
        if room is None or len(changed) > _MANY:
            known = self._seen[: len(rows)]
            room = Room(known[stateword.states(known[:, 0]) != stateword.FREE, 1:], table.capacity, SPREAD)
        else:
            _follow(room, before, after)
        self._room, self._changes = room, changes
        return room

    def note(self, table: Table, index: int, since: int) -> None:
        """Take note of a row that this process itself has changed since some count of changes, so that it need not be looked for."""
        if self._room is None or since != self._changes or table.changes != since + 1:
            return
        room, self._room = self._room, None
        rows, seen = table.rows()[index : index + 1], self._seen[index : index + 1]
        # The row is changed already, and whoever has changed it has more to do: what is not noted is looked for later.
        with contextlib.suppress(MemoryError):
            _follow(room, seen, rows)
            seen[:] = rows
            self._room, self._changes = room, self._changes + 1

    def _some_more(self, rows: int) -> slice:
        """Return rows that nobody needs now, other ones each time: damage is to be noticed soon, and not paid for each time."""
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
