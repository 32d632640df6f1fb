"""The holdings of one process in an arena: its references to blocks, and the mappings of its views."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator

from dask_shm_plugin.arena.forks import ForkHold
from dask_shm_plugin.arena.guard import GuardedTable
from dask_shm_plugin.arena.references import Hold, Note, References
from dask_shm_plugin.arena.releases import ReleaseQueue
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import ArenaBusy
from dask_shm_plugin.linux.mutex import Mutex
from dask_shm_plugin.linux.segment import Segment
from dask_shm_plugin.mapping import atlas, exporter
from dask_shm_plugin.mapping.atlas import Place
from dask_shm_plugin.mapping.private import PrivateMappings
from dask_shm_plugin.table.layout import BLOCKS_FROM, BlockId, Extent
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.table.table import Table
from dask_shm_plugin.units import PAGE, round_up


def insist_within(used: int, offset: int, length: int) -> None:
    """Raise ValueError unless a part lies within the used bytes of a block: bytes behind them are of earlier blocks."""
    if offset < 0 or length <= 0 or offset + length > used:
        raise ValueError(f"{length} bytes at {offset} are not in a block of {used}")


class Holdings:
    """The references and mappings of one member.

    Parameters
    ----------
    segment, mutex, access
        The segment of the arena, its mutex, and its guarded table.
    member
        This process.

    Notes
    -----
    Thread-safe. When a hold is collected, no code of this class runs: its note is appended to a queue, which the
    housekeeping thread works off. There must never be a moment when a view is mapped and its block is not claimed. So a
    block is claimed before it is mapped, and its mapping is given back before its claim is released.
    """

    def __init__(self, segment: Segment, mutex: Mutex, access: GuardedTable, member: Member) -> None:
        self._pid = os.getpid()
        self._segment, self._mutex, self._access, self._member = segment, mutex, access, member
        self._arena_id = access.table.arena_id
        self.releases = ReleaseQueue()
        self.references = References(self.releases.put)
        self.mappings = PrivateMappings(segment)
        self._tidying = threading.RLock()
        self._is_behind = False
        access.repair = self._repair

    def refer(self, row: BlockId) -> tuple[Hold, Extent, int]:
        """Claim a block, and return the hold that keeps the claim, the extent of the block, and its used bytes.

        Raises
        ------
        StaleBlock
            The block has been released.
        """
        hold = Hold()

        def claim(table: Table) -> tuple[Extent, int]:
            place = table.acquire(row, self._member)
            self.references.add(row, hold)
            return place

        return hold, *self._access.run(claim)

    def attach(self, row: BlockId, offset: int, length: int) -> memoryview:
        """Claim a block and return a copy-on-write view of a part of it; the claim lasts as long as the view.

        Parameters
        ----------
        row
            The block.
        offset, length
            The part, in bytes.

        Raises
        ------
        StaleBlock
            The block has been released.
        MappingRefused
            The process has too many mappings or too little address space.
        ValueError
            The part is not within the used bytes of the block.
        """
        return self._map(*self.refer(row), offset, length)

    def map(self, row: BlockId, extent: Extent, used: int, offset: int, length: int) -> memoryview:
        """Map a part of a block that this process refers to, copy-on-write, and return a view of it.

        Parameters
        ----------
        row, extent
            The block, and where it lies in the arena.
        used
            Bytes of the block that are used.
        offset, length
            The part, in bytes.
        """
        hold = self._refer_again(row)
        self._segment.insist_whole()
        return self._map(hold, extent, used, offset, length)

    def _map(self, hold: Hold, extent: Extent, used: int, offset: int, length: int) -> memoryview:
        """Map a part of a block and return a view of it, which keeps ``hold`` alive."""
        insist_within(used, offset, length)
        first, last = offset // PAGE * PAGE, round_up(offset + length)
        mapping = hold.note.mapping = self.mappings.map(BLOCKS_FROM + extent.offset + first, last - first)
        atlas.ATLAS.add(mapping.address, Place(self._arena_id, hold.row, first, last - first))
        whole = exporter.Exporter(mapping.address, last - first, hold).bytes()
        return whole[offset - first : offset - first + length]

    @step("tidy")
    def tidy(self) -> bool:
        """Unmap and release the references that have lost their hold; return whether any was released.

        If the table is locked for too long, the references stay claimed and are released by a later call.
        """
        if os.getpid() != self._pid:
            return False
        # Without this lock, one thread would find the queue empty while another has not released its items yet.
        with self._tidying:
            return self._tidy()

    def _tidy(self) -> bool:
        # If a call takes notes out of the queue and does not complete, the next call finds them among all references.
        was_behind, self._is_behind = self._is_behind, True
        notes = self.releases.empty()
        if was_behind or self.releases.is_waited_for:
            notes = self.references.gone()
        if not notes:
            self._is_behind = False
            return False
        for note in notes:
            mapping, note.mapping = note.mapping, None
            if mapping is not None:
                # No view uses the mapping any more. Even if it cannot be unmapped, its claim must not stay for good.
                with contextlib.suppress(OSError, MemoryError):
                    self.mappings.give_back(mapping)
        try:
            self._mutex.run(functools.partial(self._cross_out, notes))
        except ArenaBusy:
            self.releases.wake()
            return False
        self._is_behind = False
        return True

    # -- for forked children

    def hold_for_child(self) -> ForkHold | None:
        """Hold once more all blocks that this process refers to now, for a child about to be forked."""
        # No shared state is changed, so the lock among processes is not taken: a stopped process may hold it.
        with self._mutex.among_threads:
            return self.references.hold_for_child()

    # -- inside

    def _refer_again(self, row: BlockId) -> Hold:
        """Return one more hold of a block; if this process claims the block already, the table is not locked."""
        hold = Hold()
        if os.getpid() == self._pid and not self._access.is_damaged:
            with self._mutex.among_threads:
                if self.references.knows(row):
                    self.references.add(row, hold)
                    return hold
        return self.refer(row)[0]

    def _cross_out(self, notes: list[Note]) -> None:
        def release(table: Table) -> None:
            for note in notes:
                if self.references.remove(note):
                    table.release(note.row, self._member)

        self._access.attempt(release)
        # In a damaged table nothing is released. The holds are removed all the same, so that this process can leave.
        for note in notes:
            self.references.remove(note)

    def _repair(self, table: Table) -> None:
        """Release the claims and drafts of this process for which no hold is known: a change was interrupted."""
        held = set(self.references)
        for row in table.held_by(self._member):
            if row not in held:
                table.release(row, self._member)

    def __iter__(self) -> Iterator[BlockId]:
        return iter(self.references)

    def __len__(self) -> int:
        return len(self.references)
