"""Which places of each member's directory are good, and for which name: a tag for each over a part of the table.

A tag is written by one store of its owner's, needs no mutex, and is what decides: what a place holds counts only while its
tag is there. So a listing appears when all of it is written, and is gone in the moment in which its tag is taken away.

A tag tells names apart, so that who looks for one that is not listed need not read what stands there (a mere mark made
that 20 µs for each small value of a worker that lists many large ones, November 2026). And what somebody scribbles over
the table is no tag of what was taken back.
"""

from __future__ import annotations

from dask_shm_plugin import memberbook

PLACES = 512
"""Places of a member's directory."""
TAGS = 1 << 16
"""Tags are below; zero is none."""
_PER_WORD = 4
_NONE = bytes(2 * PLACES)
WORDS = memberbook.SLOTS * PLACES // _PER_WORD
"""Words of eight bytes that a book takes."""


class MarkBook:
    """The tags of all members' places.

    Parameters
    ----------
    words
        ``WORDS`` words, two bytes per place.

    Notes
    -----
    Only the process that has a slot writes its tags.
    """

    def __init__(self, words: memoryview) -> None:
        self._bytes = words.cast("B")
        self._tags = self._bytes.cast("H")

    def set(self, slot: int, place: int, tag: int) -> None:
        """Mark a place."""
        self._tags[slot * PLACES + place] = tag

    def unset(self, slot: int, place: int) -> None:
        """Take a mark away."""
        self._tags[slot * PLACES + place] = 0

    def unset_all(self, slot: int) -> None:
        """Take all marks of a slot away."""
        for place in range(PLACES):
            self.unset(slot, place)

    def has_any(self, slot: int) -> bool:
        """Tell whether any place of a slot is marked."""
        return self._bytes[slot * len(_NONE) : (slot + 1) * len(_NONE)] != _NONE

    def tag(self, slot: int, place: int) -> int:
        """Return the tag of a place, zero where there is none."""
        return self._tags[slot * PLACES + place]
