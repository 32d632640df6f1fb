"""What this process holds of an arena: references to blocks, the views that hang on them, and what it has dropped."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator

from dask_shm_plugin import views
from dask_shm_plugin.access import Access
from dask_shm_plugin.bin import Bin
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import ArenaBusy
from dask_shm_plugin.forks import Pins
from dask_shm_plugin.layout import BLOCKS_FROM, Extent, Row
from dask_shm_plugin.liveness import Mutex
from dask_shm_plugin.mappings import Mappings
from dask_shm_plugin.memberbook import Member
from dask_shm_plugin.references import Hold, Note, References
from dask_shm_plugin.segment import PAGE, Segment, round_up
from dask_shm_plugin.table import Table
from dask_shm_plugin.views import Place


def insist_within(used: int, offset: int, length: int) -> None:
    """Insist that a part is one of a block that uses so many bytes: behind stands what an earlier one has left."""
    if offset < 0 or length <= 0 or offset + length > used:
        raise ValueError(f"{length} bytes at {offset} are not in a block of {used}")


class Holdings:
    """The references and mappings of one member.

    Parameters
    ----------
    segment, mutex, access
        Of the arena.
    member
        This process.

    Notes
    -----
    Thread-safe. Nothing comes here when a hold goes: it is appended to a list that the tidying thread works off. There must
    never be a moment when a view is mapped and its block is not claimed: a claim comes before its mapping and goes after it.
    """

    def __init__(self, segment: Segment, mutex: Mutex, access: Access, member: Member) -> None:
        self._pid = os.getpid()
        self._segment, self._mutex, self._access, self._member = segment, mutex, access, member
        self._arena_id = access.table.arena_id
        self._gone = Bin()
        self._references = References(self._gone.put)
        self._mappings = Mappings(segment)
        self._tidying = threading.RLock()
        self._is_behind = False
        access.repair = self._repair

    def add(self, row: Row, hold: Hold) -> None:
        """Enter a hold of a block or draft that the table knows to be this process's, for those who are inside the mutex."""
        self._references.enter(row, hold)

    def refer(self, row: Row) -> tuple[Hold, Extent, int]:
        """Refer to a block, and return what holds it, where it lies, and how many bytes of that it uses.

        Raises
        ------
        StaleBlock
            It has been released since.
        """
        hold = Hold()

        def claim(table: Table) -> tuple[Extent, int]:
            place = table.acquire(row, self._member)
            self._references.enter(row, hold)
            return place

        return hold, *self._access.run(claim)

    def attach(self, row: Row, offset: int, length: int) -> memoryview:
        """Refer to a block for as long as a view of a part of it lives, and return that, copy-on-write.

        Raises
        ------
        StaleBlock
            It has been released since.
        """
        return self._map(*self.refer(row), offset, length)

    def map(self, row: Row, extent: Extent, used: int, offset: int, length: int) -> memoryview:
        """Map a part of a block that this process refers to, copy-on-write."""
        hold = self._refer_again(row)
        self._segment.insist_whole()
        return self._map(hold, extent, used, offset, length)

    def _map(self, hold: Hold, extent: Extent, used: int, offset: int, length: int) -> memoryview:
        """Make a hold one of a view."""
        insist_within(used, offset, length)
        first, last = offset // PAGE * PAGE, round_up(offset + length)
        mapping = hold.note.mapping = self._mappings.map(BLOCKS_FROM + extent.offset + first, last - first)
        views.ATLAS.add(mapping.address, Place(self._arena_id, hold.row, first, last - first))
        whole = views.Exporter(mapping.address, last - first, hold).bytes()
        return whole[offset - first : offset - first + length]

    @step("tidy")
    def tidy(self) -> bool:
        """Give back what is gone, or leave it for later where the table is busy; return whether anything went."""
        if os.getpid() != self._pid:
            return False
        # Two threads at it would each see the list empty while the other has not given back yet.
        with self._tidying:
            return self._tidy()

    def _tidy(self) -> bool:
        # What was taken out of the list and not given back, for whatever reason, is looked for the next time.
        was_behind, self._is_behind = self._is_behind, True
        notes = self._gone.empty()
        if was_behind or self._gone.is_waited_for:
            notes = self._references.gone()
        if not notes:
            self._is_behind = False
            return False
        for note in notes:
            mapping, note.mapping = note.mapping, None
            if mapping is not None:
                # Whatever goes wrong: nobody looks there any more, and its claim must not stay for good.
                with contextlib.suppress(OSError, MemoryError):
                    self._mappings.give_back(mapping)
        try:
            self._mutex.run(functools.partial(self._cross_out, notes))
        except ArenaBusy:
            self.wake()
            return False
        self._is_behind = False
        return True

    def wait(self, seconds: float) -> None:
        """Wait until there may be something to tidy."""
        self._gone.wait(seconds)

    def wake(self) -> None:
        """Let :meth:`wait` return."""
        self._gone.wake()

    def forget_mappings(self) -> bool:
        """Unmap what has no views and is only kept; return whether that was anything."""
        return self._mappings.clear()

    def unmap_all(self) -> None:
        """Unmap everything, for a process that leaves and has no views."""
        self._mappings.clear_all()

    # -- for forked children

    def pin(self) -> Pins | None:
        """Keep what this process refers to now for a child about to be forked."""
        # Nothing is changed that others see. So a process that stands still inside the table does not matter.
        with self._mutex.among_threads:
            return self._references.pin()

    def keep(self, pins: Pins) -> None:
        """Give pinned references back when their child has ended."""
        self._references.keep(pins)

    def unpin(self) -> None:
        """Let go of what was kept for forked children that have ended."""
        self._references.unpin()

    # -- inside

    def _refer_again(self, row: Row) -> Hold:
        """Refer once more to a block; the table, which knows that this process does, need not be locked for that."""
        hold = Hold()
        if os.getpid() == self._pid and not self._access.is_damaged:
            with self._mutex.among_threads:
                if self._references.knows(row):
                    self._references.enter(row, hold)
                    return hold
        return self.refer(row)[0]

    def _cross_out(self, notes: list[Note]) -> None:
        def release(table: Table) -> None:
            for note in notes:
                if self._references.cross_out(note):
                    table.release(note.row, self._member)

        self._access.attempt(release)
        # Where the table is damaged, nothing is released, but the process may leave when nothing is held.
        for note in notes:
            self._references.cross_out(note)

    def _repair(self, table: Table) -> None:
        """Release what the table says that this process has, and nothing of it holds: a change was interrupted."""
        held = set(self._references)
        for row in table.held_by(self._member):
            if row not in held:
                table.release(row, self._member)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._references)

    def __len__(self) -> int:
        return len(self._references)
