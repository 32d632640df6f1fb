"""What one process refers to: for each block the holds that live, and what it keeps for its forked children.

Nothing is counted. A hold is an object that hangs on whoever needs the block, and what has become of it is seen from its
weak reference, whenever one looks. So an exception that comes at any moment, from a signal handler or from another thread,
leaves no count that does not fit.
"""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable, Iterator

from dask_shm_plugin.forks import Pins
from dask_shm_plugin.layout import Row
from dask_shm_plugin.mappings import Mapping


class Hold:
    """One reference of this process to a block or draft: it lasts as long as this object.

    Attributes
    ----------
    note
        What is known of it, once it is entered.
    """

    __slots__ = ("__weakref__", "note")

    note: Note

    @property
    def row(self) -> Row:
        """Which block."""
        return self.note.row


class Note(weakref.ref[Hold]):
    """What is known of a hold, also when it is gone: which block, and the mapping that hung on it if there was one."""

    __slots__ = ("mapping", "row")

    row: Row
    mapping: Mapping | None

    # A weak reference has the hash of what it refers to, which may be gone before anybody has asked.
    __hash__ = object.__hash__
    __eq__ = object.__eq__


class References:
    """The holds of a process, so that the table needs to know only whether there are any.

    Parameters
    ----------
    gone
        Called with the note of a hold that is gone, wherever that happens. No line of Python, so that nothing can
        interrupt it.

    Notes
    -----
    Every method but :meth:`keep` and :meth:`gone` wants the caller to exclude the other threads of this process. A hold is entered after the
    table says that this process has the block, and crossed out before that says that it has not: what stands here is
    always in the table, too.
    """

    def __init__(self, gone: Callable[[Note], object]) -> None:
        self._gone = gone
        self._notes: dict[Row, set[Note]] = {}
        self._pins: collections.deque[Pins] = collections.deque()

    def enter(self, row: Row, hold: Hold) -> None:
        """Enter a hold of a block that the table knows to be this process's."""
        note = Note(hold, self._gone)
        note.row, note.mapping, hold.note = row, None, note
        notes = self._notes.get(row, set())
        notes.add(note)
        self._notes[row] = notes

    def knows(self, row: Row) -> bool:
        """Tell whether there is a hold of a block."""
        return bool(self._notes.get(row))

    def cross_out(self, note: Note) -> bool:
        """Cross a hold out that is gone; return whether that was the last of its block."""
        notes = self._notes.get(note.row)
        if not notes or note not in notes:
            return False
        notes.discard(note)
        if notes:
            return False
        del self._notes[note.row]
        return True

    def gone(self) -> list[Note]:
        """Return the notes of all holds that are gone. Needs no exclusion: what comes or goes meanwhile may be missing."""
        return [note for notes in list(self._notes.values()) for note in list(notes) if note() is None]

    def pin(self) -> Pins | None:
        """Hold once more everything that is held, for a child about to be forked."""
        holds = []
        for row in list(self):
            hold = Hold()
            self.enter(row, hold)
            holds.append(hold)
        return Pins.take(holds) if holds else None

    def keep(self, pins: Pins) -> None:
        """Remember what is kept for a child, until it has ended."""
        self._pins.append(pins)

    def unpin(self) -> None:
        """Let go of what is kept for children that have ended."""
        # Another thread may fork meanwhile, and what it keeps may look like what was just given up: each is taken out
        # before it is asked, and put back if it stays.
        for _ in range(len(self._pins)):
            pins = self._pins.popleft()
            try:
                is_over = pins.are_over()
            except OSError:  # it cannot be asked now
                is_over = False
            if not is_over:
                self._pins.append(pins)

    def __iter__(self) -> Iterator[Row]:
        return (row for row, notes in list(self._notes.items()) if notes)

    def __len__(self) -> int:
        return sum(1 for _ in self)
