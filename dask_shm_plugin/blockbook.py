"""Which blocks there are, and in which state: one row per block over a part of the table.

A row's first word says state and generation, and carries a tag over the rest (see ``stateword``); it is written last.
What stands in the other words of a FREE row means nothing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dask_shm_plugin import stateword
from dask_shm_plugin.exceptions import StaleBlock, TableCorrupt, TableFull
from dask_shm_plugin.layout import BLOCK, BLOCKS, BLOCKS_AT, CLAIMS_AT, ROWS_WORD, Extent, Row
from dask_shm_plugin.memberbook import Member
from dask_shm_plugin.stateword import DRAFT, FREE

TRIMMING = 0
"""The size of a draft that nobody will write: its pages are being given back to the operating system."""

_ODD_ROW = "the state of a block does not fit what is written beside it"


class BlockBook:
    """The rows of all blocks.

    Parameters
    ----------
    words
        The words of the whole table, for the header counts the rows in use.
    """

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self._rows = np.frombuffer(words, dtype=np.uint64)[BLOCKS_AT:CLAIMS_AT].reshape(BLOCKS, BLOCK)

    @property
    def in_use(self) -> int:
        """How many rows are or were in use, bounded by how many there are."""
        # Not checked here, for many ask without the mutex: somebody may be about to use one more.
        return min(self._words[ROWS_WORD], BLOCKS)

    # -- one row

    def state(self, index: int) -> tuple[int, int]:
        """Return generation and state of a block."""
        return stateword.unpack(self._words[BLOCKS_AT + index * BLOCK])

    def generation(self, index: int) -> int:
        """Return the present or last generation of a block."""
        return self.state(index)[0]

    def owner(self, index: int) -> Member:
        """Return who writes a draft."""
        at = BLOCKS_AT + index * BLOCK
        return Member(self._words[at + 4], self._words[at + 5])

    def extent(self, index: int) -> Extent:
        """Return where a block lies."""
        at = BLOCKS_AT + index * BLOCK
        return Extent(self._words[at + 1], self._words[at + 2])

    def enter(self, extent: Extent, size: int, owner: Member) -> Row:
        """Enter a draft.

        Raises
        ------
        TableFull
            All rows are taken.
        """
        in_use = self.in_use
        index = self._free_row(in_use)
        at = BLOCKS_AT + index * BLOCK
        generation = self.generation(index) + 1
        if generation >= stateword.GENERATIONS:
            raise TableCorrupt("there was never such a generation")
        body = (extent.offset, extent.length, size, *owner)
        if index == in_use:
            self._words[at] = stateword.pack(generation - 1, FREE)
            self._words[ROWS_WORD] = index + 1
        for n, word in enumerate(body, 1):
            self._words[at + n] = word
        self._words[at] = stateword.pack(generation, DRAFT, body)
        return Row(index, generation)

    def turn(self, row: Row, state: int, body: list[int]) -> None:
        """Give a draft or block another state; what is written beside it, as :meth:`demand` has returned it, stays."""
        self._words[BLOCKS_AT + row.index * BLOCK] = stateword.pack(row.generation, state, body)

    def free(self, index: int) -> Extent:
        """Make a row free, and return the extent that it had."""
        _, offset, length, *_ = self.row(index)
        self._words[BLOCKS_AT + index * BLOCK] = stateword.pack(self.generation(index), FREE)
        return Extent(offset, length)

    def demand(self, row: Row, state: int) -> list[int]:
        """Demand that a row is in a generation and a state.

        Returns
        -------
        list
            What is written beside the state: offset, length and size in bytes, and the two numbers of the owner.

        Raises
        ------
        StaleBlock
            It is not, or not any more.
        TableCorrupt
            What it says is not what was written there.
        """
        if not 0 <= row.index < BLOCKS:
            raise StaleBlock(f"there is no block {row.index}")
        if self.state(row.index) != (row.generation, state):
            raise StaleBlock(f"generation {row.generation} of block {row.index} is not there any more")
        return self.row(row.index)[1:]

    def row(self, index: int) -> list[int]:
        """Return the words of a row, the deciding one first.

        Raises
        ------
        TableCorrupt
            They are not what was written there.
        """
        at = BLOCKS_AT + index * BLOCK
        words: list[int] = self._words[at : at + stateword.WORDS].tolist()
        if not stateword.is_sound(words[0], words[1:]):
            raise TableCorrupt(_ODD_ROW)
        return words

    # -- all rows

    def deciding_words(self) -> npt.NDArray[np.uint64]:
        """Return the first word of each row that was ever used, not checked."""
        return self._used()[:, 0]

    def generations(self) -> npt.NDArray[np.uint64]:
        """Return the generation of each row, shape (BLOCKS,)."""
        return stateword.generations(self._rows[:, 0])

    def lengths(self, indices: npt.NDArray[np.intp]) -> npt.NDArray[np.uint64]:
        """Return the bytes that some blocks take."""
        column: npt.NDArray[np.uint64] = self._rows[indices, 2]
        return column

    def rows(self) -> npt.NDArray[np.uint64]:
        """Return a copy of each row that was ever used, shape (n, BLOCK).

        Raises
        ------
        TableCorrupt
            One is not as it was written.
        """
        # The copy is what is checked: somebody may scribble at any moment.
        rows: npt.NDArray[np.uint64] = self._used().copy()
        if not stateword.are_sound(rows):
            raise TableCorrupt(_ODD_ROW)
        return rows

    def taken(self) -> npt.NDArray[np.uint64]:
        """Return offset and length of every draft and block, shape (n, 2), in no order; raises as :meth:`rows` does."""
        return taken(self.rows())

    def taken_by_now(self) -> npt.NDArray[np.uint64]:
        """Return what :meth:`taken` does. Needs no mutex: a row may be in change, and so is not checked."""
        return taken(self._used())

    def bytes_held(self) -> int:
        """Return the bytes of all blocks and drafts but those under which pages are given back: these are free."""
        used = self._used()
        is_trimmed = _are_drafts(used) & (used[:, 3] == TRIMMING)
        return int(np.sum(used[(stateword.states(used[:, 0]) != FREE) & ~is_trimmed, 2]))

    def drafts(self) -> npt.NDArray[np.uint64]:
        """Return offset and length of every draft that is being written, shape (n, 2). Needs no mutex, as an estimate."""
        used = self._used()
        rows: npt.NDArray[np.uint64] = used[_are_drafts(used) & (used[:, 3] != TRIMMING), 1:3]
        return rows

    def is_trimmed(self) -> bool:
        """Tell whether pages are being given back just now. Needs no mutex."""
        used = self._used()
        return bool(np.any(_are_drafts(used) & (used[:, 3] == TRIMMING)))

    def drafts_of(self, member: Member) -> list[Row]:
        """Return the drafts of one member."""
        used = self._used()
        own = (used[:, 4] == member.slot) & (used[:, 5] == member.incarnation)
        return [Row(int(index), self.generation(int(index))) for index in np.flatnonzero(_are_drafts(used) & own)]

    # -- inside

    def _used(self) -> npt.NDArray[np.uint64]:
        # Asked for once in each look, for somebody may take one more row meanwhile.
        return self._rows[: self.in_use]

    def _free_row(self, in_use: int) -> int:
        are_free = stateword.states(self._rows[:in_use, 0]) == FREE
        if in_use and are_free[lowest := int(are_free.argmax())]:
            return lowest
        if in_use == BLOCKS:
            raise TableFull(
                f"the arena holds {BLOCKS} blocks; raise shm.threshold so that fewer and larger values are shared"
            )
        return in_use


def taken(rows: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return offset and length of those rows that are drafts and blocks, shape (n, 2)."""
    parts: npt.NDArray[np.uint64] = rows[stateword.states(rows[:, 0]) != FREE, 1:3]
    return parts


def _are_drafts(rows: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    drafts: npt.NDArray[np.bool_] = stateword.states(rows[:, 0]) == DRAFT
    return drafts
