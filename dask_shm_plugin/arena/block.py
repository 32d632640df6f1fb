"""``Draft`` (being written) → ``seal`` → ``Block`` (never written again); ``Descriptor`` (plain data, owns nothing)."""

from __future__ import annotations

import os
import warnings
from types import TracebackType
from typing import Any, NamedTuple

from dask_shm_plugin.arena.allocator import Allocator
from dask_shm_plugin.arena.holdings import Holdings, insist_within
from dask_shm_plugin.arena.pages import Pages
from dask_shm_plugin.arena.references import Hold
from dask_shm_plugin.exceptions import ArenaUnavailable
from dask_shm_plugin.mapping.exporter import Exporter
from dask_shm_plugin.table.layout import BlockId, Extent
from dask_shm_plugin.units import PAGE, round_up


class Home(NamedTuple):
    """The parts of an arena that its drafts and blocks use."""

    arena_id: bytes
    allocator: Allocator
    holdings: Holdings
    pages: Pages


class Descriptor(NamedTuple):
    """The name of a block, to be sent to other processes; when it arrives, the block may have been released."""

    arena_id: bytes
    row: BlockId


class Draft:
    """Space in the arena that only this process writes.

    As a context manager, it gives the space back at exit unless :meth:`seal` was called.

    Notes
    -----
    Not thread-safe: only one thread at a time may use it. All pages of the draft exist when it is sealed. A reader that
    touched a missing page on a machine without free memory would get SIGBUS.
    """

    def __init__(self, home: Home, hold: Hold, extent: Extent, size: int) -> None:
        self._home = home
        self._hold: Hold | None = hold
        self._extent, self._size = extent, size
        self._pid = os.getpid()
        self._exists_up_to = 0
        self._is_brief = False

    def write(self, offset: int, data: memoryview) -> None:
        """Copy flat bytes to an offset in the draft.

        Parameters
        ----------
        offset
            Where the bytes go, in bytes from the beginning of the draft.
        data
            The bytes.

        Raises
        ------
        MemoryExhausted, NoHeadRoom, LimitsReached
            There is no memory for the pages of the draft.
        ArenaUnavailable
            This process is a forked child of the process that owns the draft.
        ValueError
            The bytes do not fit in the draft, or it is sealed or given up.
        """
        if os.getpid() != self._pid:
            # Only the parent can seal the draft. When the parent dies, the space is used for other drafts.
            raise ArenaUnavailable("a forked child does not write its parent's drafts")
        data = data.cast("B")
        if self._hold is None or offset < 0 or offset + len(data) > self._extent.length:
            raise ValueError("write goes beyond the draft" if self._hold else "the draft is sealed or given up")
        self._reserve_up_to(offset // PAGE * PAGE)
        self._home.pages.write(self._extent, offset, data, lambda: self._hold)
        self._exists_up_to = max(self._exists_up_to, round_up(offset + len(data)))

    def open(self) -> memoryview:
        """Make all pages of the draft, and return its bytes to be written in place until it is sealed.

        This suits data that are read once, soon: small pages of the block are not made large later.

        Raises
        ------
        MemoryExhausted, NoHeadRoom, LimitsReached
            There is no memory for the pages of the draft.
        MappingRefused
            This process cannot map the arena.
        ValueError
            The draft is sealed or given up already.
        """
        if self._hold is None:
            raise ValueError("the draft is sealed or given up")
        part = self._home.pages.bytes_of(self._extent)
        self._home.pages.lay_open(self._extent, 0, self._extent.length)
        self._exists_up_to, self._is_brief = self._extent.length, True
        return Exporter(part.ctypes.data, self._size, (part, self._hold)).bytes()

    def _reserve_up_to(self, end: int) -> None:
        if end > self._exists_up_to:
            self._home.pages.reserve(self._extent, self._exists_up_to, end - self._exists_up_to)
            self._exists_up_to = end

    def seal(self) -> Block:
        """Turn the draft into a block that this process refers to, and that is never written again.

        Raises
        ------
        MemoryExhausted, NoHeadRoom, LimitsReached
            There is no memory for the pages that were not written.
        ValueError
            The draft is sealed or given up already.
        """
        if self._hold is None:
            raise ValueError("the draft is sealed or given up")
        self._reserve_up_to(self._extent.length)
        if not self._is_brief:
            self._home.pages.make_later(self._extent)
        hold, self._hold = self._hold, None
        try:
            self._home.allocator.seal(hold.row)
        except BaseException:
            del hold
            self._home.allocator.abandon()
            raise
        return Block(self._home, hold, self._extent, self._size)

    def __enter__(self) -> Draft:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hold is not None:
            self._hold = None
            self._home.allocator.abandon()

    def __del__(self) -> None:
        if getattr(self, "_hold", None) is not None and os.getpid() == self._pid:
            warnings.warn(f"{self!r} was neither sealed nor given up", ResourceWarning, stacklevel=2)

    def __repr__(self) -> str:
        return f"<Draft {self._hold.row if self._hold else 'closed'} {self._extent.length} bytes>"

    def __reduce__(self) -> Any:
        raise TypeError("a Draft cannot be pickled; seal it and send the Block's descriptor")


class Block:
    """One reference of this process to a sealed block; :meth:`close` drops it.

    Notes
    -----
    Thread-safe. Each view has a reference of its own and outlives the ``Block`` that made it.
    """

    def __init__(self, home: Home, hold: Hold, extent: Extent, size: int) -> None:
        self._home = home
        self._extent, self._used = extent, size
        self._pid = os.getpid()
        self._hold: Hold | None = hold
        self.row = hold.row

    @property
    def descriptor(self) -> Descriptor:
        """The name of the block, for other processes."""
        return Descriptor(self._home.arena_id, self.row)

    @property
    def holders(self) -> int:
        """The number of members that refer to the block now."""
        return self._home.allocator.holders(self.row)

    @property
    def size(self) -> int:
        """The bytes that the block takes in the arena, a multiple of the page size."""
        return self._extent.length

    def view(self, offset: int, length: int) -> memoryview:
        """Map a part of the block copy-on-write.

        Parameters
        ----------
        offset, length
            The part, in bytes.

        Returns
        -------
        memoryview
            ``length`` writeable bytes, flat. A write changes this view only. The mapping lives as long as any object
            that was made from the view.

        Raises
        ------
        MappingRefused
            The process has too many mappings or too little address space.
        ValueError
            The part is not within the used bytes of the block.
        """
        return self._home.holdings.map(self.row, self._extent, self._used, offset, length)

    def borrow(self) -> memoryview:
        """Close the block, and return all its bytes, read-only; the reference lasts as long as any view of them.

        The bytes lie in this process's one mapping of the whole segment, so nothing is mapped for them. This suits
        data that are read once, by code of this package and of Dask. A user's code might find the mapping's other bytes.

        Raises
        ------
        MappingRefused
            This process cannot map the arena.
        ValueError
            The block was closed before.
        """
        hold = self.detach()
        part = self._home.pages.look_at(self._extent, self._used)
        return Exporter(part.ctypes.data, self._used, (part, hold)).bytes().toreadonly()

    def read(self, offset: int, length: int) -> memoryview:
        """Copy a part of the block into private memory, for a process that cannot map it.

        Parameters
        ----------
        offset, length
            The part, in bytes.

        Raises
        ------
        ValueError
            The part is not within the used bytes of the block.
        """
        insist_within(self._used, offset, length)
        return self._home.pages.read(self._extent, offset, length)

    def close(self) -> None:
        """Drop the reference; the space becomes free when the last reference of all processes is released."""
        self._hold = None

    def detach(self) -> Hold:
        """Close the block and return its reference, which lasts as long as the returned object.

        Raises
        ------
        ValueError
            The block was closed before.
        """
        hold, self._hold = self._hold, None
        if hold is None:
            raise ValueError("the block is closed")
        return hold

    def __enter__(self) -> Block:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_hold", None) is not None and os.getpid() == self._pid:
            warnings.warn(f"{self!r} was not closed", ResourceWarning, stacklevel=2)

    def __repr__(self) -> str:
        return f"<Block {self.row.index} generation {self.row.generation}, {self.size} bytes>"

    def __reduce__(self) -> Any:
        raise TypeError("a Block cannot be pickled; send its descriptor")
