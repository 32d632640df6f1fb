"""The table against a model: a dict of blocks, each with its state, its place and the set of its holders."""

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

from dask_shm_plugin import layout, placement
from dask_shm_plugin.exceptions import StaleBlock
from dask_shm_plugin.layout import MEMBERS, TABLE_BYTES, Extent, Row
from dask_shm_plugin.memberbook import Member
from dask_shm_plugin.rolebook import Role
from dask_shm_plugin.table import Table

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
    """Several members do what members do, each through a table of its own over the same memory."""

    members = Bundle("members")
    rows = Bundle("rows")

    def __init__(self) -> None:
        super().__init__()
        self.buffer = np.zeros(TABLE_BYTES, np.uint8).data
        Table.format(self.buffer, bytes(16), CAPACITY)
        self.blocks: dict[Row, Entry] = {}
        self.ever: set[Row] = set()
        self.live: set[Member] = set()
        self.incarnations: set[int] = set()
        self.roles: list[Role] = []

    @property
    def table(self) -> Table:
        """As a process sees it that has just come: nothing may be kept outside of the memory."""
        return Table(self.buffer)

    # ------------------------------------------------------------------------------------------------- members

    @rule(target=members, slot=st.integers(0, 5) | st.just(MEMBERS - 1))
    def join(self, slot: int) -> Member:
        """Let a process enter, if the slot is vacant."""
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
        """Let a member leave, or another clean up behind it; for one that has gone before, nothing happens."""
        freed = self.depart(member)
        assert sorted(self.table.reclaim(member)) == sorted(freed)

    @rule(member=members)
    def reclaim_drafts(self, member: Member) -> None:
        """Let another clean up behind a dead member whose forked child lives: its drafts are free, and no more."""
        drafts = [row for row, entry in self.blocks.items() if not entry.is_sealed and entry.owner == member]
        freed = [self.blocks.pop(row).extent for row in drafts]
        assert sorted(self.table.reclaim_drafts(member)) == sorted(freed)

    @rule(member=members, other=members, data=st.data())
    def die(self, member: Member, other: Member, data: st.DataObject) -> None:
        """Let a member die before each store of each thing that it could do now, and others clean up behind it.

        Whatever it did was to something that only it had, or to a claim of its own: so it makes no difference how far it
        came, and nothing of it is left.
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
                assert set(self.table.members()) == self.live - {behind, member}
                self.recall(before)
                if not is_dead:
                    break
        self.reclaim(member)

    def possible(
        self, member: Member, other: Member, data: st.DataObject
    ) -> Iterator[tuple[Callable[[], object], Member]]:
        """Return what a member can do, and behind whom it cleans up."""
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
        """Let the table be as it was."""
        for part, old in zip(self.parts(), parts, strict=True):
            part[:] = old

    def parts(self) -> list[np.ndarray]:
        """Return the parts that are in use: no more rows than there are pages, and few members."""
        table = self.table
        words = np.frombuffer(self.buffer, np.uint64)
        return [
            words[: layout.BLOCKS_AT],
            table.blocks._rows[:32],
            table._claims._claims[:6, :32],
            table._claims._claims[-1, :32],
        ]

    def taken(self) -> list[tuple[int, ...]]:
        """Return what is taken, in order."""
        return sorted(map(tuple, self.table.blocks.taken().tolist()))

    def reserve_page(self, table: Table, member: Member) -> None:
        """Reserve a page where placement says, if there is one."""
        offset = placement.Room(table.blocks.taken(), table.capacity).place(PAGE)
        if offset is not None:
            table.reserve(Extent(offset, PAGE), 1, member)

    def depart(self, member: Member) -> list[Extent]:
        """Let the model forget a member, and return what became free."""
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
    def reserve(self, member: Member, pages: int) -> Row:
        """Let a member reserve where placement says; there is no place only if no gap is long enough."""
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
    def seal(self, row: Row) -> None:
        """Let the owner seal its draft; what is none any more is stale."""
        entry = self.blocks.get(row)
        if entry is None or entry.is_sealed:
            with pytest.raises(StaleBlock):
                self.table.seal(row, next(iter(self.live), Member(0, 0)))
            return
        self.table.seal(row, entry.owner)
        entry.is_sealed = True
        entry.holders.add(entry.owner)

    @rule(row=rows, member=members)
    def acquire(self, row: Row, member: Member) -> None:
        """Let a member follow a descriptor, which may be as old as the arena."""
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
    def release(self, row: Row, member: Member) -> None:
        """Let a member drop what it has of a block, which may be nothing."""
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
        """Give a member a descriptor that nobody has made."""
        row = Row(index, generation)
        if row not in self.blocks and member in self.live:
            with pytest.raises(StaleBlock):
                self.table.acquire(row, member)

    # --------------------------------------------------------------------------------------------------- roles

    @rule(member=members, kind=st.sampled_from(["nanny", "worker", "client"]), port=st.integers(1, 3))
    def add_role(self, member: Member, kind: str, port: int) -> None:
        """Let a member take on a role."""
        if member in self.live:
            self.table.add_role(member, kind, f"tcp://127.0.0.1:{port}")
            self.roles.append(Role(member, kind, f"tcp://127.0.0.1:{port}"))

    @precondition(lambda self: self.roles)
    @rule(data=st.data())
    def remove_role(self, data: st.DataObject) -> None:
        """Let a member end a role."""
        role = data.draw(st.sampled_from(self.roles))
        self.table.remove_role(*role)
        self.roles.remove(role)

    # ------------------------------------------------------------------------------------ what must always hold

    def gaps(self) -> list[int]:
        """Return the lengths of the gaps, in pages, found by looking at each page."""
        used = bytearray(CAPACITY // PAGE)
        for entry in self.blocks.values():
            first, pages = entry.extent.offset // PAGE, entry.extent.length // PAGE
            assert not any(used[first : first + pages])
            used[first : first + pages] = b"x" * pages
        return [len(run) for run in bytes(used).split(b"x") if run]

    @invariant()
    def is_valid(self) -> None:
        """See that the table's own invariants hold."""
        self.table.validate()

    @invariant()
    def has_the_same_blocks(self) -> None:
        """See that the same places are taken, by blocks with as many holders."""
        table = self.table
        assert self.taken() == sorted(entry.extent for entry in self.blocks.values())
        assert len(table.blocks.taken()) == len(self.blocks)
        for row, entry in self.blocks.items():
            assert table.blocks.extent(row.index) == entry.extent
            assert table.holders(row.index) == len(entry.holders)

    @invariant()
    def has_the_same_free_space(self) -> None:
        """See that the free space is what the model's blocks leave."""
        lengths = placement.gaps(self.table.blocks.taken(), CAPACITY)[:, 1]
        assert sorted(lengths.tolist()) == sorted(pages * PAGE for pages in self.gaps())

    @invariant()
    def has_the_same_members(self) -> None:
        """See that the same incarnations are live, and play the same roles."""
        table = self.table
        assert set(table.members()) == self.live
        assert all(table.is_live(member) for member in self.live)
        assert sorted(table.roles()) == sorted(self.roles)


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
