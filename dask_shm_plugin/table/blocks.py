"""The rows of blocks: the state, place, size and owner of each.

The first word of a row, the state word (see ``state_word``), holds the state, the generation, and a tag that covers the
rest. It is written last. The other words of a FREE row have no meaning.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dask_shm_plugin.exceptions import StaleBlock, TableCorrupt, TableFull
from dask_shm_plugin.table import state_word
from dask_shm_plugin.table.layout import BLOCK, BLOCKS, BLOCKS_AT, CLAIMS_AT, ROWS_WORD, BlockId, Extent
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.table.state_word import DRAFT, FREE

TRIMMING = 0
"""The size of a draft that is never written: it reserves a free part while its pages are given back to the system."""

_RESERVED_AT = 6
_ODD_ROW = "the state of a block does not fit what is written beside it"


class BlockRows:
    """The rows of all blocks.

    Parameters
    ----------
    words
        The words of the whole table, because the header counts the rows in use.
    """

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self._rows = np.frombuffer(words, dtype=np.uint64)[BLOCKS_AT:CLAIMS_AT].reshape(BLOCKS, BLOCK)

    @property
    def in_use(self) -> int:
        """The number of rows that are or were in use, at most ``BLOCKS``."""
        # Bounded, not checked: many callers do not hold the mutex, and another member may be adding a row.
        return min(self._words[ROWS_WORD], BLOCKS)

    # -- one row

    def state(self, index: int) -> tuple[int, int]:
        """Return generation and state of a block; the tag is not checked."""
        return state_word.unpack(self._words[BLOCKS_AT + index * BLOCK])

    def generation(self, index: int) -> int:
        """Return the present or last generation of a block."""
        return self.state(index)[0]

    def owner(self, index: int) -> Member:
        """Return the member that writes a draft; the tag is not checked."""
        at = BLOCKS_AT + index * BLOCK
        return Member(self._words[at + 4], self._words[at + 5])

    def extent(self, index: int) -> Extent:
        """Return the extent of a block; the tag is not checked."""
        at = BLOCKS_AT + index * BLOCK
        return Extent(self._words[at + 1], self._words[at + 2])

    def add(self, extent: Extent, size: int, owner: Member, now: float = 0) -> BlockId:
        """Enter a draft in the lowest free row.

        Raises
        ------
        TableFull
            All rows are taken.
        TableCorrupt
            The generation of the row has reached its limit, as after a stray write.
        """
        in_use = self.in_use
        index = self._free_row(in_use)
        at = BLOCKS_AT + index * BLOCK
        generation = self.generation(index) + 1
        if generation >= state_word.GENERATIONS:
            raise TableCorrupt("the generation of a block is out of range")
        body = (extent.offset, extent.length, size, *owner)
        if index == in_use:
            self._words[at] = state_word.pack(generation - 1, FREE)
            self._words[ROWS_WORD] = index + 1
        for n, word in enumerate(body, 1):
            self._words[at + n] = word
        self._words[at + _RESERVED_AT] = int(now * 1000)
        self._words[at] = state_word.pack(generation, DRAFT, body)
        return BlockId(index, generation)

    def turn(self, row: BlockId, state: int, body: list[int]) -> None:
        """Change the state of a draft or block; ``body`` is its unchanged body, as :meth:`demand` returned it."""
        self._words[BLOCKS_AT + row.index * BLOCK] = state_word.pack(row.generation, state, body)

    def free(self, index: int) -> Extent:
        """Make a row free, and return the extent that it had.

        Raises
        ------
        TableCorrupt
            The tag of the row is not valid.
        """
        _, offset, length, *_ = self.row(index)
        self._words[BLOCKS_AT + index * BLOCK] = state_word.pack(self.generation(index), FREE)
        return Extent(offset, length)

    def demand(self, row: BlockId, state: int) -> list[int]:
        """Return the body of a row, which must be in a given generation and state.

        Returns
        -------
        list
            The words that follow the state word: offset, length and size in bytes, the owner's slot and incarnation.

        Raises
        ------
        StaleBlock
            The row is in another generation or state, or there is no such row.
        TableCorrupt
            The tag of the row is not valid.
        """
        if not 0 <= row.index < BLOCKS:
            raise StaleBlock(f"there is no block {row.index}")
        if self.state(row.index) != (row.generation, state):
            raise StaleBlock(f"generation {row.generation} of block {row.index} is not there any more")
        return self.row(row.index)[1:]

    def row(self, index: int) -> list[int]:
        """Return the words of a row that the tag covers, the state word first.

        Raises
        ------
        TableCorrupt
            The tag of the row is not valid.
        """
        at = BLOCKS_AT + index * BLOCK
        words: list[int] = self._words[at : at + state_word.WORDS].tolist()
        if not state_word.is_sound(words[0], words[1:]):
            raise TableCorrupt(_ODD_ROW)
        return words

    def reserved(self, index: int) -> float:
        """Return the time of the monotonic clock, in seconds, at which a block was reserved; 0 if it is not known."""
        return self._words[BLOCKS_AT + index * BLOCK + _RESERVED_AT] / 1000

    # -- all rows

    def deciding_words(self) -> npt.NDArray[np.uint64]:
        """Return the state word of each row that was ever used; the tags are not checked."""
        return self._used()[:, 0]

    def generations(self) -> npt.NDArray[np.uint64]:
        """Return the generation of each row, shape (BLOCKS,); the tags are not checked."""
        return state_word.generations(self._rows[:, 0])

    def lengths(self, indices: npt.NDArray[np.intp]) -> npt.NDArray[np.uint64]:
        """Return the lengths of the extents of some blocks, in bytes; the tags are not checked."""
        column: npt.NDArray[np.uint64] = self._rows[indices, 2]
        return column

    def rows(self) -> npt.NDArray[np.uint64]:
        """Return a copy of each row that was ever used, shape (n, BLOCK).

        Raises
        ------
        TableCorrupt
            The tag of a row is not valid.
        """
        # The copy is checked, not the table: a stray write may hit the table after the check.
        rows: npt.NDArray[np.uint64] = self._used().copy()
        if not state_word.are_sound(rows):
            raise TableCorrupt(_ODD_ROW)
        return rows

    def taken(self) -> npt.NDArray[np.uint64]:
        """Return offset and length of every draft and block, shape (n, 2), unsorted. Raises as :meth:`rows` does."""
        return taken(self.rows())

    def taken_by_now(self) -> npt.NDArray[np.uint64]:
        """Return the same as :meth:`taken`, without a check of the tags. Needs no mutex, as an estimate."""
        return taken(self._used())

    def bytes_held(self) -> int:
        """Return the bytes of all blocks and drafts. Needs no mutex, as an estimate.

        Drafts of size ``TRIMMING`` are not counted: the space that they reserve is free.
        """
        used = self._used()
        is_trimmed = _are_drafts(used) & (used[:, 3] == TRIMMING)
        return int(np.sum(used[(state_word.states(used[:, 0]) != FREE) & ~is_trimmed, 2]))

    def drafts(self) -> npt.NDArray[np.uint64]:
        """Return offset and length of every draft that may be written, shape (n, 2). Needs no mutex, as an estimate."""
        used = self._used()
        rows: npt.NDArray[np.uint64] = used[_are_drafts(used) & (used[:, 3] != TRIMMING), 1:3]
        return rows

    def is_trimmed(self) -> bool:
        """Tell whether any member is giving pages back. Needs no mutex."""
        used = self._used()
        return bool(np.any(_are_drafts(used) & (used[:, 3] == TRIMMING)))

    def drafts_of(self, member: Member) -> list[BlockId]:
        """Return the drafts of one member."""
        used = self._used()
        own = (used[:, 4] == member.slot) & (used[:, 5] == member.incarnation)
        return [BlockId(int(index), self.generation(int(index))) for index in np.flatnonzero(_are_drafts(used) & own)]

    # -- inside

    def _used(self) -> npt.NDArray[np.uint64]:
        # Call this once per query: another member may add a row between two calls.
        return self._rows[: self.in_use]

    def _free_row(self, in_use: int) -> int:
        are_free = state_word.states(self._rows[:in_use, 0]) == FREE
        if in_use and are_free[lowest := int(are_free.argmax())]:
            return lowest
        if in_use == BLOCKS:
            raise TableFull(
                f"the arena holds {BLOCKS} blocks; raise shm.threshold so that fewer and larger values are shared"
            )
        return in_use


def taken(rows: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return offset and length of those rows that are drafts or blocks, shape (n, 2)."""
    parts: npt.NDArray[np.uint64] = rows[state_word.states(rows[:, 0]) != FREE, 1:3]
    return parts


def _are_drafts(rows: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    drafts: npt.NDArray[np.bool_] = state_word.states(rows[:, 0]) == DRAFT
    return drafts
