"""The members' references to blocks: one row per member, which holds one generation per block.

A claim is a generation, not a count: "this member refers to that generation of that block". A set of (member, block,
generation) can be repaired after a death; a count cannot. Only the member writes its row, until its death is *proved*:
then the process that reclaims the member does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dask_shm_plugin.table.layout import BLOCKS, MEMBERS, BlockId
from dask_shm_plugin.table.members import Member

Slots = npt.NDArray[np.intp]


class Claims:
    """The claims of all members.

    Parameters
    ----------
    words
        ``MEMBERS * BLOCKS`` words. Zero means no claim: the first generation of a block is 1.
    """

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self._claims = np.frombuffer(words, np.uint64).reshape(MEMBERS, BLOCKS)

    def add(self, member: Member, row: BlockId) -> None:
        """Claim a block for a member."""
        self._words[member.slot * BLOCKS + row.index] = row.generation

    def remove(self, member: Member, row: BlockId) -> None:
        """Undo :meth:`add`."""
        self._words[member.slot * BLOCKS + row.index] = 0

    def remove_all(self, member: Member, rows: int) -> None:
        """Drop every claim of a member on the first ``rows`` blocks."""
        self._claims[member.slot, :rows] = 0

    def has(self, member: Member, row: BlockId) -> bool:
        """Tell whether a member claims a block."""
        return bool(self._words[member.slot * BLOCKS + row.index] == row.generation)

    def of(self, member: Member, rows: int) -> list[BlockId]:
        """Return the claims of a member on the first ``rows`` blocks."""
        claims = self._claims[member.slot, :rows].copy()
        return [BlockId(int(index), int(claims[index])) for index in np.flatnonzero(claims)]

    def held(self, member: Member, rows: int, slots: Slots) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Return the blocks that a member claims, and how many members claim each of them. Needs no mutex.

        Parameters
        ----------
        member
            The member to look up.
        rows
            Only the first ``rows`` blocks are considered.
        slots
            The members to count.

        Returns
        -------
        tuple
            Two arrays of the same length: the indices of the blocks, and the numbers of members that claim the same
            generation.
        """
        # Search a copy: ``np.flatnonzero`` raises if another member changes its input meanwhile.
        claims = self._claims[member.slot, :rows].copy()
        mine = np.flatnonzero(claims)
        return mine, np.count_nonzero(self._claims[np.ix_(slots, mine)] == claims[mine], axis=0)

    def generations(self, member: Member) -> npt.NDArray[np.uint64]:
        """Return the generation that a member claims of each block, shape (BLOCKS,)."""
        row: npt.NDArray[np.uint64] = self._claims[member.slot]
        return row

    def on(self, index: int, slots: Slots) -> npt.NDArray[np.uint64]:
        """Return the generations of one block that the members in ``slots`` claim, one per slot."""
        column: npt.NDArray[np.uint64] = self._claims[:, index][slots]
        return column

    def count(self, rows: Sequence[BlockId], slots: Slots) -> npt.NDArray[np.intp]:
        """Count, for each of ``rows``, the members in ``slots`` that claim that generation of the block."""
        indices = np.fromiter((row.index for row in rows), np.intp, len(rows))
        generations = np.fromiter((row.generation for row in rows), np.uint64, len(rows))
        return np.asarray(np.count_nonzero(self._claims[np.ix_(slots, indices)] == generations, axis=0))
