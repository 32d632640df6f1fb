"""Segment + table + placement: reserve, seal, attach, release, reclaim."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dask_shm_plugin import layout, liveness, tidying
from dask_shm_plugin.access import Access, map_table
from dask_shm_plugin.block import Block, Descriptor, Draft
from dask_shm_plugin.blockbook import TRIMMING
from dask_shm_plugin.budget import Budget
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.directory import Directory
from dask_shm_plugin.exceptions import (
    ArenaBusy,
    ArenaFull,
    ArenaUnavailable,
    MembersFull,
    StaleBlock,
    TableCorrupt,
)
from dask_shm_plugin.freespace import FreeSpace
from dask_shm_plugin.holdings import Holdings
from dask_shm_plugin.layout import BLOCKS_FROM, TABLE_BYTES, Extent, Row
from dask_shm_plugin.memberbook import Member
from dask_shm_plugin.pages import Pages
from dask_shm_plugin.references import Hold
from dask_shm_plugin.roster import Roster
from dask_shm_plugin.segment import PAGE, Segment, Whereabouts, round_up
from dask_shm_plugin.table import Table
from dask_shm_plugin.trimming import Trimmer
from dask_shm_plugin.weights import Weights

_PATIENCE = 0.25
"""Seconds for which leaving waits for who uses the segment."""


class ArenaStats(NamedTuple):
    """What an arena holds at a moment; sizes in bytes."""

    capacity: int
    used: int
    resident: int
    blocks: int
    members: int


class Arena:
    """One process's membership in the shared memory of a node.

    Parameters
    ----------
    segment
        The open segment; the arena closes it.
    warm
        Seconds for which freed memory stays resident, to be written again quickly.

    Attributes
    ----------
    arena_id, capacity
        Its name, 16 random bytes, and the most bytes that its blocks may take.
    in_use
        Held by whoever asks the kernel about the segment without a reference or the mutex: it is not closed meanwhile, and
        its number is not somebody else's.
    upkeep
        Called once a second by the tidying thread, for whoever must look after something as long as the arena is used.

    Raises
    ------
    TableCorrupt
        The segment holds no table of this version, or a damaged one.
    MembersFull
        No slot is left.

    Notes
    -----
    Thread-safe. Every change of the table happens under one mutex for all threads of all members.

    A table that somebody has scribbled on is left for good: nothing is read from it or written to it any more, and the
    process stays a member, with the lock that shows it, until the last of its views is gone.
    """

    def __init__(self, segment: Segment, warm: float = 0) -> None:
        self.segment = segment
        self._pid = os.getpid()
        self._mutex = liveness.Mutex(segment.fd)
        table = Table(map_table(segment))
        self.arena_id, self.capacity = table.arena_id, table.capacity
        self._access = Access(segment, table, self._mutex)
        self._free_space = FreeSpace()
        self._leaving = False
        self.in_use = threading.RLock()
        self.upkeep: Callable[[], None] = lambda: None
        self.member = self._join()
        self.holdings = Holdings(segment, self._mutex, self._access, self.member)
        self.budget = Budget(self._access, self.member)
        self.trimmer = Trimmer(self, segment, self._access, BLOCKS_FROM, self.budget, warm)
        self.pages = Pages(segment, BLOCKS_FROM, self._access, self.trimmer, self.budget)
        self.roster = Roster(self._access, segment, self.member)
        self.directory = Directory(table.marks, segment, self.roster, self.member)
        self.weights = Weights(self._access, self.member)
        tidying.start(self)

    @classmethod
    def create(cls, capacity: int, warm: float = 0) -> Arena:
        """Create an arena for ``capacity`` bytes of blocks and become its first member."""
        capacity = capacity // PAGE * PAGE
        if capacity <= 0:
            raise ArenaUnavailable("shm.capacity is zero: sharing is off")
        segment = Segment.create(BLOCKS_FROM + layout.SPREAD * capacity, TABLE_BYTES + capacity)
        try:
            segment.reserve(0, layout.SHARED_BYTES)
            Table.format(map_table(segment), secrets.token_bytes(16), capacity)
            return cls(segment, warm)
        except BaseException:
            segment.close()
            raise

    @classmethod
    def attach(cls, at: Whereabouts, arena_id: bytes, warm: float = 0) -> Arena:
        """Join the arena that another process has.

        Raises
        ------
        ArenaUnavailable
            It cannot be opened, or is another arena than the one looked for.
        """
        segment = Segment.open(at)
        try:
            table = Table(map_table(segment)) if segment.size >= BLOCKS_FROM else None
            if table is None or table.arena_id != arena_id:
                raise ArenaUnavailable("another arena was found in the place of the one looked for")
            if BLOCKS_FROM + table.span > segment.size:
                raise TableCorrupt("the arena's memory is shorter than its table says")
            return cls(segment, warm)
        except BaseException:
            segment.close()
            raise

    # -- blocks

    def draft(self, size: int) -> Draft:
        """Take space for ``size`` bytes.

        Raises
        ------
        ArenaFull
            Not even after taking back what dead members held.
        ArenaBusy
            The table could not be locked in time.
        """
        size = max(size, 1)
        extent_length = round_up(size)
        hold = Hold()
        extent = self._reserve(hold, extent_length, size)
        for find_more in (self.holdings.tidy, self.roster.reclaim_dead, self.trimmer.wait):
            if extent is None:
                # Whether it found anything does not matter: another thread may have been quicker.
                find_more()
                extent = self._reserve(hold, extent_length, size)
        if extent is None:
            raise ArenaFull(f"no room for {size} bytes in an arena of {self.capacity}; raise shm.capacity")
        return Draft(self, hold, extent, size)

    def attach_block(self, descriptor: Descriptor) -> Block:
        """Refer to a block that another member named.

        Raises
        ------
        StaleBlock
            It has been released since, or belongs to another arena.
        """
        return Block(self, *self.holdings.refer(self._row_of(descriptor)))

    def view(self, descriptor: Descriptor, offset: int, length: int) -> memoryview:
        """Map a part of a block that another member named, copy-on-write.

        Parameters
        ----------
        descriptor
            Of the block.
        offset, length
            The part, in bytes.

        Returns
        -------
        memoryview
            Like that of :meth:`Block.view`; this process refers to the block as long as anything made from it lives.

        Raises
        ------
        StaleBlock
            It has been released since, or belongs to another arena.
        MappingRefused
            The process has too many mappings or too little address space.
        ValueError
            There is no such part.
        """
        return self.holdings.attach(self._row_of(descriptor), offset, length)

    def read(self, descriptor: Descriptor, offset: int, length: int) -> memoryview:
        """Copy what :meth:`view` would map into private memory, for a process that can map no more."""
        with self.attach_block(descriptor) as block:
            return block.read(offset, length)

    def seal(self, row: Row) -> None:
        """Seal a draft of this process and refer to it."""
        self._access.run(lambda table: table.seal(row, self.member))

    @step("abandon")
    def abandon(self) -> None:
        """Give drafts of this process up that nothing holds any more, now or, when the table is busy, soon."""
        self.holdings.tidy()

    def take_if_free(self, extent: Extent) -> Hold | None:
        """Make a part of the arena a draft that nobody will write, so that its pages can be given back."""
        hold = Hold()

        def take(table: Table) -> bool:
            if not self._free_space.room(table).has(*extent):
                return False
            table.count_trim()
            self._take(table, hold, extent, TRIMMING)
            return True

        return hold if self._access.run(take) else None

    # -- members

    @property
    def is_damaged(self) -> bool:
        """Whether this process has found something here that nobody should have written, and keeps away from it."""
        return self._access.is_damaged

    def holders(self, row: Row) -> int:
        """Count the members that refer to a block now."""
        return self._access.table.holders(row.index)

    def stats(self) -> ArenaStats:
        """Count what the arena holds now; nothing, where this process keeps away from it."""
        if self.is_damaged:
            return ArenaStats(0, 0, 0, 0, 0)

        def count(table: Table) -> ArenaStats:
            lengths, members = table.blocks.taken()[:, 1], len(table.members())
            return ArenaStats(table.capacity, int(np.sum(lengths)), self.segment.resident, len(lengths), members)

        return self._access.run(count)

    def inspect(self) -> None:
        """Look whether the table still says what this process relies on.

        Raises
        ------
        TableCorrupt
            It does not; this process has left.
        """

        def look(table: Table) -> None:
            table.check(self.member, self.holdings)
            table.blocks.taken()

        self._access.run(look)

    def validate(self) -> None:
        """Check the invariants of the table; see :meth:`Table.validate`."""
        self._mutex.run(lambda: self._access.table.validate())

    # -- leaving

    @property
    def has_left(self) -> bool:
        """Whether this process is no member any more."""
        return self._mutex.retired or self.segment.fd < 0

    def close(self) -> None:
        """Leave. Views that live on stay valid: the process remains a member until the last of them is gone."""
        if os.getpid() != self._pid or self._leaving:
            return
        self._leaving = True
        self.holdings.tidy()
        self.finish_leaving()

    def stay(self) -> bool:
        """Take :meth:`close` back; return whether that was in time."""

        def come_back() -> bool:
            self._leaving = self._access.is_over
            return not (self._leaving or self.is_damaged)

        try:
            return self._mutex.run(come_back)
        except ArenaUnavailable:
            return False

    @step("leave")
    def finish_leaving(self) -> None:
        """Leave now, if that is wanted and nothing of this process refers to a block; otherwise later."""
        if not (self._leaving or self.is_damaged):
            return
        # Where somebody is at it, or the table is busy, the tidying thread tries again.
        with contextlib.suppress(ArenaBusy, ArenaUnavailable):
            liveness.run_locked(self.in_use, _PATIENCE, self._leave)

    # -- inside

    def _leave(self) -> None:
        if self._mutex.run(self._leave_table):
            self.pages.close()
            self.holdings.wake()

    def _leave_table(self) -> bool:
        """Leave, from inside the mutex, where nothing stands against it. What is interrupted is done again."""
        if len(self.holdings) or not (self._leaving or self.is_damaged):
            return False
        self.directory.close()
        self._access.leave(self.member)
        self.holdings.unmap_all()
        if self.segment.has_descriptor:
            liveness.let_go(self.segment.fd, self.member.slot)
        # Somebody may still keep this object; what it has mapped must go.
        self._access.forget()
        self._mutex.retire(self.segment.close)
        return True

    @step("join")
    def _join(self) -> Member:
        return self._access.run(self._join_table)

    def _join_table(self, table: Table) -> Member:
        table.blocks.taken()
        for slot in table.vacant():
            # The locks come first, or there would be a moment when a living member looks dead. A slot whose lock
            # is still held belonged to a process whose forked child lives on.
            if liveness.appear(self.segment.fd, slot):
                self.segment.reserve(layout.claims_offset(slot), layout.CLAIM_BYTES)
                self._access.member = table.join(slot, self._pid, liveness.start_time(self._pid))
                return self._access.member
        raise MembersFull(f"all {layout.MEMBERS} places for members are taken")

    def _row_of(self, descriptor: Descriptor) -> Row:
        if descriptor.arena_id != self.arena_id:
            raise StaleBlock("the block belongs to another arena")
        return descriptor.row

    def _reserve(self, hold: Hold, length: int, size: int) -> Extent | None:
        def reserve(table: Table) -> Extent | None:
            if self._leaving:
                raise ArenaUnavailable("this process is leaving the arena")
            room = self._free_space.room(table)
            offset = room.place(length)
            if offset is None:
                return None
            extent = Extent(offset, length)
            table.note_use(table.capacity - room.left + length, time.monotonic(), self.trimmer.warm)
            self._take(table, hold, extent, size)
            return extent

        return self._access.run(reserve)

    def _take(self, table: Table, hold: Hold, extent: Extent, size: int) -> None:
        row = table.reserve(extent, size, self.member)
        # A draft counts as a reference: the process must not leave while a thread of it still writes there.
        self.holdings.add(row, hold)

    def __repr__(self) -> str:
        if self.has_left or self.is_damaged:
            return f"<Arena {self.arena_id.hex()[:4]}, {'damaged' if self.is_damaged else 'left'}>"
        return f"<Arena {self.arena_id.hex()[:4]} {self.capacity} bytes, {len(self.holdings)} references>"

    def __reduce__(self) -> Any:
        raise TypeError("an Arena cannot be pickled; send its segment's Whereabouts")
