"""Guarded access of a process to its arena's table: under the mutex, and only as long as the table can be trusted.

Any process of the same user can write to the segment. A process that finds the table damaged stops using it for good.
It neither reads nor writes the guarded table any more, because acting on damaged data could make the damage worse.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import TypeVar

from dask_shm_plugin.exceptions import ArenaUnavailable, DescriptorLost, TableCorrupt
from dask_shm_plugin.linux import syscalls
from dask_shm_plugin.linux.mutex import Mutex
from dask_shm_plugin.linux.segment import Segment
from dask_shm_plugin.mapping import exporter
from dask_shm_plugin.table.layout import TABLE_BYTES
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.table.table import Table

T = TypeVar("T")

logger = logging.getLogger("dask_shm_plugin")


class GuardedTable:
    """A table that is checked before each use, and not used any more once it is damaged.

    Parameters
    ----------
    segment
        The segment that contains the table.
    table
        The table over the mapping of the segment.
    mutex
        The mutex of the arena; held while a function runs on the table.

    Attributes
    ----------
    member
        This process, once it has joined; None before that and after it has left.
    is_over
        Whether this process is leaving the arena and cannot go back.
    repair
        Called with the table, under the mutex, before the next change if the previous change of this process did not
        complete.

    Notes
    -----
    Thread-safe. :meth:`run` costs 2 µs more than taking the mutex (November 2026).
    """

    def __init__(self, segment: Segment, table: Table, mutex: Mutex) -> None:
        self._segment, self._mutex = segment, mutex
        self._table: Table | None = table
        self._damage: str | None = None
        self._is_torn = self.is_over = False
        self.member: Member | None = None
        self.repair: Callable[[Table], None] = lambda table: None

    @property
    def is_damaged(self) -> bool:
        """Whether this process has found the table damaged, or its descriptor closed."""
        return self._damage is not None

    @property
    def table(self) -> Table:
        """The table, for methods that need no mutex.

        Raises
        ------
        TableCorrupt
            The table is damaged.
        ArenaUnavailable
            This process has left the arena.
        """
        table = self._table  # read once: another thread may set it to None meanwhile
        if table is None:
            raise self._refusal()
        return table

    def forget(self) -> None:
        """Drop the reference to the table and its mapping."""
        self._table = None

    def run(self, what: Callable[[Table], T]) -> T:
        """Call a function with the table, under the mutex, and return its result.

        An asynchronous exception may interrupt a change. As after the death of a process, the incomplete change is
        harmless to the other members. But this process lives on, so its next change first repairs the table
        (:attr:`repair`).

        Raises
        ------
        ArenaBusy
            The mutex was not free in time.
        TableCorrupt
            The table is damaged.
        ArenaUnavailable
            This process has left the arena, or is a forked child, or the lock of the table cannot be taken.
        """
        if self._damage is not None:
            raise self._refusal()
        try:
            return self._mutex.run(functools.partial(self._change, what))
        except ArenaUnavailable:
            # If the lock cannot be taken, its descriptor may have been closed and belong to another file.
            self._insist_on_descriptor()
            raise

    def attempt(self, what: Callable[[Table], object]) -> None:
        """Call a function with the table, or do nothing if it is damaged or left; the caller holds the mutex."""
        with contextlib.suppress(TableCorrupt, ArenaUnavailable):
            self._change(what)

    def leave(self, member: Member) -> None:
        """Reclaim everything that this process holds, and refuse all further calls; the caller holds the mutex.

        If it is interrupted, it may be called again.
        """
        self.member, self.is_over = None, True
        table = self._table
        if table is None:
            return
        try:
            self._segment.insist_whole()
            table.check()
            table.reclaim(member)
        except TableCorrupt as error:
            self._keep_away(error)

    def _change(self, what: Callable[[Table], T]) -> T:
        try:
            table = self._trusted()
            if self._is_torn:
                self.repair(table)
            self._is_torn = True
            result = what(table)
            self._is_torn = False
            return result
        except TableCorrupt as error:
            self._keep_away(error)
            raise

    def _insist_on_descriptor(self) -> None:
        try:
            self._segment.insist_whole()
        except TableCorrupt as error:
            self._keep_away(error)
            raise

    def _trusted(self) -> Table:
        table = self._table
        if table is None or self.is_over:
            raise self._refusal()
        self._segment.insist_whole()
        table.check(self.member)
        return table

    def _refusal(self) -> TableCorrupt | ArenaUnavailable:
        if self._damage is not None:
            return TableCorrupt(self._damage)
        return ArenaUnavailable("this process has left the arena")

    def _keep_away(self, error: TableCorrupt) -> None:
        if self._damage is not None:
            return
        self._damage, self._table = f"the arena is damaged: {error}", None
        if isinstance(error, DescriptorLost):
            self._mutex.go_alone()
            logger.warning(
                "Sharing is off in this process: something in it has closed a descriptor that it had not opened, "
                "that of the arena (number %s; os.closerange does so). What is shared stays valid, all else is sent. "
                "Let it spare the descriptors of others, then start this process again.",
                self._segment.fd,
            )
        else:
            logger.warning(
                "Sharing is off in this process: somebody has written into the arena (%s). What is shared stays valid, "
                "all else is sent. Stop all workers of this cluster on this machine, then start them again.",
                error,
            )


def map_table(segment: Segment) -> memoryview:
    """Map the table of a segment; the mapping lasts as long as any reference to the returned bytes."""
    address = segment.map_shared(0, TABLE_BYTES)
    return exporter.Exporter(address, TABLE_BYTES, exporter.AtEnd(syscalls.unmap, address, TABLE_BYTES)).bytes()
