"""Who refers to which block: per member a row of generations over a part of the table.

A claim is a generation, not a count: "this member refers to that generation of that block". A count cannot be repaired
after a death, a set of (member, block, generation) can. A row is written by its member, and by whoever reclaims the
member after its death was *proved*.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dask_shm_plugin.layout import BLOCKS, MEMBERS, Row
from dask_shm_plugin.memberbook import Member

Slots = npt.NDArray[np.intp]


class ClaimBook:
    """The claims of all members.

    Parameters
    ----------
    words
        ``MEMBERS * BLOCKS`` words; zero is no claim, for no block is ever in generation zero.
    """

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self._claims = np.frombuffer(words, np.uint64).reshape(MEMBERS, BLOCKS)

    def enter(self, member: Member, row: Row) -> None:
        """Claim a block for a member."""
        self._words[member.slot * BLOCKS + row.index] = row.generation

    def cross_out(self, member: Member, row: Row) -> None:
        """Undo :meth:`enter`."""
        self._words[member.slot * BLOCKS + row.index] = 0

    def cross_out_all(self, member: Member, rows: int) -> None:
        """Drop every claim of a member on the first rows."""
        self._claims[member.slot, :rows] = 0

    def has(self, member: Member, row: Row) -> bool:
        """Tell whether a member claims a block."""
        return bool(self._words[member.slot * BLOCKS + row.index] == row.generation)

    def of(self, member: Member, rows: int) -> list[Row]:
        """Return what a member claims of the first rows."""
        claims = self._claims[member.slot, :rows].copy()
        return [Row(int(index), int(claims[index])) for index in np.flatnonzero(claims)]

    def held(self, member: Member, rows: int, slots: Slots) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Return which of the first rows a member claims, and how many members, among some, claim each of them."""
        # A copy: NumPy raises where what it searches is changed meanwhile, and here nobody holds the mutex.
        claims = self._claims[member.slot, :rows].copy()
        mine = np.flatnonzero(claims)
        return mine, np.count_nonzero(self._claims[np.ix_(slots, mine)] == claims[mine], axis=0)

    def generations(self, member: Member) -> npt.NDArray[np.uint64]:
        """Return the generation that a member claims of each block, shape (BLOCKS,)."""
        row: npt.NDArray[np.uint64] = self._claims[member.slot]
        return row

    def on(self, index: int, slots: Slots) -> npt.NDArray[np.uint64]:
        """Return the generations of one block that some members claim, one for each slot."""
        column: npt.NDArray[np.uint64] = self._claims[:, index][slots]
        return column

    def count(self, rows: Sequence[Row], slots: Slots) -> npt.NDArray[np.intp]:
        """Count the members, among some, that claim each of some blocks."""
        indices = np.fromiter((row.index for row in rows), np.intp, len(rows))
        generations = np.fromiter((row.generation for row in rows), np.uint64, len(rows))
        return np.asarray(np.count_nonzero(self._claims[np.ix_(slots, indices)] == generations, axis=0))
