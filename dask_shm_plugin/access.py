"""How a process gets at its arena's table: under the mutex, and as long as the table can be trusted.

Anybody of the same user may write there. A process that finds that somebody has, keeps away for good: it reads nothing
from the table and writes nothing to it any more, for whatever it did would make things worse.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import TracebackType

from dask_shm_plugin import syscalls, views
from dask_shm_plugin.exceptions import ArenaUnavailable, TableCorrupt
from dask_shm_plugin.layout import TABLE_BYTES
from dask_shm_plugin.liveness import Mutex
from dask_shm_plugin.memberbook import Member
from dask_shm_plugin.segment import Segment
from dask_shm_plugin.table import Table

logger = logging.getLogger("dask_shm_plugin")


class Access:
    """A table, entered as a context manager, which returns it.

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

    Notes
    -----
    Thread-safe. Entering costs 2 µs more than the mutex (November 2026).
    """

    def __init__(self, segment: Segment, table: Table, mutex: Mutex) -> None:
        self._segment, self._mutex = segment, mutex
        self._table: Table | None = table
        self._damage: str | None = None
        self.member: Member | None = None

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

    def attempt(self, change: Callable[[Table], object]) -> None:
        """Change the table, for those who hold the mutex, or do nothing where it is damaged."""
        try:
            change(self._trusted())
        except TableCorrupt as error:
            self._keep_away(error)

    def __enter__(self) -> Table:
        self._mutex.__enter__()
        try:
            return self._trusted()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, TableCorrupt):
            self._keep_away(error)
        self._mutex.__exit__(kind, error, trace)

    def _trusted(self) -> Table:
        table = self._table
        if table is None:
            raise self._refusal()
        self._segment.insist_whole()
        table.check(self.member)
        return table

    def _refusal(self) -> TableCorrupt | ArenaUnavailable:
        if self._damage is not None:
            return TableCorrupt(self._damage)
        return ArenaUnavailable("this process has left the arena")

    def _keep_away(self, error: TableCorrupt) -> None:
        if self._damage is None:
            self._damage, self._table = f"the arena is damaged: {error}", None
            logger.warning(
                "Sharing is off in this process: somebody has written into the arena (%s). What is shared stays valid, "
                "all else is sent. Stop all workers of this cluster on this machine, then start them again.",
                error,
            )


def map_table(segment: Segment) -> memoryview:
    """Map the table of a segment for as long as anything refers to it."""
    address = segment.map_shared(0, TABLE_BYTES)
    return views.Exporter(address, TABLE_BYTES, functools.partial(syscalls.unmap, address, TABLE_BYTES)).bytes()
