"""Who refers to which block: the reference-count table, pure, over any writable buffer.

Where everything lies is said in ``layout``.

A block is FREE, then DRAFT (its owner writes it), then SEALED (nobody ever writes it again), then FREE. Its *generation*
grows each time it is reserved, so a descriptor of an earlier use is recognised.

House rules.

1. Every method wants the caller to hold the arena's mutex, unless it says that it needs none. A death may come between
   any two stores.
2. Each change writes its deciding word last: the state word of a row. What stands in the other words of a FREE row
   means nothing.
3. Free space is computed from the rows; no store exists that would have to be undone.
4. Anybody may have written anything here. Before a row is gone by, its tag is checked; a number that becomes an index is
   bounded. What only becomes a figure is not checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dask_shm_plugin import layout, markbook, memberbook, rolebook
from dask_shm_plugin.blockbook import BlockBook
from dask_shm_plugin.claimbook import ClaimBook
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import TableCorrupt
from dask_shm_plugin.layout import (
    BLOCKS,
    CAPACITY_WORD,
    ID_WORD,
    INCARNATION_WORD,
    MAGIC_WORD,
    MARK_WORD,
    ROWS_WORD,
    TABLE_BYTES,
    TRIMS_WORD,
    Extent,
    Row,
)
from dask_shm_plugin.markbook import MarkBook
from dask_shm_plugin.memberbook import Member, MemberBook
from dask_shm_plugin.rolebook import Role, RoleBook
from dask_shm_plugin.stateword import DRAFT, FREE, SEALED


class Weight(NamedTuple):
    """What a member's references weigh, in bytes: its share of each block, and the blocks that nobody else has."""

    share: int
    alone: int


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
    blocks
        The rows, for those who look at them all; they are changed here only.
    marks
        Which listings of whose directory are good. Need no mutex.
    """

    def __init__(self, buffer: memoryview) -> None:
        if len(buffer) < TABLE_BYTES:
            raise TableCorrupt(f"a table needs {TABLE_BYTES} bytes, not {len(buffer)}")
        self._words = buffer[:TABLE_BYTES].cast("Q")
        if self._words[MAGIC_WORD] != layout.MAGIC:
            raise TableCorrupt("no table of this version of dask_shm_plugin")
        self.arena_id = b"".join(self._words[ID_WORD + k].to_bytes(8, "little") for k in (0, 1))
        self.capacity = self._words[CAPACITY_WORD]
        self._rows_seen = 0
        self._book = MemberBook(self._words[layout.MEMBERS_AT : layout.ROLES_AT])
        self._roles = RoleBook(self._words[layout.ROLES_AT : layout.ROLES_AT + rolebook.WORDS])
        self.marks = MarkBook(self._words[layout.MARKS_AT : layout.MARKS_AT + markbook.WORDS])
        self.blocks = BlockBook(self._words)
        self._claims = ClaimBook(self._words[layout.CLAIMS_AT :])

    @classmethod
    def format(cls, buffer: memoryview, arena_id: bytes, capacity: int) -> Table:
        """Lay out an empty table over zeroed memory."""
        words = buffer[:TABLE_BYTES].cast("Q")
        words[ID_WORD] = int.from_bytes(arena_id[:8], "little")
        words[ID_WORD + 1] = int.from_bytes(arena_id[8:16], "little")
        words[CAPACITY_WORD] = capacity
        words[MAGIC_WORD] = layout.MAGIC
        return cls(buffer)

    # -- the arena as a whole

    @property
    def span(self) -> int:
        """Where the offsets of blocks end."""
        return layout.SPREAD * self.capacity

    @property
    def trims(self) -> int:
        """A number that grows before free pages are given back. Needs no mutex, for those who have a draft there."""
        return self._words[TRIMS_WORD]

    def count_trim(self) -> None:
        """Let :attr:`trims` grow."""
        self._words[TRIMS_WORD] = (self._words[TRIMS_WORD] + 1) % (1 << 64)

    def note_use(self, used: int, now: float, period: float) -> None:
        """Note that drafts and blocks take so many bytes.

        Parameters
        ----------
        used
            Bytes.
        now, period
            A clock that all members share, and how long a period is, in seconds.
        """
        began, most = self._words[MARK_WORD], self._words[MARK_WORD + 1]
        age = now - began / 1000
        if 0 <= age <= period:
            if used > most:
                self._words[MARK_WORD + 1] = used
        else:
            self._words[MARK_WORD + 2] = most if 0 <= age <= 2 * period else used
            self._words[MARK_WORD + 1] = used
            self._words[MARK_WORD] = int(now * 1000)

    def most_used(self, now: float, period: float) -> int:
        """Return the most bytes that drafts and blocks have taken for one to two periods, or less where nothing was reserved.

        Needs no mutex, as an estimate. Parameters as of :meth:`note_use`.
        """
        began, most, before = self._words[MARK_WORD : MARK_WORD + 3].tolist()
        age = now - began / 1000
        if not 0 <= age <= 2 * period:
            return 0
        return int(max(most, before) if age <= period else most)

    # -- members

    def vacant(self) -> list[int]:
        """Return the slots that nobody has. The pages of its claims must exist before :meth:`join` enters one."""
        return self._book.vacant()

    def join(self, slot: int, pid: int, started: int) -> Member:
        """Enter a process as the member of a vacant slot, with no claims."""
        incarnation = self._words[INCARNATION_WORD] + 1
        _insist(incarnation < memberbook.INCARNATIONS, "there was never such an incarnation")
        self._words[INCARNATION_WORD] = incarnation
        self.marks.unset_all(slot)
        member = Member(slot, incarnation)
        self._book.enter(member, pid, started)
        return member

    def reserved_bytes(self) -> int:
        """Return the bytes of the table whose pages exist: the common part, and the claims of slots ever taken."""
        return layout.SHARED_BYTES + layout.CLAIM_BYTES * len(self._book.slots_ever_taken())

    def is_live(self, member: Member) -> bool:
        """Tell whether this very incarnation is entered. Needs no mutex: it reads one word."""
        return self._book.is_live(member)

    def note_other_shared(self, member: Member, size: int) -> None:
        """Note how much shared memory, in bytes, a member's process uses that is not the arena's."""
        self._book.note_other_shared(member, size)

    def other_shared(self, member: Member) -> int:
        """Return what a member has noted by :meth:`note_other_shared`."""
        return self._book.other_shared(member)

    def find(self, pid: int, started: int) -> Member | None:
        """Return the member that a process is, if it is one. Needs no mutex, like :meth:`members`."""
        return self._book.find(pid, started)

    def note_memory(self, member: Member, private: int, limit: int) -> None:
        """Note how much memory, in bytes, a member's process has of its own, and how much its workers may have; zero: no worker."""
        self._book.note_memory(member, private, limit)

    def memory_of_workers(self) -> list[tuple[int, int, int]]:
        """Return process, private memory and limit, in bytes, of each member that has noted a limit. Needs no mutex."""
        return self._book.memory_of_workers()

    def members(self) -> list[Member]:
        """Return all members. Needs no mutex: who comes or goes meanwhile may be missing, or still be there."""
        return self._book.members()

    @step("reclaim")
    def reclaim(self, member: Member) -> list[Extent]:
        """Take back everything that a member holds, and its slot; return the extents that became free.

        For a member that leaves, and for one whose death is proved.
        """
        if not self.is_live(member):
            return []
        freed = [extent for row in self.held_by(member) if (extent := self.release(row, member))]
        self._claims.cross_out_all(member, self.blocks.in_use)
        self._roles.remove_all(member)
        self._book.cross_out(member)
        return freed

    def held_by(self, member: Member) -> list[Row]:
        """Return the claims and drafts of a member."""
        return self._claims.of(member, self.blocks.in_use) + self.blocks.drafts_of(member)

    def has_drafts(self, member: Member) -> bool:
        """Tell whether a member has drafts. Needs no mutex: a change meanwhile makes the answer old."""
        return bool(self.blocks.drafts_of(member))

    @step("reclaim drafts")
    def reclaim_drafts(self, member: Member) -> list[Extent]:
        """Take back the drafts of a member whose process is proved to be gone; return the extents that became free."""
        return [extent for row in self.blocks.drafts_of(member) if (extent := self.release(row, member))]

    # -- roles

    def add_role(self, member: Member, kind: str, address: str) -> None:
        """Note that a member plays a role at an address."""
        self._roles.add(Role(member, kind, address))

    def remove_role(self, member: Member, kind: str, address: str) -> None:
        """Undo :meth:`add_role`."""
        self._roles.remove(Role(member, kind, address))

    def fingerprint_of_roles(self) -> bytes:
        """Return what changes whenever a role comes or goes. Needs no mutex."""
        return self._roles.fingerprint()

    def roles(self) -> list[Role]:
        """Return the roles of all members. Needs no mutex, like :meth:`members`."""
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
        return self.blocks.enter(extent, size, owner)

    @step("seal")
    def seal(self, row: Row, owner: Member) -> None:
        """Turn a draft into a block that its owner refers to."""
        body = self.blocks.demand(row, DRAFT)
        self._claims.enter(owner, row)
        self.blocks.turn(row, SEALED, body)

    @step("acquire")
    def acquire(self, row: Row, member: Member) -> tuple[Extent, int]:
        """Note that a member refers to a sealed block; return where it lies, and how many bytes of that it uses.

        Raises
        ------
        StaleBlock
            That generation is not there any more, or not yet sealed.
        TableCorrupt
            What the row says is not what was written there.
        """
        offset, length, size, *_ = self.blocks.demand(row, SEALED)
        self._claims.enter(member, row)
        return Extent(offset, length), size

    @step("release")
    def release(self, row: Row, member: Member) -> Extent | None:
        """Drop what a member has of a block, its claim or its draft; return the extent if that made it free."""
        is_mine = self._claims.has(member, row)
        is_at = self.blocks.state(row.index)
        is_last = is_at == (row.generation, SEALED) and self._count_claims(row.index) == int(is_mine)
        is_draft = is_at == (row.generation, DRAFT) and self.blocks.owner(row.index) == member
        # There must never be a moment when a block is sealed and unclaimed: nobody's death would free it.
        freed = self.blocks.free(row.index) if is_last or is_draft else None
        if is_mine:
            self._claims.cross_out(member, row)
        return freed

    def holders(self, index: int) -> int:
        """Return how many members refer to the present generation of a block."""
        return int(
            np.count_nonzero(self._claims.on(index, self._book.slots()) == np.uint64(self.blocks.generation(index)))
        )

    def count_holders(self, rows: Sequence[Row]) -> npt.NDArray[np.intp]:
        """Count the members that refer to each of some blocks. Needs no mutex: a change meanwhile makes it old."""
        return self._claims.count(rows, self._book.slots())

    def weigh(self, member: Member) -> Weight:
        """Weigh what a member refers to. Needs no mutex: a change meanwhile makes the weight old, not wrong."""
        mine, holders = self._claims.held(member, self.blocks.in_use, self._book.slots())
        lengths = self.blocks.lengths(mine)
        return Weight(int(np.sum(lengths / np.maximum(holders, 1))), int(np.sum(lengths[holders <= 1])))

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
        # Entering the table means coming by here, so what holds costs no call.
        rows = self._words[ROWS_WORD]
        if self._words[MAGIC_WORD] != layout.MAGIC:
            raise TableCorrupt("its beginning was overwritten")
        if self._words[CAPACITY_WORD] != self.capacity:
            raise TableCorrupt("its capacity was changed")
        if member is not None and not self._book.is_live(member):
            raise TableCorrupt("this process was crossed out")
        if not self._rows_seen <= rows <= BLOCKS:
            raise TableCorrupt("there were never so many rows, or so few")
        if rows != BLOCKS and self.blocks.state(rows)[1] != FREE:
            raise TableCorrupt("there are more rows in use than it says")
        self._rows_seen = rows
        for index, generation in referred:
            at = self.blocks.state(index)
            _insist(at in ((generation, DRAFT), (generation, SEALED)), "a block that is in use was freed")
            is_mine = member is None or self._claims.has(member, Row(index, generation))
            _insist(at[1] == DRAFT or is_mine, "a claim of this process was crossed out")

    def validate(self) -> None:
        """Check the invariants.

        Raises
        ------
        TableCorrupt
            With the first one that is broken.
        """
        taken = self.blocks.taken()
        taken = taken[np.argsort(taken[:, 0])]
        ends = taken[:, 0] + taken[:, 1]
        _insist(bool(np.all(ends[:-1] <= taken[1:, 0])), "two blocks overlap")
        _insist(len(taken) == 0 or int(ends[-1]) <= self.span, "a block ends behind the arena")
        _insist(self.blocks.bytes_held() <= self.capacity, "the blocks are more than the capacity")
        _insist(bool(np.all(taken[:, 1] > 0)), "a block is empty")
        for index in range(self.blocks.in_use):
            state = self.blocks.state(index)[1]
            _insist(state in (FREE, DRAFT, SEALED), "a block is in no known state")
            if state == SEALED:
                _insist(self.holders(index) > 0, "nobody refers to a sealed block")
            if state == DRAFT:
                _insist(self.is_live(self.blocks.owner(index)), "a draft has no owner")
        for member in self.members():
            beyond = self._claims.generations(member) > self.blocks.generations()
            _insist(not np.any(beyond), "a claim is younger than its block")

    # -- inside

    def _count_claims(self, index: int) -> int:
        """Count the claims of a block; unlike :meth:`holders`, also of those who are only said to be no members."""
        claims = self._claims.on(index, self._book.slots_ever_taken())
        _insist(not np.any(claims > self.blocks.generation(index)), "a claim is younger than its block")
        return int(np.count_nonzero(claims == self.blocks.generation(index)))


def _insist(holds: bool, otherwise: str) -> None:
    if not holds:
        raise TableCorrupt(otherwise)
