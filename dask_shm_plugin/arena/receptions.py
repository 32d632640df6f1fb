"""Drafts into which bytes are received from a network, so that they need not be copied into the arena."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable

from dask_shm_plugin.arena.block import Block, Home
from dask_shm_plugin.arena.guard import GuardedTable
from dask_shm_plugin.arena.references import Hold
from dask_shm_plugin.exceptions import ArenaFull, ArenaUnavailable, MemoryExhausted
from dask_shm_plugin.mapping.exporter import Exporter
from dask_shm_plugin.table.layout import Extent
from dask_shm_plugin.units import round_up

_FULL = 0.75
"""Fraction of the capacity beyond which nothing is received into the arena: the rest is for publishing."""


class Reception(Exporter):
    """The bytes of one draft while they are received, and as long as any view of them lives.

    Notes
    -----
    The bytes lie in this process's one mapping of the whole segment, which stays writeable after :meth:`seal`, and which
    forked children do not have. So a view may be used by code of this package and of Dask's connections only. There must
    never be a moment when other code has a view of it.

    Attributes
    ----------
    is_complete
        Whether all bytes have been received. If not, it is not sealed: what has been received is copied.
    """

    __slots__ = (
        "__weakref__",
        "_address",
        "_exists_up_to",
        "_extent",
        "_home",
        "_is_given_up",
        "_lock",
        "_pid",
        "hold",
        "is_complete",
        "is_sealed",
        "size",
    )

    def __init__(self, home: Home, hold: Hold, extent: Extent, size: int) -> None:
        part = home.pages.bytes_of(extent)
        super().__init__(part.ctypes.data, size, part)
        self._address = part.ctypes.data
        self._home, self._extent, self._pid, self._lock = home, extent, os.getpid(), threading.Lock()
        self._exists_up_to, self._is_given_up = 0, False
        self.hold, self.size, self.is_complete, self.is_sealed = hold, size, False, False

    @staticmethod
    def of(view: memoryview) -> Reception | None:
        """Return the reception to which a view belongs, or None."""
        found = getattr(view.obj, "base", None)
        return found if isinstance(found, Reception) else None

    @property
    def arena_id(self) -> bytes:
        """The id of the arena."""
        return self._home.arena_id

    @property
    def address(self) -> int:
        """Where the bytes are mapped."""
        return self._address

    @property
    def is_draft(self) -> bool:
        """Whether it is neither sealed nor given up."""
        return not self.is_sealed and not self._is_given_up

    @property
    def length(self) -> int:
        """Bytes that it takes in the arena."""
        return self._extent.length

    def make_pages(self, end: int) -> None:
        """Make the pages of the first ``end`` bytes exist: these may be written then.

        Raises
        ------
        NoHeadRoom, MemoryExhausted, LimitsReached
            There is no memory for the pages.
        """
        with self._lock:
            end = min(round_up(end), self._extent.length)
            if self._is_given_up:
                raise MemoryExhausted("what was to be received here is not wanted any more")
            if end > self._exists_up_to:
                self._home.pages.lay_open(self._extent, self._exists_up_to, end - self._exists_up_to)
                self._exists_up_to = end

    def give_up(self) -> None:
        """Give the draft up, if it is not sealed. The caller makes sure that nothing is received there any more."""
        with self._lock:
            if not self.is_sealed and not self._is_given_up:
                self._is_given_up, self.is_complete, self._exists_up_to = True, False, 0
                self.hold = Hold()  # the reference to the draft is dropped

    def seal(self) -> Block:
        """Turn the draft into a block, which is never written again, and return a reference to it; may be repeated.

        Raises
        ------
        ArenaUnavailable
            This process is a forked child, which has no part in it.
        MemoryExhausted
            Some of its pages could not be made.
        SharedMemoryError
            The arena is damaged, or its table is locked for too long.
        """
        if self._exists_up_to < self._extent.length:
            raise MemoryExhausted("there was no memory for all that was received")
        if os.getpid() != self._pid:
            raise ArenaUnavailable("a forked child does not seal its parent's drafts")
        with self._lock:
            if not self.is_sealed:
                self._home.pages.make_later(self._extent)
                if not self._home.allocator.is_sealed(self.hold.row):  # an earlier call may have been interrupted
                    self._home.allocator.seal(self.hold.row)
                self.is_sealed = True
        return Block(self._home, self.hold, self._extent, self.size)


class Receptions:
    """The receptions of one process in one arena.

    Parameters
    ----------
    home
        The parts of the arena.
    access
        Its guarded table.
    reserve
        Reserves a draft of some bytes, see :meth:`Arena.reserve`.

    Notes
    -----
    Thread-safe. A reception that is dropped without being sealed is given up by the housekeeping.
    """

    def __init__(self, home: Home, access: GuardedTable, reserve: Callable[[int], tuple[Hold, Extent]]) -> None:
        self._home, self._access, self._reserve = home, access, reserve
        self._lock = threading.Lock()
        self._open: list[weakref.ref[Reception]] = []

    def open(self, size: int) -> Reception:
        """Reserve a draft, to be received into and then sealed; its pages are still to be made.

        Raises
        ------
        ArenaFull
            Less than a quarter of the arena would be left for publishing.
        SharedMemoryError
            There is no room, or this process cannot map the arena.
        """
        table = self._access.table
        if table.blocks.bytes_held() + round_up(size) > table.capacity // self._home.allocator.parts * _FULL:
            raise ArenaFull("the rest of the arena is for publishing")
        hold, extent = self._reserve(size)
        received = Reception(self._home, hold, extent, size)
        with self._lock:
            self._open = [*(one for one in self._open if one() is not None), weakref.ref(received)]
        return received

    def bytes_in_drafts(self) -> int:
        """Return the bytes of all receptions that are not sealed; they are the process's own memory."""
        received = [one() for one in self._open]
        return sum(one.length for one in received if one is not None and one.is_draft)
