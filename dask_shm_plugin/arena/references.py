"""The references of one process: the live holds of each block, and the references kept for forked children.

There is no reference count. A hold is an object that is kept alive by each user of a block, and its weak reference
tells at any time whether it is gone. So an asynchronous exception, raised by a signal handler or sent by another
thread, cannot leave a wrong count.
"""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable, Iterator

from dask_shm_plugin.arena.forks import ForkHold
from dask_shm_plugin.mapping.private import PrivateMapping
from dask_shm_plugin.table.layout import BlockId


class Hold:
    """One reference of this process to a block or draft; it lasts as long as this object.

    Attributes
    ----------
    note
        The record of this hold; set by :meth:`References.add`.
    """

    __slots__ = ("__weakref__", "note")

    note: Note

    @property
    def row(self) -> BlockId:
        """The block or draft."""
        return self.note.row


class Note(weakref.ref[Hold]):
    """The record of a hold, which outlives it: its block, and the mapping of its view if it has one."""

    __slots__ = ("mapping", "row")

    row: BlockId
    mapping: PrivateMapping | None

    # A weak reference has the hash of its referent, which may be gone before the hash is first needed.
    __hash__ = object.__hash__
    __eq__ = object.__eq__


class References:
    """The holds of a process; the table only knows for each block whether the process has any.

    Parameters
    ----------
    gone
        Called with the note of a hold that is gone, in the thread in which the hold was collected. It must be a
        function in C, so that no exception can interrupt it.

    Notes
    -----
    For :meth:`add`, :meth:`knows`, :meth:`remove` and :meth:`hold_for_child`, the caller must exclude the other threads
    of this process. The other methods work on copies or on an atomic deque.

    A hold is added after the table notes that this process has the block or draft, and removed before the table notes
    that it has not. So for every hold here, the table has a claim or a draft of this process.
    """

    def __init__(self, gone: Callable[[Note], object]) -> None:
        self._gone = gone
        self._notes: dict[BlockId, set[Note]] = {}
        self._fork_holds: collections.deque[ForkHold] = collections.deque()

    def add(self, row: BlockId, hold: Hold) -> None:
        """Add a hold of a block or draft that this process has according to the table."""
        note = Note(hold, self._gone)
        note.row, note.mapping, hold.note = row, None, note
        notes = self._notes.get(row, set())
        notes.add(note)
        self._notes[row] = notes

    def knows(self, row: BlockId) -> bool:
        """Tell whether a block has a hold."""
        return bool(self._notes.get(row))

    def remove(self, note: Note) -> bool:
        """Remove a hold that is gone; return whether it was the last one of its block."""
        notes = self._notes.get(note.row)
        if not notes or note not in notes:
            return False
        notes.discard(note)
        if notes:
            return False
        del self._notes[note.row]
        return True

    def gone(self) -> list[Note]:
        """Return the notes of all holds that are gone; those that are added or collected meanwhile may be missing."""
        return [note for notes in list(self._notes.values()) for note in list(notes) if note() is None]

    def hold_for_child(self) -> ForkHold | None:
        """Add one more hold of every block, for a child about to be forked; return None if there is no block."""
        holds = []
        for row in list(self):
            hold = Hold()
            self.add(row, hold)
            holds.append(hold)
        return ForkHold.take(holds) if holds else None

    def keep(self, fork_hold: ForkHold) -> None:
        """Keep the holds of a child until the child has ended."""
        self._fork_holds.append(fork_hold)

    def release_ended_children(self) -> None:
        """Drop the holds that are kept for children that have ended."""
        # Another thread may fork and append meanwhile. Its entry may equal one that has just ended, because the kernel
        # reuses descriptor numbers and addresses. So each entry is taken out before its child is looked for, and put
        # back if the child lives.
        for _ in range(len(self._fork_holds)):
            try:
                fork_hold = self._fork_holds.popleft()
            except IndexError:  # another thread looks, too
                return
            try:
                is_over = fork_hold.are_over()
            except OSError:  # the state of the child cannot be read now
                is_over = False
            if not is_over:
                self._fork_holds.append(fork_hold)

    def __iter__(self) -> Iterator[BlockId]:
        return (row for row, notes in list(self._notes.items()) if notes)

    def __len__(self) -> int:
        return sum(1 for _ in self)
