"""Who refers to which block: the reference-count table, pure, over any writable buffer.

Layout, in words of eight bytes, native order::

    header   magic+version, arena id (2 words), capacity, change counter, next incarnation, rows in use, reserved
    members  see ``memberbook``
    roles    see ``rolebook``
    blocks   BLOCKS rows of   [tag | generation | state, offset, extent, size, owner slot, owner incarnation,
                               reserved x 2]; the first word see ``stateword``
    claims   per member a row of BLOCKS generations: "this member refers to that generation of that block"

A block is FREE, then DRAFT (its owner writes it), then SEALED (nobody ever writes it again), then FREE. Its *generation*
grows each time it is reserved, so a descriptor of an earlier use is recognised. A claim is a generation, not a count:
a count cannot be repaired after a death, a set of (member, block, generation) can.

House rules.

1. Every method but ``is_live`` wants the caller to hold the arena's mutex. A death may come between any two stores.
2. Each change writes its deciding word last: the state word of a row. What stands in the other words of a FREE row
   means nothing.
3. A claim row is written by its member, and by whoever reclaims the member after its death was *proved*.
4. Free space is computed from the rows; no store exists that would have to be undone.
5. Anybody may have written anything here. Before a row is gone by, its tag is checked; a number that becomes an index is
   bounded. What only becomes a figure is not checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dask_shm_plugin import memberbook, rolebook, stateword
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import StaleBlock, TableCorrupt, TableFull
from dask_shm_plugin.memberbook import Member, MemberBook
from dask_shm_plugin.rolebook import Role, RoleBook
from dask_shm_plugin.stateword import DRAFT, FREE, SEALED

LAYOUT_VERSION = 3
_MAGIC = int.from_bytes(b"daskshm" + bytes([LAYOUT_VERSION]), "little")

TRIMMING = 0
"""The size of a draft that nobody will write: its pages are being given back to the operating system."""

SPREAD = 4
"""How many times the capacity there are offsets for blocks: gaps between them take no memory."""

MEMBERS = memberbook.SLOTS
BLOCKS = 16384

_HEADER = 8
_BLOCK = 8
_MEMBERS_AT = _HEADER
_ROLES_AT = _MEMBERS_AT + memberbook.WORDS
_BLOCKS_AT = -(-(_ROLES_AT + rolebook.WORDS) // 512) * 512
_CLAIMS_AT = _BLOCKS_AT + BLOCKS * _BLOCK

SHARED_BYTES = _CLAIMS_AT * 8
"""Bytes of the part that every member reads: header, members, roles, blocks."""
CLAIM_BYTES = BLOCKS * 8
"""Bytes of one member's row of claims."""
TABLE_BYTES = SHARED_BYTES + MEMBERS * CLAIM_BYTES
"""Bytes of the whole table."""

_ODD_ROW = "the state of a block does not fit what is written beside it"

_MAGIC_WORD, _ID_WORD, _CAPACITY_WORD, _CHANGES_WORD, _INCARNATION_WORD, _ROWS_WORD = 0, 1, 3, 4, 5, 6


class Row(NamedTuple):
    """One generation of one block."""

    # Shadows the method of tuples, which nobody needs here.
    index: int  # type: ignore[assignment]
    generation: int


class Weight(NamedTuple):
    """What a member's references weigh, in bytes: its share of each block, and the blocks that nobody else has."""

    share: int
    alone: int


class Extent(NamedTuple):
    """A part of the arena, in bytes, aligned to pages."""

    offset: int
    length: int


def at_most(size: int) -> int:
    """Return how many bytes of memory a segment of some size may take: the table, and blocks up to the capacity."""
    return TABLE_BYTES + (size - TABLE_BYTES) // SPREAD


def claims_offset(slot: int) -> int:
    """Return where in the table, in bytes, the claims of a member lie."""
    return SHARED_BYTES + slot * CLAIM_BYTES


class Table:
    """The rows of one arena.

    Parameters
    ----------
    buffer
        ``TABLE_BYTES`` writable bytes, formatted before by :meth:`format`.

    Raises
    ------
    TableCorrupt
        The buffer is too short, or was laid out by another version.

    Attributes
    ----------
    arena_id
        Sixteen random bytes that name this arena and no other.
    capacity
        Bytes that all blocks together may have.
    """

    def __init__(self, buffer: memoryview) -> None:
        if len(buffer) < TABLE_BYTES:
            raise TableCorrupt(f"a table needs {TABLE_BYTES} bytes, not {len(buffer)}")
        self._words = buffer[:TABLE_BYTES].cast("Q")
        if self._words[_MAGIC_WORD] != _MAGIC:
            raise TableCorrupt("no table of this version of dask_shm_plugin")
        self.arena_id = b"".join(self._words[_ID_WORD + k].to_bytes(8, "little") for k in (0, 1))
        self.capacity = self._words[_CAPACITY_WORD]
        self._rows_seen = 0
        words = np.frombuffer(self._words, dtype=np.uint64)
        self._book = MemberBook(self._words[_MEMBERS_AT:_ROLES_AT])
        self._roles = RoleBook(self._words[_ROLES_AT : _ROLES_AT + rolebook.WORDS])
        self._blocks = words[_BLOCKS_AT:_CLAIMS_AT].reshape(BLOCKS, _BLOCK)
        self._claims = words[_CLAIMS_AT:].reshape(MEMBERS, BLOCKS)

    @classmethod
    def format(cls, buffer: memoryview, arena_id: bytes, capacity: int) -> Table:
        """Lay out an empty table over zeroed memory."""
        words = buffer[:TABLE_BYTES].cast("Q")
        words[_ID_WORD] = int.from_bytes(arena_id[:8], "little")
        words[_ID_WORD + 1] = int.from_bytes(arena_id[8:16], "little")
        words[_CAPACITY_WORD] = capacity
        words[_MAGIC_WORD] = _MAGIC
        return cls(buffer)

    # -- the arena as a whole

    @property
    def span(self) -> int:
        """Where the offsets of blocks end."""
        return SPREAD * self.capacity

    @property
    def changes(self) -> int:
        """A number that grows whenever a block is reserved or freed."""
        return self._words[_CHANGES_WORD]

    # -- members

    def vacant(self) -> list[int]:
        """Return the slots that nobody has. The pages of its claims must exist before :meth:`join` enters one."""
        return self._book.vacant()

    def join(self, slot: int, pid: int, started: int) -> Member:
        """Enter a process as the member of a vacant slot, with no claims."""
        incarnation = self._words[_INCARNATION_WORD] + 1
        _insist(incarnation < memberbook.INCARNATIONS, "there was never such an incarnation")
        self._words[_INCARNATION_WORD] = incarnation
        member = Member(slot, incarnation)
        self._book.enter(member, pid, started)
        return member

    def reserved_bytes(self) -> int:
        """Return the bytes of the table whose pages exist: the common part, and the claims of slots ever taken."""
        return SHARED_BYTES + CLAIM_BYTES * len(self._book.slots_ever_taken())

    def is_live(self, member: Member) -> bool:
        """Tell whether this very incarnation is entered. Needs no mutex: it reads one word."""
        return self._book.is_live(member)

    def note_other_shared(self, member: Member, size: int) -> None:
        """Note how much shared memory, in bytes, a member's process uses that is not the arena's."""
        self._book.note_other_shared(member, size)

    def other_shared(self, pid: int, started: int) -> int | None:
        """Return what a process has noted by :meth:`note_other_shared`, or None where it is no member."""
        return self._book.other_shared(pid, started)

    def members(self) -> list[Member]:
        """Return all members."""
        return self._book.members()

    @step("reclaim")
    def reclaim(self, member: Member) -> list[Extent]:
        """Take back everything that a member holds, and its slot; return the extents that became free.

        For a member that leaves, and for one whose death is proved.
        """
        if not self.is_live(member):
            return []
        held = self._claimed_by(member) + self._drafts_of(member)
        freed = [extent for row in held if (extent := self.release(row, member))]
        self._claims[member.slot, : self._rows_in_use] = 0
        self._roles.remove_all(member)
        self._book.cross_out(member)
        return freed

    def has_drafts(self, member: Member) -> bool:
        """Tell whether a member has drafts. Needs no mutex: a change meanwhile makes the answer old."""
        return bool(self._drafts_of(member))

    @step("reclaim drafts")
    def reclaim_drafts(self, member: Member) -> list[Extent]:
        """Take back the drafts of a member whose process is proved to be gone; return the extents that became free."""
        return [extent for row in self._drafts_of(member) if (extent := self.release(row, member))]

    # -- roles

    def add_role(self, member: Member, kind: str, address: str) -> None:
        """Note that a member plays a role at an address."""
        self._roles.add(Role(member, kind, address))

    def remove_role(self, member: Member, kind: str, address: str) -> None:
        """Undo :meth:`add_role`."""
        self._roles.remove(Role(member, kind, address))

    def roles(self) -> list[Role]:
        """Return the roles of all members."""
        return [role for role in self._roles if self.is_live(role.member)]

    # -- blocks

    @step("reserve")
    def reserve(self, extent: Extent, size: int, owner: Member) -> Row:
        """Enter a draft over an extent that the caller knows to be free.

        Raises
        ------
        TableFull
            All ``BLOCKS`` rows are taken.
        """
        index = self._free_row()
        at = _BLOCKS_AT + index * _BLOCK
        generation = self._generation(index) + 1
        _insist(generation < stateword.GENERATIONS, "there was never such a generation")
        body = (extent.offset, extent.length, size, *owner)
        if index == self._rows_in_use:
            self._words[at] = stateword.pack(generation - 1, FREE)
            self._words[_ROWS_WORD] = index + 1
        for n, word in enumerate(body, 1):
            self._words[at + n] = word
        self._count_change()
        self._words[at] = stateword.pack(generation, DRAFT, body)
        return Row(index, generation)

    @step("seal")
    def seal(self, row: Row, owner: Member) -> None:
        """Turn a draft into a block that its owner refers to."""
        self._demand(row, DRAFT)
        self._claims[owner.slot, row.index] = row.generation
        at = _BLOCKS_AT + row.index * _BLOCK
        self._words[at] = stateword.pack(row.generation, SEALED, self._words[at + 1 : at + stateword.WORDS].tolist())

    @step("acquire")
    def acquire(self, row: Row, member: Member) -> Extent:
        """Note that a member refers to a sealed block.

        Raises
        ------
        StaleBlock
            That generation is not there any more, or not yet sealed.
        TableCorrupt
            What the row says is not what was written there.
        """
        self._demand(row, SEALED)
        self._claims[member.slot, row.index] = row.generation
        return self.extent(row.index)

    @step("release")
    def release(self, row: Row, member: Member) -> Extent | None:
        """Drop what a member has of a block, its claim or its draft; return the extent if that made it free."""
        is_mine = self._claims[member.slot, row.index] == row.generation
        is_at = stateword.unpack(self._word(row.index))
        is_last = is_at == (row.generation, SEALED) and self._count_claims(row.index) == int(is_mine)
        is_draft = is_at == (row.generation, DRAFT) and self._owner(row.index) == member
        # There must never be a moment when a block is sealed and unclaimed: nobody's death would free it.
        freed = self._free(row.index) if is_last or is_draft else None
        if is_mine:
            self._claims[member.slot, row.index] = 0
        return freed

    def holders(self, index: int) -> int:
        """Return how many members refer to the present generation of a block."""
        return int(np.count_nonzero(self._claims[:, index][self._book.slots()] == np.uint64(self._generation(index))))

    def count_holders(self, rows: Sequence[Row]) -> npt.NDArray[np.intp]:
        """Count the members that refer to each of some blocks. Needs no mutex: a change meanwhile makes it old."""
        indices = np.fromiter((row.index for row in rows), np.intp, len(rows))
        generations = np.fromiter((row.generation for row in rows), np.uint64, len(rows))
        claims = self._claims[np.ix_(self._book.slots(), indices)]
        return np.asarray(np.count_nonzero(claims == generations, axis=0))

    def weigh(self, member: Member) -> Weight:
        """Weigh what a member refers to. Needs no mutex: a change meanwhile makes the weight old, not wrong."""
        claims = self._claims[member.slot, : self._rows_in_use]
        mine = np.flatnonzero(claims)
        if len(mine) == 0:
            return Weight(0, 0)
        holders = np.count_nonzero(self._claims[np.ix_(self._book.slots(), mine)] == claims[mine], axis=0)
        lengths = self._blocks[mine, 2]
        return Weight(int(np.sum(lengths / np.maximum(holders, 1))), int(np.sum(lengths[holders <= 1])))

    def extent(self, index: int) -> Extent:
        """Return where a block lies."""
        at = _BLOCKS_AT + index * _BLOCK
        return Extent(self._words[at + 1], self._words[at + 2])

    def size(self, index: int) -> int:
        """Return how many bytes of its extent a block uses."""
        return self._words[_BLOCKS_AT + index * _BLOCK + 3]

    def taken(self) -> npt.NDArray[np.uint64]:
        """Return offset and length of every draft and block, shape (n, 2), in no order.

        Raises
        ------
        TableCorrupt
            A row does not say what was written there.
        """
        _insist(stateword.are_sound(self._used_rows()), _ODD_ROW)
        return self.taken_by_now()

    def taken_by_now(self) -> npt.NDArray[np.uint64]:
        """Return what :meth:`taken` does, without the mutex: a row may be in change, and so is not checked."""
        used = self._used_rows()
        rows: npt.NDArray[np.uint64] = used[stateword.states(used[:, 0]) != FREE, 1:3]
        return rows

    def drafts(self) -> npt.NDArray[np.uint64]:
        """Return offset and length of every draft that is being written, shape (n, 2). Needs no mutex, as an estimate."""
        used = self._used_rows()
        drafts = stateword.states(used[:, 0]) == DRAFT
        rows: npt.NDArray[np.uint64] = used[drafts & (used[:, 3] != TRIMMING), 1:3]
        return rows

    def is_trimmed(self) -> bool:
        """Tell whether pages are being given back just now."""
        used = self._used_rows()
        drafts = stateword.states(used[:, 0]) == DRAFT
        return bool(np.any(drafts & (used[:, 3] == TRIMMING)))

    def count(self) -> int:
        """Return the number of drafts and blocks."""
        return len(self.taken())

    # -- what must always hold

    def check(self, member: Member | None = None, referred: Iterable[Row] = ()) -> None:
        """Check, quickly, that nobody has written here who must not.

        Parameters
        ----------
        member
            Who asks, if it has joined.
        referred
            What it refers to.

        Raises
        ------
        TableCorrupt
            With what is wrong.
        """
        _insist(self._words[_MAGIC_WORD] == _MAGIC, "its beginning was overwritten")
        _insist(self._words[_CAPACITY_WORD] == self.capacity, "its capacity was changed")
        _insist(member is None or self._book.is_live(member), "this process was crossed out")
        rows = self._words[_ROWS_WORD]
        _insist(self._rows_seen <= rows <= BLOCKS, "there were never so many rows, or so few")
        _insist(rows == BLOCKS or self._state(rows) == FREE, "there are more rows in use than it says")
        self._rows_seen = rows
        for index, generation in referred:
            at = stateword.unpack(self._word(index))
            _insist(at in ((generation, DRAFT), (generation, SEALED)), "a block that is in use was freed")
            is_mine = member is None or self._claims[member.slot, index] == generation
            _insist(at[1] == DRAFT or is_mine, "a claim of this process was crossed out")

    def validate(self) -> None:
        """Check the invariants.

        Raises
        ------
        TableCorrupt
            With the first one that is broken.
        """
        taken = self.taken()
        taken = taken[np.argsort(taken[:, 0])]
        ends = taken[:, 0] + taken[:, 1]
        _insist(bool(np.all(ends[:-1] <= taken[1:, 0])), "two blocks overlap")
        _insist(len(taken) == 0 or int(ends[-1]) <= self.span, "a block ends behind the arena")
        _insist(int(np.sum(taken[:, 1])) <= self.capacity, "the blocks are more than the capacity")
        _insist(bool(np.all(taken[:, 1] > 0)), "a block is empty")
        for index in range(self._rows_in_use):
            state = self._state(index)
            _insist(state in (FREE, DRAFT, SEALED), "a block is in no known state")
            if state == SEALED:
                _insist(self.holders(index) > 0, "nobody refers to a sealed block")
            if state == DRAFT:
                _insist(self.is_live(self._owner(index)), "a draft has no owner")
        for member in self.members():
            generations = self._claims[member.slot]
            beyond = generations > stateword.generations(self._blocks[:, 0])
            _insist(not np.any(beyond), "a claim is younger than its block")

    # -- inside

    @property
    def _rows_in_use(self) -> int:
        # Not checked here, for many ask without the mutex: somebody may be about to use one more.
        return min(self._words[_ROWS_WORD], BLOCKS)

    def _used_rows(self) -> npt.NDArray[np.uint64]:
        return self._blocks[: self._rows_in_use]

    def _word(self, index: int) -> int:
        return self._words[_BLOCKS_AT + index * _BLOCK]

    def _state(self, index: int) -> int:
        return stateword.unpack(self._word(index))[1]

    def _generation(self, index: int) -> int:
        return stateword.unpack(self._word(index))[0]

    def _owner(self, index: int) -> Member:
        at = _BLOCKS_AT + index * _BLOCK
        return Member(self._words[at + 4], self._words[at + 5])

    def _claimed_by(self, member: Member) -> list[Row]:
        claims = self._claims[member.slot, : self._rows_in_use]
        return [Row(int(index), int(claims[index])) for index in np.flatnonzero(claims)]

    def _drafts_of(self, member: Member) -> list[Row]:
        used = self._used_rows()
        drafts = stateword.states(used[:, 0]) == DRAFT
        own = (used[:, 4] == member.slot) & (used[:, 5] == member.incarnation)
        return [Row(int(index), self._generation(int(index))) for index in np.flatnonzero(drafts & own)]

    def _free_row(self) -> int:
        in_use = self._rows_in_use
        free = np.flatnonzero(stateword.states(self._blocks[:in_use, 0]) == FREE)
        if len(free):
            return int(free[0])
        if in_use == BLOCKS:
            raise TableFull(
                f"the arena holds {BLOCKS} blocks; raise shm.threshold so that fewer and larger values are shared"
            )
        return in_use

    def _free(self, index: int) -> Extent:
        self._insist_on(index)
        extent = self.extent(index)
        self._count_change()
        self._words[_BLOCKS_AT + index * _BLOCK] = stateword.pack(self._generation(index), FREE)
        return extent

    def _count_change(self) -> None:
        self._words[_CHANGES_WORD] = (self._words[_CHANGES_WORD] + 1) % (1 << 64)

    def _count_claims(self, index: int) -> int:
        """Count the claims of a block; unlike :meth:`holders`, also of those who are only said to be no members."""
        claims = self._claims[:, index][self._book.slots_ever_taken()]
        _insist(not np.any(claims > self._generation(index)), "a claim is younger than its block")
        return int(np.count_nonzero(claims == self._generation(index)))

    def _demand(self, row: Row, state: int) -> None:
        if not 0 <= row.index < BLOCKS:
            raise StaleBlock(f"there is no block {row.index}")
        if stateword.unpack(self._word(row.index)) != (row.generation, state):
            raise StaleBlock(f"generation {row.generation} of block {row.index} is not there any more")
        self._insist_on(row.index)

    def _insist_on(self, index: int) -> None:
        """Insist that a draft or block is as it was written."""
        at = _BLOCKS_AT + index * _BLOCK
        word, *body = self._words[at : at + stateword.WORDS].tolist()
        _insist(stateword.is_sound(word, body), _ODD_ROW)


def _insist(holds: bool, otherwise: str) -> None:
    if not holds:
        raise TableCorrupt(otherwise)
