"""The table behaves like a model: a dict of blocks, each with its state, its extent and the set of its holders."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from deaths import dies
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, precondition, rule

from dask_shm_plugin.exceptions import StaleBlock
from dask_shm_plugin.table import layout, placement
from dask_shm_plugin.table.layout import MEMBERS, TABLE_BYTES, BlockId, Extent
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.table.roles import RoleEntry
from dask_shm_plugin.table.table import Table

pytestmark = pytest.mark.slow

PAGE = 4096
CAPACITY = 24 * PAGE


@dataclass
class Entry:
    """A draft, or a block with its holders."""

    extent: Extent
    size: int
    owner: Member
    is_sealed: bool = False
    holders: set[Member] = field(default_factory=set)


class TableMachine(RuleBasedStateMachine):
    """Several members act, each through a table object of its own over the same memory."""

    members = Bundle("members")
    rows = Bundle("rows")

    def __init__(self) -> None:
        super().__init__()
        self.buffer = np.zeros(TABLE_BYTES, np.uint8).data
        Table.format(self.buffer, bytes(16), CAPACITY)
        self.blocks: dict[BlockId, Entry] = {}
        self.ever: set[BlockId] = set()
        self.live: set[Member] = set()
        self.incarnations: set[int] = set()
        self.roles: list[RoleEntry] = []

    @property
    def table(self) -> Table:
        """A table as a process sees it that has just opened it: all state must be in the memory."""
        return Table(self.buffer)

    # ------------------------------------------------------------------------------------------------- members

    @rule(target=members, slot=st.integers(0, 5) | st.just(MEMBERS - 1))
    def join(self, slot: int) -> Member:
        """Let a process join, if the slot is vacant."""
        occupied = {member.slot for member in self.live}
        assert (slot in self.table.vacant()) == (slot not in occupied)
        if slot in occupied:
            return multiple()
        member = self.table.join(slot, 1, 1)
        assert member.incarnation not in self.incarnations
        self.incarnations.add(member.incarnation)
        self.live.add(member)
        return member

    @rule(member=members)
    def reclaim(self, member: Member) -> None:
        """Reclaim a member, because it leaves or is dead; if it has gone before, nothing happens."""
        freed = self.depart(member)
        assert sorted(self.table.reclaim(member)) == sorted(freed)

    @rule(member=members)
    def reclaim_drafts(self, member: Member) -> None:
        """Reclaim only the drafts of a member, as after its death while a forked child of it lives."""
        drafts = [row for row, entry in self.blocks.items() if not entry.is_sealed and entry.owner == member]
        freed = [self.blocks.pop(row).extent for row in drafts]
        assert sorted(self.table.reclaim_drafts(member)) == sorted(freed)

    @rule(member=members, other=members, data=st.data())
    def die(self, member: Member, other: Member, data: st.DataObject) -> None:
        """Let a member die before each store of each action that it can do now, and let others reclaim it.

        Each action changes only objects that the member alone has, or a claim of its own. So the moment of the death
        makes no difference, and nothing of the member is left.
        """
        if member not in self.live:
            return
        for action, behind in self.possible(member, other, data):
            for store in itertools.count():
                before = self.remember()
                is_dead = dies(action, store)
                self.table.validate()
                for gone in (behind, member):
                    self.table.reclaim(gone)
                assert self.taken() == sorted(
                    entry.extent
                    for entry in self.blocks.values()
                    if (entry.holders if entry.is_sealed else {entry.owner}) - {behind, member}
                )
                assert set(self.table.members.live()) == self.live - {behind, member}
                self.recall(before)
                if not is_dead:
                    break
        self.reclaim(member)

    def possible(
        self, member: Member, other: Member, data: st.DataObject
    ) -> Iterator[tuple[Callable[[], object], Member]]:
        """Yield the actions that a member can do, each with the member that it reclaims (itself if none)."""
        table = self.table
        yield (lambda: self.reserve_page(table, member)), member
        yield (lambda: table.add_role(member, "client", "tcp://127.0.0.1:9")), member
        yield (lambda: table.reclaim(member)), member
        yield (lambda: table.reclaim(other)), other
        yield (lambda: table.reclaim_drafts(other)), other
        drafts = [row for row, entry in self.blocks.items() if not entry.is_sealed and entry.owner == member]
        sealed = [row for row, entry in self.blocks.items() if entry.is_sealed]
        held = [row for row in sealed if member in self.blocks[row].holders]
        for rows, act in (
            (drafts, table.seal),
            (drafts, table.release),
            (sealed, table.acquire),
            (held, table.release),
        ):
            if rows:
                row = data.draw(st.sampled_from(rows))
                yield (lambda act=act, row=row: act(row, member)), member

    def remember(self) -> list[np.ndarray]:
        """Copy the parts of the table that are in use."""
        return [part.copy() for part in self.parts()]

    def recall(self, parts: list[np.ndarray]) -> None:
        """Restore the copied parts of the table."""
        for part, old in zip(self.parts(), parts, strict=True):
            part[:] = old

    def parts(self) -> list[np.ndarray]:
        """Return the parts that are in use: at most as many rows as there are pages, and few members."""
        table = self.table
        words = np.frombuffer(self.buffer, np.uint64)
        return [
            words[: layout.BLOCKS_AT],
            table.blocks._rows[:32],
            table._claims._claims[:6, :32],
            table._claims._claims[-1, :32],
        ]

    def taken(self) -> list[tuple[int, ...]]:
        """Return the extents of all blocks and drafts, sorted."""
        return sorted(map(tuple, self.table.blocks.taken().tolist()))

    def reserve_page(self, table: Table, member: Member) -> None:
        """Reserve one page at the offset that placement returns, if there is one."""
        offset = placement.Room(table.blocks.taken(), table.capacity).place(PAGE)
        if offset is not None:
            table.reserve(Extent(offset, PAGE), 1, member)

    def depart(self, member: Member) -> list[Extent]:
        """Remove a member from the model, and return the extents that become free."""
        freed = []
        for row, entry in list(self.blocks.items()):
            if member in self.live and (entry.owner == member if not entry.is_sealed else entry.holders == {member}):
                freed.append(entry.extent)
                del self.blocks[row]
            entry.holders.discard(member)
        self.live.discard(member)
        self.roles = [role for role in self.roles if role.member != member]
        return freed

    # -------------------------------------------------------------------------------------------------- blocks

    @rule(target=rows, member=members, pages=st.integers(1, 9))
    def reserve(self, member: Member, pages: int) -> BlockId:
        """Let a member reserve at the offset that placement returns; there is none only if no gap is long enough."""
        if member not in self.live:
            return multiple()
        table = self.table
        offset = placement.Room(table.blocks.taken(), table.capacity).place(pages * PAGE)
        if offset is None:
            assert max(self.gaps(), default=0) < pages
            return multiple()
        row = table.reserve(Extent(offset, pages * PAGE), pages * PAGE - 1, member)
        assert row not in self.ever, "a generation is used twice"
        assert row.index not in {used.index for used in self.blocks}, "a row in use is used again"
        self.ever.add(row)
        self.blocks[row] = Entry(Extent(offset, pages * PAGE), pages * PAGE - 1, member)
        return row

    @rule(row=rows)
    def seal(self, row: BlockId) -> None:
        """Let the owner seal its draft; if it is no draft any more, the descriptor is stale."""
        entry = self.blocks.get(row)
        if entry is None or entry.is_sealed:
            with pytest.raises(StaleBlock):
                self.table.seal(row, next(iter(self.live), Member(0, 0)))
            return
        self.table.seal(row, entry.owner)
        entry.is_sealed = True
        entry.holders.add(entry.owner)

    @rule(row=rows, member=members)
    def acquire(self, row: BlockId, member: Member) -> None:
        """Let a member use a descriptor, which may be of any age."""
        if member not in self.live:
            return
        entry = self.blocks.get(row)
        if entry is None or not entry.is_sealed:
            with pytest.raises(StaleBlock):
                self.table.acquire(row, member)
            return
        assert self.table.acquire(row, member) == (entry.extent, entry.size)
        entry.holders.add(member)

    @rule(row=rows, member=members)
    def release(self, row: BlockId, member: Member) -> None:
        """Let a member release its claim on a block, or its draft; it may have neither."""
        if member not in self.live:
            return
        entry = self.blocks.get(row)
        goes = entry is not None and (entry.holders == {member} if entry.is_sealed else entry.owner == member)
        assert self.table.release(row, member) == (entry.extent if goes else None)
        if entry is not None:
            entry.holders.discard(member)
        if goes:
            del self.blocks[row]

    @rule(index=st.integers(-1, 40), generation=st.integers(-1, 3), member=members)
    def acquire_nonsense(self, index: int, generation: int, member: Member) -> None:
        """Let a member use a descriptor that no member has made."""
        row = BlockId(index, generation)
        if row not in self.blocks and member in self.live:
            with pytest.raises(StaleBlock):
                self.table.acquire(row, member)

    # --------------------------------------------------------------------------------------------------- roles

    @rule(member=members, kind=st.sampled_from(["nanny", "worker", "client"]), port=st.integers(1, 3))
    def add_role(self, member: Member, kind: str, port: int) -> None:
        """Let a member take on a role."""
        if member in self.live:
            self.table.add_role(member, kind, f"tcp://127.0.0.1:{port}")
            self.roles.append(RoleEntry(member, kind, f"tcp://127.0.0.1:{port}"))

    @precondition(lambda self: self.roles)
    @rule(data=st.data())
    def remove_role(self, data: st.DataObject) -> None:
        """Let a member end a role."""
        role = data.draw(st.sampled_from(self.roles))
        self.table.remove_role(*role)
        self.roles.remove(role)

    # ------------------------------------------------------------------------------------------------ the invariants

    def gaps(self) -> list[int]:
        """Return the lengths of the gaps, in pages, found by a look at each page."""
        used = bytearray(CAPACITY // PAGE)
        for entry in self.blocks.values():
            first, pages = entry.extent.offset // PAGE, entry.extent.length // PAGE
            assert not any(used[first : first + pages])
            used[first : first + pages] = b"x" * pages
        return [len(run) for run in bytes(used).split(b"x") if run]

    @invariant()
    def is_valid(self) -> None:
        """Check the invariants of the table itself."""
        self.table.validate()

    @invariant()
    def has_the_same_blocks(self) -> None:
        """Check that the same extents are taken, by blocks with as many holders."""
        table = self.table
        assert self.taken() == sorted(entry.extent for entry in self.blocks.values())
        assert len(table.blocks.taken()) == len(self.blocks)
        for row, entry in self.blocks.items():
            assert table.blocks.extent(row.index) == entry.extent
            assert table.holders(row.index) == len(entry.holders)

    @invariant()
    def has_the_same_free_space(self) -> None:
        """Check that the free space is the space that the model's blocks leave."""
        lengths = placement.gaps(self.table.blocks.taken(), CAPACITY)[:, 1]
        assert sorted(lengths.tolist()) == sorted(pages * PAGE for pages in self.gaps())

    @invariant()
    def has_the_same_members(self) -> None:
        """Check that the same incarnations are live and have the same roles."""
        table = self.table
        assert set(table.members.live()) == self.live
        assert all(table.members.is_live(member) for member in self.live)
        assert sorted(table.roles()) == sorted(self.roles)


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
