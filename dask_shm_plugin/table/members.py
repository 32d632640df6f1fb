"""The entries of the members: one per slot."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SLOTS = 256
_ENTRY = 8
_MOST = 1 << 62
"""Bound of sums, so that a stray write makes no number that does not fit a word."""
WORDS = SLOTS * _ENTRY
"""Words of eight bytes that all entries take."""

_STATE_BITS, _STATE_MASK = 2, 3
INCARNATIONS = 1 << 64 - _STATE_BITS
_LIVE = 1


class Member(NamedTuple):
    """One incarnation of a process in an arena. A slot is used again; an incarnation never is."""

    slot: int
    incarnation: int


class Members:
    """The members of an arena.

    Parameters
    ----------
    words
        ``WORDS`` words; per slot ``[incarnation | state, pid, start time, other shared memory, private memory, limit,
        drafts, bare]``. Memory and limit are in bytes, the start time in clock ticks since boot. The first word is
        written last, and never becomes zero again.
    """

    def __init__(self, words: memoryview) -> None:
        self._words = words
        entries = np.frombuffer(words, dtype=np.uint64).reshape(SLOTS, _ENTRY)
        self._entries, self._states, self._pids = entries, entries[:, 0], entries[:, 1]

    def add(self, member: Member, pid: int, started: int) -> None:
        """Enter a process, by pid and start time, in a vacant slot."""
        at = member.slot * _ENTRY
        for n, word in enumerate((pid, started, 0, 0, 0, 0, 0), 1):
            self._words[at + n] = word
        self._words[at] = member.incarnation << _STATE_BITS | _LIVE

    def remove(self, member: Member) -> None:
        """Make a slot vacant."""
        self._words[member.slot * _ENTRY] = member.incarnation << _STATE_BITS

    def is_live(self, member: Member) -> bool:
        """Tell whether this incarnation is entered. Needs no mutex: it reads one word."""
        in_range = 0 <= member.slot < SLOTS
        return in_range and self._words[member.slot * _ENTRY] == member.incarnation << _STATE_BITS | _LIVE

    def pid(self, member: Member) -> int:
        """Return the pid of a member's process. Needs no mutex."""
        return self._words[member.slot * _ENTRY + 1]

    def note_other_shared(self, member: Member, size: int) -> None:
        """Note the shared memory that a member's process uses outside the arena, in bytes. Needs no mutex."""
        self._words[member.slot * _ENTRY + 3] = size

    def other_shared(self, member: Member) -> int:
        """Return the bytes that a member has noted with :meth:`note_other_shared`. Needs no mutex."""
        return self._words[member.slot * _ENTRY + 3]

    def find(self, pid: int, started: int) -> Member | None:
        """Return the member with this pid and start time, or None."""
        for member in self.live():
            at = member.slot * _ENTRY
            if (self._words[at + 1], self._words[at + 2]) == (pid, started):
                return member
        return None

    def note_memory(self, member: Member, private: int, limit: int) -> None:
        """Note the private memory of a member's process and the memory limit of its workers, in bytes.

        A limit of zero means that no worker runs in the process. Needs no mutex, as an estimate: a reader may see one
        new value and one old one.
        """
        at = member.slot * _ENTRY
        self._words[at + 4], self._words[at + 5] = private, limit

    def note_drafts(self, member: Member, size: int, bare: int) -> None:
        """Note the bytes of a member's drafts that contain its own arrays, and of those without pages. Needs no mutex."""
        at = member.slot * _ENTRY
        self._words[at + 6], self._words[at + 7] = size, bare

    def drafts(self, member: Member) -> int:
        """Return the bytes that a member has noted with :meth:`note_drafts`. Needs no mutex."""
        return self._words[member.slot * _ENTRY + 6]

    def memory_of_workers(self) -> list[tuple[int, int, int]]:
        """Return pid, private memory and limit, in bytes, of each member that has noted a limit other than zero."""
        entries = self._entries[self.slots()][:, [1, 4, 5]].tolist()
        return [(pid, private, limit) for pid, private, limit in entries if limit]

    def private(self) -> int:
        """Return the private memory that the workers have noted, in bytes."""
        entries = self._entries[self.slots()]
        return min(int(np.sum(entries[entries[:, 5] > 0, 4])), _MOST)

    def bare(self) -> int:
        """Return the bytes of drafts without pages that all members have noted."""
        return min(int(np.sum(self._entries[self.slots(), 7])), _MOST)

    def slots(self) -> npt.NDArray[np.intp]:
        """Return the slots that are taken, in ascending order."""
        return np.flatnonzero(self._states & np.uint64(_STATE_MASK))

    def vacant(self) -> list[int]:
        """Return the slots that are not taken, in ascending order."""
        return [int(slot) for slot in np.flatnonzero((self._states & np.uint64(_STATE_MASK)) == 0)]

    def slots_ever_taken(self) -> npt.NDArray[np.intp]:
        """Return the slots that are or were ever taken, in ascending order."""
        return np.flatnonzero(self._states | self._pids)

    def live(self) -> list[Member]:
        """Return all members."""
        return [Member(int(slot), int(self._states[slot]) >> _STATE_BITS) for slot in self.slots()]
