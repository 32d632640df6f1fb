"""How a process gets at its arena's table: under the mutex, and as long as the table can be trusted.

Anybody of the same user may write there. A process that finds that somebody has, keeps away for good: it reads nothing
from the table and writes nothing to it any more, for whatever it did would make things worse.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import TypeVar

from dask_shm_plugin import syscalls, views
from dask_shm_plugin.exceptions import ArenaUnavailable, DescriptorLost, TableCorrupt
from dask_shm_plugin.layout import TABLE_BYTES
from dask_shm_plugin.liveness import Mutex
from dask_shm_plugin.memberbook import Member
from dask_shm_plugin.segment import Segment
from dask_shm_plugin.table import Table

T = TypeVar("T")

logger = logging.getLogger("dask_shm_plugin")


class Access:
    """A table, for what is called with it.

    Parameters
    ----------
    segment
        In which the table lies.
    table
        Over its mapping.
    mutex
        Held while the table is entered.

    Attributes
    ----------
    member
        This process, once it has joined.
    is_over
        Whether this process is leaving, and nothing can stop that.
    repair
        Called with the table, under the mutex, after a change of this process's did not come to its end.

    Notes
    -----
    Thread-safe. Entering costs 2 µs more than the mutex (November 2026).
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
        """Whether somebody has written into the table who must not."""
        return self._damage is not None

    @property
    def table(self) -> Table:
        """The table, for those who look at what needs no mutex.

        Raises
        ------
        TableCorrupt
            It is damaged.
        ArenaUnavailable
            This process has left.
        """
        table = self._table  # another thread may let go of it meanwhile
        if table is None:
            raise self._refusal()
        return table

    def forget(self) -> None:
        """Let go of the table and its mapping."""
        self._table = None

    def run(self, what: Callable[[Table], T]) -> T:
        """Call something with the table, under the mutex.

        What it changes may stay half done, where an exception comes asynchronously: as after a death, that is harmless to
        all others. The next change puts it right (:attr:`repair`), for here the process lives on.
        """
        if self._damage is not None:
            raise self._refusal()
        try:
            return self._mutex.run(functools.partial(self._change, what))
        except ArenaUnavailable:
            # Where the lock cannot be had, its file may be another one by now.
            self._insist_on_descriptor()
            raise

    def attempt(self, what: Callable[[Table], object]) -> None:
        """Call something with the table, for those who are inside the mutex, or do nothing where it is damaged."""
        with contextlib.suppress(TableCorrupt):
            self._change(what)

    def leave(self, member: Member) -> None:
        """Take back all that this process has, for those who are inside the mutex; refuse everybody from now on.

        May be called again, where it was interrupted.
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
                "Sharing is off in this process: something in it has closed a descriptor that it had not opened, that of the "
                "arena (number %s; os.closerange does so). What is shared stays valid, all else is sent. Let it spare the "
                "descriptors of others, then start this process again.",
                self._segment.fd,
            )
        else:
            logger.warning(
                "Sharing is off in this process: somebody has written into the arena (%s). What is shared stays valid, "
                "all else is sent. Stop all workers of this cluster on this machine, then start them again.",
                error,
            )


def map_table(segment: Segment) -> memoryview:
    """Map the table of a segment for as long as anything refers to it."""
    address = segment.map_shared(0, TABLE_BYTES)
    return views.Exporter(address, TABLE_BYTES, views.AtEnd(syscalls.unmap, address, TABLE_BYTES)).bytes()
