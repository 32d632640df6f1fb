"""The reference-count table of an arena: its blocks, its members, and their references. Pure, over a writable buffer.

For the layout see ``layout``.

A block is FREE, then DRAFT (its owner writes it), then SEALED (never written again), then FREE. Its *generation* grows
each time it is reserved, so a descriptor of an earlier use is recognised.

House rules.

1. The caller of a method must hold the arena's mutex, unless the method's docstring says that it needs none. A process
   may die between any two stores.
2. Each change of a block writes the state word of its row last. The other words of a FREE row have no meaning.
3. Free space is computed from the rows, so no store has to be undone after a death.
4. A stray write may have changed any word. A row's tag is checked before use, and a number that is used as an index is
   bounded. Numbers that are only reported are not checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import TableCorrupt
from dask_shm_plugin.table import layout, members, roles, state_word, tags
from dask_shm_plugin.table.blocks import BlockRows
from dask_shm_plugin.table.claims import Claims
from dask_shm_plugin.table.layout import (
    BLOCKS,
    CAPACITY_WORD,
    CREATED_WORD,
    ID_WORD,
    INCARNATION_WORD,
    MAGIC_WORD,
    MARK_WORD,
    ROWS_WORD,
    TABLE_BYTES,
    TRIMS_WORD,
    BlockId,
    Extent,
)
from dask_shm_plugin.table.members import Member, Members
from dask_shm_plugin.table.roles import RoleEntries, RoleEntry
from dask_shm_plugin.table.state_word import DRAFT, FREE, SEALED
from dask_shm_plugin.table.tags import Tags


class Table:
    """The rows of one arena.

    Parameters
    ----------
    buffer
        At least ``TABLE_BYTES`` writable bytes, formatted before by :meth:`format`.

    Raises
    ------
    TableCorrupt
        The buffer is too short, or was laid out by another version.

    Attributes
    ----------
    arena_id
        Sixteen random bytes that identify this arena.
    capacity
        Bytes that all blocks together may take.
    blocks
        The rows of all blocks, to read. Only this class changes them.
    marks
        The tags of all places in the members' directories. Need no mutex.
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
        self.members = Members(self._words[layout.MEMBERS_AT : layout.ROLES_AT])
        self._roles = RoleEntries(self._words[layout.ROLES_AT : layout.ROLES_AT + roles.WORDS])
        self.marks = Tags(self._words[layout.MARKS_AT : layout.MARKS_AT + tags.WORDS])
        self.blocks = BlockRows(self._words)
        self._claims = Claims(self._words[layout.CLAIMS_AT :])

    @classmethod
    def format(cls, buffer: memoryview, arena_id: bytes, capacity: int, now: float = 0) -> Table:
        """Lay out an empty table over zeroed memory; ``now`` is the time of the monotonic clock, in seconds."""
        words = buffer[:TABLE_BYTES].cast("Q")
        words[ID_WORD] = int.from_bytes(arena_id[:8], "little")
        words[ID_WORD + 1] = int.from_bytes(arena_id[8:16], "little")
        words[CAPACITY_WORD] = capacity
        words[CREATED_WORD] = int(now * 1000)
        words[MAGIC_WORD] = layout.MAGIC
        return cls(buffer)

    # -- the arena as a whole

    @property
    def span(self) -> int:
        """The end of the offsets of blocks, in bytes."""
        return layout.SPREAD * self.capacity

    @property
    def created(self) -> float:
        """The time of the monotonic clock, in seconds, at which the arena was created; 0 if it is not known."""
        return self._words[CREATED_WORD] / 1000

    @property
    def trims(self) -> int:
        """A counter that grows before free pages are given back.

        Needs no mutex for a caller that asks about the pages of its own draft: these are never given back.
        """
        return self._words[TRIMS_WORD]

    def count_trim(self) -> None:
        """Increment :attr:`trims`."""
        self._words[TRIMS_WORD] = (self._words[TRIMS_WORD] + 1) % (1 << 64)

    def note_use(self, used: int, now: float, period: float) -> None:
        """Update the high-water mark: the most bytes needed in the current period, and in the one before.

        Parameters
        ----------
        used
            Bytes that drafts and blocks take now; the private memory of the workers is added.
        now, period
            The time by a clock that all members share, and the length of a period, in seconds.
        """
        needed = max(0, used - self.members.bare()) + self.members.private()
        began, most = self._words[MARK_WORD], self._words[MARK_WORD + 1]
        age = now - began / 1000
        if 0 <= age <= period:
            if needed > most:
                self._words[MARK_WORD + 1] = needed
        else:
            self._words[MARK_WORD + 2] = most if 0 <= age <= 2 * period else needed
            self._words[MARK_WORD + 1] = needed
            self._words[MARK_WORD] = int(now * 1000)

    def most_needed(self, now: float, period: float) -> int:
        """Return the high-water mark: the most bytes needed within the last one to two periods.

        Only reservations update it: it is zero if there were none in that time, although blocks may be in use. Needs no
        mutex, as an estimate. Parameters as for :meth:`note_use`.
        """
        began, most, before = self._words[MARK_WORD : MARK_WORD + 3].tolist()
        age = now - began / 1000
        if not 0 <= age <= 2 * period:
            return 0
        return int(max(most, before) if age <= period else most)

    # -- members

    def vacant(self) -> list[int]:
        """Return the vacant slots. The pages of a slot's claims must exist before :meth:`join` enters it."""
        return self.members.vacant()

    def join(self, slot: int, pid: int, started: int) -> Member:
        """Enter a process, by pid and start time, as the member of a vacant slot, with no claims.

        Raises
        ------
        TableCorrupt
            The last incarnation has reached its limit, as after a stray write.
        """
        incarnation = self._words[INCARNATION_WORD] + 1
        _insist(incarnation < members.INCARNATIONS, "there was never such an incarnation")
        self._words[INCARNATION_WORD] = incarnation
        self.marks.unset_all(slot)
        member = Member(slot, incarnation)
        self.members.add(member, pid, started)
        return member

    def reserved_bytes(self) -> int:
        """Return the bytes of the table that have pages: the common part, and the claims of all slots ever taken.

        Needs no mutex, as an estimate.
        """
        return layout.SHARED_BYTES + layout.CLAIM_BYTES * len(self.members.slots_ever_taken())

    @step("reclaim")
    def reclaim(self, member: Member) -> list[Extent]:
        """Release all blocks, drafts and roles of a member, and its slot; return the extents that became free.

        For a member that leaves, or whose death is proved. Harmless if it is not live.
        """
        if not self.members.is_live(member):
            return []
        freed = [extent for row in self.held_by(member) if (extent := self.release(row, member))]
        self._claims.remove_all(member, self.blocks.in_use)
        self._roles.remove_all(member)
        self.members.remove(member)
        return freed

    def held_by(self, member: Member) -> list[BlockId]:
        """Return the blocks that a member claims, and its drafts."""
        return self._claims.of(member, self.blocks.in_use) + self.blocks.drafts_of(member)

    def has_drafts(self, member: Member) -> bool:
        """Tell whether a member has drafts. Needs no mutex: the answer may be out of date."""
        return bool(self.blocks.drafts_of(member))

    @step("reclaim drafts")
    def reclaim_drafts(self, member: Member) -> list[Extent]:
        """Release the drafts of a member after its process's death is proved; return the extents that became free."""
        return [extent for row in self.blocks.drafts_of(member) if (extent := self.release(row, member))]

    # -- roles

    def add_role(self, member: Member, kind: str, address: str) -> None:
        """Note that a member plays a role at an address."""
        self._roles.add(RoleEntry(member, kind, address))

    def remove_role(self, member: Member, kind: str, address: str) -> None:
        """Undo :meth:`add_role`."""
        self._roles.remove(RoleEntry(member, kind, address))

    def fingerprint_of_roles(self) -> bytes:
        """Return bytes to tell whether roles have changed, see :meth:`RoleEntries.fingerprint`. Needs no mutex."""
        return self._roles.fingerprint()

    def roles(self) -> list[RoleEntry]:
        """Return the roles of all live members. Needs no mutex, like :meth:`members`."""
        return [role for role in self._roles if self.members.is_live(role.member)]

    # -- blocks

    @step("reserve")
    def reserve(self, extent: Extent, size: int, owner: Member, now: float = 0) -> BlockId:
        """Enter a draft over an extent that the caller knows to be free.

        Parameters
        ----------
        extent
            Where the draft lies.
        size
            Bytes of the extent that will be used.
        owner
            The member that writes it.
        now
            The time of the monotonic clock, in seconds; it is only reported.

        Raises
        ------
        TableFull
            All ``BLOCKS`` rows are taken.
        TableCorrupt
            The generation of the row has reached its limit, as after a stray write.
        """
        return self.blocks.add(extent, size, owner, now)

    @step("seal")
    def seal(self, row: BlockId, owner: Member) -> None:
        """Turn a draft into a block to which its owner refers.

        Raises
        ------
        StaleBlock
            The row is not this draft any more.
        TableCorrupt
            The tag of the row is not valid.
        """
        body = self.blocks.demand(row, DRAFT)
        self._claims.add(owner, row)
        self.blocks.turn(row, SEALED, body)

    @step("acquire")
    def acquire(self, row: BlockId, member: Member) -> tuple[Extent, int]:
        """Note that a member refers to a sealed block; return its extent, and the bytes of the extent that it uses.

        Raises
        ------
        StaleBlock
            That generation of the block is gone, or is not sealed yet.
        TableCorrupt
            The tag of the row is not valid.
        """
        offset, length, size, *_ = self.blocks.demand(row, SEALED)
        self._claims.add(member, row)
        return Extent(offset, length), size

    @step("release")
    def release(self, row: BlockId, member: Member) -> Extent | None:
        """Drop a member's claim on a block, or its draft; return the extent if it became free.

        Raises
        ------
        TableCorrupt
            The tag of the row is not valid, or a claim is newer than the block.
        """
        is_mine = self._claims.has(member, row)
        is_at = self.blocks.state(row.index)
        is_last = is_at == (row.generation, SEALED) and self._count_claims(row.index) == int(is_mine)
        is_draft = is_at == (row.generation, DRAFT) and self.blocks.owner(row.index) == member
        # First free the row, then remove the last claim. There must never be a moment when a block is sealed and
        # unclaimed: no member's death would free it.
        freed = self.blocks.free(row.index) if is_last or is_draft else None
        if is_mine:
            self._claims.remove(member, row)
        return freed

    def holders(self, index: int) -> int:
        """Count the members that refer to the present generation of a block. Needs no mutex, as an estimate."""
        return int(
            np.count_nonzero(self._claims.on(index, self.members.slots()) == np.uint64(self.blocks.generation(index)))
        )

    def holders_of(self, row: BlockId) -> list[Member]:
        """Return the members that refer to a block. Needs no mutex: the answer may be out of date."""
        claims = self._claims.on(row.index, self.members.slots())
        return [one for one, claim in zip(self.members.live(), claims, strict=False) if claim == row.generation]

    def count_holders(self, rows: Sequence[BlockId]) -> npt.NDArray[np.intp]:
        """Count, for each of ``rows``, the members that refer to it. Needs no mutex: the counts may be out of date."""
        return self._claims.count(rows, self.members.slots())

    def share(self, member: Member) -> int:
        """Return the share of a member in the blocks to which it refers, in bytes.

        A block counts as its length over the number of its holders. Needs no mutex: the sum may be out of date.
        """
        mine, holders = self._claims.held(member, self.blocks.in_use, self.members.slots())
        return int(np.sum(self.blocks.lengths(mine) / np.maximum(holders, 1)))

    # -- invariants

    def check(self, member: Member | None = None, referred: Iterable[BlockId] = ()) -> None:
        """Check quickly for signs of stray writes to the table.

        Parameters
        ----------
        member
            The calling member, if it has joined.
        referred
            The blocks and drafts to which this member refers.

        Raises
        ------
        TableCorrupt
            Names the first sign that was found.
        """
        # Each entry into the table runs this check: the conditions are inline to save the calls of ``_insist``.
        rows = self._words[ROWS_WORD]
        if self._words[MAGIC_WORD] != layout.MAGIC:
            raise TableCorrupt("its beginning was overwritten")
        if self._words[CAPACITY_WORD] != self.capacity:
            raise TableCorrupt("its capacity was changed")
        if member is not None and not self.members.is_live(member):
            raise TableCorrupt("the entry of this process was removed")
        if not self._rows_seen <= rows <= BLOCKS:
            raise TableCorrupt("there were never so many rows, or so few")
        if rows != BLOCKS and self.blocks.state(rows)[1] != FREE:
            raise TableCorrupt("there are more rows in use than it says")
        self._rows_seen = rows
        blocks = list(referred)
        if blocks:
            self._check_referred(blocks, member)

    def _check_referred(self, referred: list[BlockId], member: Member | None) -> None:
        """Check that blocks and drafts are in use, and claimed; quickly, for a process may refer to thousands."""
        indices, generations = np.array(referred, np.uint64).T
        indices = indices.astype(np.intp)
        words = self.blocks.deciding_words()
        _insist(int(indices.max()) < len(words), "there were never so few rows")
        words = words[indices]
        states = state_word.states(words)
        is_used = (state_word.generations(words) == generations) & ((states == DRAFT) | (states == SEALED))
        _insist(bool(is_used.all()), "a block that is in use was freed")
        if member is not None:
            is_mine = self._claims.generations(member)[indices] == generations
            _insist(bool(((states == DRAFT) | is_mine).all()), "a claim of this process was removed")

    def validate(self) -> None:
        """Check all invariants of the table.

        Raises
        ------
        TableCorrupt
            Names the first invariant that does not hold.
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
                _insist(self.members.is_live(self.blocks.owner(index)), "a draft has no owner")
        for member in self.members.live():
            beyond = self._claims.generations(member) > self.blocks.generations()
            _insist(not np.any(beyond), "a claim is younger than its block")

    # -- inside

    def _count_claims(self, index: int) -> int:
        """Count the claims on the present generation of a block, of all slots that were ever taken.

        Unlike :meth:`holders`, this counts a live member whose entry a stray write has cleared.
        """
        claims = self._claims.on(index, self.members.slots_ever_taken())
        _insist(not np.any(claims > self.blocks.generation(index)), "a claim is younger than its block")
        return int(np.count_nonzero(claims == self.blocks.generation(index)))


def _insist(holds: bool, otherwise: str) -> None:
    if not holds:
        raise TableCorrupt(otherwise)
