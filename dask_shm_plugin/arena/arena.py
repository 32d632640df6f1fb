"""The arena of a node, as one process uses it: segment, table and allocator together."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dask_shm_plugin.arena import housekeeping
from dask_shm_plugin.arena.allocator import Allocator
from dask_shm_plugin.arena.block import Block, Descriptor, Draft, Home
from dask_shm_plugin.arena.budget import Budget
from dask_shm_plugin.arena.directory import Directory
from dask_shm_plugin.arena.guard import GuardedTable, map_table
from dask_shm_plugin.arena.holdings import Holdings
from dask_shm_plugin.arena.labels import Labels
from dask_shm_plugin.arena.members import Roster
from dask_shm_plugin.arena.pages import Pages
from dask_shm_plugin.arena.receptions import Receptions
from dask_shm_plugin.arena.references import Hold
from dask_shm_plugin.arena.shares import Shares
from dask_shm_plugin.arena.trimming import Trimmer
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import (
    ArenaBusy,
    ArenaFull,
    ArenaUnavailable,
    MembersFull,
    StaleBlock,
    TableCorrupt,
    TableFull,
)
from dask_shm_plugin.linux import locks, mutex, processes
from dask_shm_plugin.linux.segment import Segment, Whereabouts
from dask_shm_plugin.table import layout
from dask_shm_plugin.table.layout import BLOCKS_FROM, TABLE_BYTES, BlockId, Extent
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.table.table import Table
from dask_shm_plugin.units import PAGE, round_up

_LEAVE_TIMEOUT_S = 0.25
"""Seconds for which leaving waits for a thread that holds :attr:`Arena.in_use`."""


class ArenaStats(NamedTuple):
    """The figures of an arena at one moment.

    Attributes
    ----------
    capacity
        Bytes that all blocks together may have.
    used
        Bytes of all blocks and drafts.
    resident
        Bytes of the segment for which the operating system holds pages, the table included.
    blocks, members
        The number of blocks and drafts, and the number of members.
    """

    capacity: int
    used: int
    resident: int
    blocks: int
    members: int


class Arena:
    """The membership of one process in the shared memory of a node.

    Parameters
    ----------
    segment
        The open segment; the arena closes it.
    warm
        Seconds for which freed memory stays resident, so that it can be written again quickly.

    Attributes
    ----------
    arena_id
        The name of the arena (16 random bytes).
    in_use
        A lock to hold while the descriptor is queried without a reference or the mutex. It prevents that the descriptor
        is closed meanwhile and its number is used for another file.
    has_writeable_views
        Whether values that this process maps are writeable; a write changes the private view only.

    Raises
    ------
    TableCorrupt
        The segment holds no table of this version, or a damaged one.
    MembersFull
        No slot for a member is left.

    Notes
    -----
    Thread-safe. Blocks, claims, members and roles are changed under one mutex for all threads of all members. Only the
    tags of a member's listings and its memory figures are written without it, by that member alone.

    If a process finds the table damaged, it stops using it for good, except that it withdraws its own listings. It
    remains a member, with the lock that proves it alive, until its last reference is gone.
    """

    def __init__(self, segment: Segment, warm: float = 0) -> None:
        self.segment = segment
        self._pid = os.getpid()
        self._mutex = mutex.Mutex(segment.fd)
        table = Table(map_table(segment))
        self.arena_id, self._capacity = table.arena_id, table.capacity
        self._access = GuardedTable(segment, table, self._mutex)
        self.in_use = threading.RLock()
        self.has_writeable_views = True
        self._upkeep: list[Callable[[], None]] = []
        self._trims_soon = False
        self.member = self._join()
        self.holdings = Holdings(segment, self._mutex, self._access, self.member)
        self.allocator = Allocator(self._access, self.holdings, self.member, warm)
        self.budget = Budget(self._access, self.member)
        self.trimmer = Trimmer(self.allocator, segment, self._access, BLOCKS_FROM, self.budget, warm)
        self.pages = Pages(segment, BLOCKS_FROM, self._access, self.trimmer, self.budget)
        self.roster = Roster(self._access, segment, self.member)
        self.directory = Directory(table.marks, segment, self.roster, self.member)
        self.shares = Shares(self._access, self.member)
        self.labels = Labels(segment, self.member, self.holdings.references.knows)
        self._home = Home(self.arena_id, self.allocator, self.holdings, self.pages)
        self.receptions = Receptions(self._home, self._access, self.reserve)
        self.budget.received, self.budget.grown = self.receptions.bytes_in_drafts, self._trim_soon
        housekeeping.start(self._chores(), lambda: self.has_left)

    @classmethod
    def create(cls, capacity: int, warm: float = 0) -> Arena:
        """Create an arena for ``capacity`` bytes of blocks and become its first member.

        Raises
        ------
        ArenaUnavailable
            The capacity is zero, or the segment cannot be created.
        MemoryExhausted
            The operating system has no pages for the table.
        """
        capacity = capacity // PAGE * PAGE
        if capacity <= 0:
            raise ArenaUnavailable("shm.capacity is zero: sharing is off")
        segment = Segment.create(BLOCKS_FROM + layout.SPREAD * capacity, TABLE_BYTES + capacity)
        try:
            segment.reserve(0, layout.SHARED_BYTES)
            Table.format(map_table(segment), secrets.token_bytes(16), capacity, time.monotonic())
            return cls(segment, warm)
        except BaseException:
            segment.close()
            raise

    @classmethod
    def attach(cls, at: Whereabouts, arena_id: bytes, warm: float = 0) -> Arena:
        """Open the arena that another process has, and become a member of it.

        Parameters
        ----------
        at
            A process that has the segment open, its descriptor, and the identity of the file.
        arena_id
            The name of the arena.
        warm
            As of the class.

        Raises
        ------
        ArenaUnavailable
            The segment cannot be opened, or contains another arena.
        TableCorrupt
            The table is damaged, or the segment is shorter than the table says.
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
        """Reserve space for a block of ``size`` bytes; raises as :meth:`reserve` does."""
        size = max(size, 1)
        return Draft(self._home, *self.reserve(size), size)

    def reserve(self, size: int, *, stays_warm: bool = True) -> tuple[Hold, Extent]:
        """Reserve space for a block of ``size`` bytes; return a reference to it and the place.

        Parameters
        ----------
        size
            Bytes of the block.
        stays_warm
            As of :meth:`Allocator.reserve`.

        Raises
        ------
        ArenaFull
            There is no room, even after dropped references are released, dead members are reclaimed, and members that
            give pages back have been waited for.
        TableFull
            All rows of the table are taken, even after these steps.
        ArenaBusy
            The table could not be locked in time.
        ArenaUnavailable
            The process is leaving the arena.
        """
        extent_length = round_up(size)
        hold = Hold()
        refusal: tuple[type[ArenaFull], str]
        refusal = ArenaFull, f"no room for {size} bytes in an arena of {self.capacity}; raise shm.capacity"
        for find_more in (lambda: None, self.holdings.tidy, self.roster.reclaim_dead, self.trimmer.wait):
            # Try again even if this step has freed nothing: another thread may have freed space or a row meanwhile.
            find_more()
            try:
                extent = self.allocator.reserve(hold, extent_length, size, stays_warm=stays_warm)
            except TableFull as full:
                # The error itself would keep this frame and its callers', and so the value, until garbage is collected.
                refusal = TableFull, str(full)
                continue
            if extent is not None:
                return hold, extent
        kind, message = refusal
        raise kind(message)

    def attach_block(self, descriptor: Descriptor) -> Block:
        """Return a new reference to the block that a descriptor names.

        Raises
        ------
        StaleBlock
            The block has been released, or belongs to another arena.
        """
        return Block(self._home, *self.holdings.refer(self._row_of(descriptor)))

    def view(self, descriptor: Descriptor, offset: int, length: int) -> memoryview:
        """Map a part of the block that a descriptor names, copy-on-write.

        Parameters
        ----------
        descriptor
            The name of the block.
        offset, length
            The part, in bytes.

        Returns
        -------
        memoryview
            As of :meth:`Block.view`; this process refers to the block as long as any object made from the view lives.

        Raises
        ------
        StaleBlock
            The block has been released, or belongs to another arena.
        MappingRefused
            The process has too many mappings or too little address space.
        ValueError
            The part is not within the used bytes of the block.
        """
        return self.holdings.attach(self._row_of(descriptor), offset, length)

    def read(self, descriptor: Descriptor, offset: int, length: int) -> memoryview:
        """Copy the part that :meth:`view` would map into private memory, for a process that cannot map it."""
        with self.attach_block(descriptor) as block:
            return block.read(offset, length)

    @property
    def capacity(self) -> int:
        """The most bytes that the blocks may take."""
        return self._capacity // self.allocator.parts

    def divide(self, parts: int) -> None:
        """Let this process publish only while the blocks take less than one of so many parts of the capacity."""
        self.allocator.parts = parts

    # -- members

    def each_second(self, call: Callable[[], None]) -> None:
        """Call a function about once a second in the housekeeping thread, while this process uses the arena."""
        self._upkeep.append(call)

    @property
    def is_damaged(self) -> bool:
        """Whether this process has found the arena damaged or its descriptor closed, and so has stopped using it."""
        return self._access.is_damaged

    def stats(self) -> ArenaStats:
        """Return the present figures of the arena; all are zero if this process has found it damaged."""
        if self.is_damaged:
            return ArenaStats(0, 0, 0, 0, 0)

        def count(table: Table) -> ArenaStats:
            lengths, members = table.blocks.taken()[:, 1], len(table.members.live())
            return ArenaStats(self.capacity, int(np.sum(lengths)), self.segment.resident, len(lengths), members)

        return self._access.run(count)

    def glance(self) -> ArenaStats:
        """Return the figures of the arena without its lock, as an estimate that does not wait for other processes.

        Raises
        ------
        TableCorrupt, ArenaUnavailable
            The table is damaged, or this process has left the arena.
        """
        table = self._access.table
        blocks, members = len(table.blocks.taken_by_now()), len(table.members.slots())
        return ArenaStats(self.capacity, table.blocks.bytes_held(), self.segment.resident, blocks, members)

    def inspect(self) -> None:
        """Check the table, all its rows, and the references of this process.

        Raises
        ------
        TableCorrupt
            The table is damaged; this process does not use it any more.
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
        """Whether this process is not a member any more."""
        return self._mutex.retired or self.segment.fd < 0

    def close(self) -> None:
        """Leave the arena. Views stay valid: the process remains a member until its last reference is gone."""
        if os.getpid() != self._pid or self.allocator.is_closing:
            return
        self.allocator.is_closing = True
        self.holdings.tidy()
        self.finish_leaving()

    def cancel_close(self) -> bool:
        """Undo :meth:`close`; return whether this process is still a member that can use the arena."""

        def come_back() -> bool:
            self.allocator.is_closing = self._access.is_over
            return not (self.allocator.is_closing or self.is_damaged)

        try:
            return self._mutex.run(come_back)
        except ArenaUnavailable:
            return False

    @step("leave")
    def finish_leaving(self) -> None:
        """Leave now if the arena is closed or damaged and this process has no reference left; otherwise do nothing."""
        if not (self.allocator.is_closing or self.is_damaged):
            return
        # If another thread holds ``in_use``, or the table is locked for too long, the housekeeping thread tries again.
        with contextlib.suppress(ArenaBusy, ArenaUnavailable):
            mutex.run_locked(self.in_use, _LEAVE_TIMEOUT_S, self._leave)

    # -- inside

    def _leave(self) -> None:
        if self._mutex.run(self._leave_table):
            self.pages.close()
            self.holdings.releases.wake()

    def _leave_table(self) -> bool:
        """Leave the table and close the segment if no reference is left; return whether this was done.

        The caller holds the mutex. All steps can be repeated: if this is interrupted, the next call does them again.
        """
        if len(self.holdings) or not (self.allocator.is_closing or self.is_damaged):
            return False
        self.directory.close()
        self._access.leave(self.member)
        self.holdings.mappings.clear_all()
        if self.segment.has_descriptor:
            locks.let_go(self.segment.fd, self.member.slot)
        # The mapping of the table must go, even if other code keeps this object alive.
        self._access.forget()
        self._mutex.retire(self.segment.close)
        return True

    @step("join")
    def _join(self) -> Member:
        return self._access.run(self._join_table)

    def _join_table(self, table: Table) -> Member:
        table.blocks.taken()
        for slot in table.vacant():
            # The locks are taken before the member is entered: there must never be a moment when a living member looks
            # dead. If the lock of a vacant slot is still held, a forked child of its last process is alive.
            if locks.appear(self.segment.fd, slot):
                self.segment.reserve(layout.claims_offset(slot), layout.CLAIM_BYTES)
                self._access.member = table.join(slot, self._pid, processes.start_time(self._pid))
                return self._access.member
        raise MembersFull(f"all {layout.MEMBERS} places for members are taken")

    def _row_of(self, descriptor: Descriptor) -> BlockId:
        if descriptor.arena_id != self.arena_id:
            raise StaleBlock("the block belongs to another arena")
        return descriptor.row

    def _chores(self) -> housekeeping.Chores:
        return housekeeping.Chores(
            wait=self.holdings.releases.wait,
            is_behind=lambda: self.pages.are_behind or self._trims_soon,
            release=self.holdings.tidy,
            catch_up=self._catch_up,
            look_around=self._look_around,
            leave=self.finish_leaving,
        )

    def _trim_soon(self) -> None:
        self._trims_soon = True
        self.holdings.releases.wake()

    def _catch_up(self) -> None:
        if not self.is_damaged:
            with self.in_use:
                self.pages.make_up()
                if self._trims_soon:
                    self._trims_soon = False
                    self.trimmer.trim()

    def _look_around(self) -> None:
        self.holdings.references.release_ended_children()
        if self.is_damaged:
            return
        self.inspect()
        self.roster.reclaim_dead()
        with self.in_use:
            self.trimmer.give_back(self.roster.drafts_of_dead)
            self.trimmer.trim()
        self.shares.note_other_shared()
        self.labels.write()
        for call in self._upkeep:
            call()

    def __repr__(self) -> str:
        if self.has_left or self.is_damaged:
            return f"<Arena {self.arena_id.hex()[:4]}, {'damaged' if self.is_damaged else 'left'}>"
        return f"<Arena {self.arena_id.hex()[:4]} {self.capacity} bytes, {len(self.holdings)} references>"

    def __reduce__(self) -> Any:
        raise TypeError("an Arena cannot be pickled; send its segment's Whereabouts")
