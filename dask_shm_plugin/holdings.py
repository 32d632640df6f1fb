"""What this process holds of an arena: references to blocks, the views that hang on them, and what it has dropped."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator

from dask_shm_plugin import views
from dask_shm_plugin.access import Access
from dask_shm_plugin.bin import Bin, Dropped
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import ArenaBusy
from dask_shm_plugin.forks import Pins
from dask_shm_plugin.layout import BLOCKS_FROM, Extent, Row
from dask_shm_plugin.liveness import Mutex
from dask_shm_plugin.mappings import Mappings
from dask_shm_plugin.memberbook import Member
from dask_shm_plugin.references import References
from dask_shm_plugin.segment import PAGE, Segment, round_up
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
    warm
        Bytes of mappings without views that are kept.

    Notes
    -----
    Thread-safe. Finalizers never come here: they append to a list that the tidying thread works off. There must never be a
    moment when a view is mapped and its block is not claimed: a claim comes before its mapping and goes after it.
    """

    def __init__(self, segment: Segment, mutex: Mutex, access: Access, member: Member, warm: int) -> None:
        self._pid = os.getpid()
        self._segment, self._mutex, self._access, self._member = segment, mutex, access, member
        self._arena_id = access.table.arena_id
        self._references = References()
        self._mappings = Mappings(segment, warm)
        self._dropped = Bin()
        self._tidying = threading.Lock()

    def add(self, row: Row) -> None:
        """Refer to a block or draft that the table knows to be this process's, for those who hold the mutex."""
        self._references.add(row)

    def refer(self, row: Row) -> tuple[Extent, int]:
        """Refer to a block, and return where it lies, and how many bytes of that it uses.

        Raises
        ------
        StaleBlock
            It has been released since.
        """
        with self._access as table:
            place = table.acquire(row, self._member)
            self._references.add(row)
            return place

    def attach(self, row: Row, offset: int, length: int) -> memoryview:
        """Refer to a block for as long as a view of a part of it lives, and return that, copy-on-write.

        Raises
        ------
        StaleBlock
            It has been released since.
        """
        return self._map(row, *self.refer(row), offset, length)

    def map(self, row: Row, extent: Extent, used: int, offset: int, length: int) -> memoryview:
        """Map a part of a block that this process refers to, copy-on-write."""
        self._refer_again(row)
        try:
            self._segment.insist_whole()
        except BaseException:
            self.drop(row)
            raise
        return self._map(row, extent, used, offset, length)

    def _map(self, row: Row, extent: Extent, used: int, offset: int, length: int) -> memoryview:
        """Make a reference that was just taken one of a view."""
        try:
            insist_within(used, offset, length)
            first, last = offset // PAGE * PAGE, round_up(offset + length)
            mapping = self._mappings.map(BLOCKS_FROM + extent.offset + first, last - first)
        except BaseException:
            self.drop(row)
            raise
        views.ATLAS.add(mapping.address, Place(self._arena_id, row, first, last - first))
        give_back = functools.partial(self._dropped.put, Dropped(row, mapping))
        whole = views.Exporter(mapping.address, last - first, give_back).bytes()
        return whole[offset - first : offset - first + length]

    def drop(self, row: Row) -> None:
        """Drop one reference, soon."""
        self._dropped.put(Dropped(row))

    @step("tidy")
    def tidy(self) -> bool:
        """Give back what was dropped, or leave it for later where the table is busy; return whether anything went."""
        if os.getpid() != self._pid:
            return False
        # Two threads at it would each see the list empty while the other has not given back yet.
        with self._tidying:
            dropped = self._dropped.empty()
            if not dropped:
                return False
            for item in dropped:
                if item.mapping is not None:
                    # Whatever goes wrong: nobody looks there any more, and its reference must not stay for good.
                    with contextlib.suppress(Exception):
                        self._mappings.give_back(item.mapping)
            try:
                with self._mutex:
                    gone = [item.row for item in dropped if self._references.drop(item.row)]
                    self._access.attempt(lambda table: [table.release(row, self._member) for row in gone])
            except ArenaBusy:
                for item in dropped:
                    self._dropped.put(Dropped(item.row))
                return False
            return True

    def wait(self, seconds: float) -> None:
        """Wait until there may be something to tidy."""
        self._dropped.wait(seconds)

    def wake(self) -> None:
        """Let :meth:`wait` return."""
        self._dropped.wake()

    def forget_mappings(self) -> bool:
        """Unmap what has no views and is only kept; return whether that was anything."""
        return self._mappings.clear()

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
        """Drop what was kept for forked children that have ended."""
        for row in self._references.unpinned():
            self.drop(row)

    # -- inside

    def _refer_again(self, row: Row) -> None:
        """Refer once more to a block; the table, which knows that this process does, need not be locked for that."""
        if os.getpid() == self._pid and not self._access.is_damaged:
            with self._mutex.among_threads:
                if self._references.add_another(row):
                    return
        self.refer(row)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._references)

    def __len__(self) -> int:
        return len(self._references)
