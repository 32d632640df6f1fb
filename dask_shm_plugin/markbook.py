"""Which places of each member's directory are good: one bit for each over a part of the table.

A mark is one store of its owner's, needs no mutex, and is what decides: what a place holds counts only while it is
marked. So a listing appears when all of it is written, and is gone in the moment in which its mark is taken away.
"""

from __future__ import annotations

from dask_shm_plugin import memberbook

PLACES = 512
"""Places of a member's directory."""
_PER_WORD = 64
_WORDS = PLACES // _PER_WORD
WORDS = memberbook.SLOTS * _WORDS
"""Words of eight bytes that a book takes."""


class MarkBook:
    """The marks of all members.

    Parameters
    ----------
    words
        ``WORDS`` words, eight per slot.

    Notes
    -----
    Only the process that has a slot writes its words, one thread at a time.
    """

    def __init__(self, words: memoryview) -> None:
        self._words = words

    def set(self, slot: int, place: int) -> None:
        """Mark a place."""
        word, bit = _at(slot, place)
        self._words[word] |= bit

    def unset(self, slot: int, place: int) -> None:
        """Take a mark away."""
        word, bit = _at(slot, place)
        self._words[word] &= ~bit

    def unset_all(self, slot: int) -> None:
        """Take all marks of a slot away."""
        for word in range(slot * _WORDS, (slot + 1) * _WORDS):
            self._words[word] = 0

    def is_set(self, slot: int, place: int) -> bool:
        """Tell whether a place is marked."""
        word, bit = _at(slot, place)
        return bool(self._words[word] & bit)


def _at(slot: int, place: int) -> tuple[int, int]:
    return slot * _WORDS + place // _PER_WORD, 1 << place % _PER_WORD
