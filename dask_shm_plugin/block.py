"""``Draft`` (being written) → ``seal`` → ``Block`` (never written again); ``Descriptor`` (plain data, owns nothing)."""

from __future__ import annotations

import os
import warnings
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from dask_shm_plugin.exceptions import ArenaUnavailable
from dask_shm_plugin.holdings import Holdings, insist_within
from dask_shm_plugin.layout import Extent, Row
from dask_shm_plugin.pages import Pages
from dask_shm_plugin.references import Hold
from dask_shm_plugin.segment import PAGE, round_up


class Home(Protocol):
    """What drafts and blocks want of the arena in which they lie."""

    arena_id: bytes
    pages: Pages
    holdings: Holdings

    def seal(self, row: Row) -> None:
        """Make a draft a block."""

    def abandon(self) -> None:
        """Give drafts up that nothing holds any more."""

    def holders(self, row: Row) -> int:
        """Count who refers to a block."""


class Descriptor(NamedTuple):
    """The name of a block, for other processes: whoever receives it may find the block gone."""

    arena_id: bytes
    row: Row


class Draft:
    """Space in the arena that only this process writes.

    Leaving it as a context manager without having called :meth:`seal` gives the space back.

    Notes
    -----
    Belongs to one thread at a time. All pages of the draft exist when it is sealed: to read one that does not, on a
    machine that has none left, would be answered by SIGBUS.
    """

    def __init__(self, arena: Home, hold: Hold, extent: Extent, size: int) -> None:
        self._arena = arena
        self._hold: Hold | None = hold
        self._extent, self._size = extent, size
        self._pid = os.getpid()
        self._exists_up_to = 0

    def write(self, offset: int, data: memoryview) -> None:
        """Copy flat bytes to a place in the draft.

        Raises
        ------
        MemoryExhausted
            The operating system has no pages left.
        ArenaUnavailable
            This is a forked child of the process that has the draft.
        """
        if os.getpid() != self._pid:
            # The place is the parent's to seal, and somebody else's when the parent is dead.
            raise ArenaUnavailable("a forked child does not write its parent's drafts")
        data = data.cast("B")
        if self._hold is None or offset < 0 or offset + len(data) > self._extent.length:
            raise ValueError("write goes beyond the draft" if self._hold else "the draft is sealed or given up")
        self._reserve_up_to(offset // PAGE * PAGE)
        self._arena.pages.write(self._extent, offset, data, lambda: self._hold)
        self._exists_up_to = max(self._exists_up_to, round_up(offset + len(data)))

    def _reserve_up_to(self, end: int) -> None:
        if end > self._exists_up_to:
            self._arena.pages.reserve(self._extent, self._exists_up_to, end - self._exists_up_to)
            self._exists_up_to = end

    def seal(self) -> Block:
        """Make it a block that this process refers to. Nothing may be written after this.

        Raises
        ------
        MemoryExhausted
            The operating system has no pages for what was not written.
        """
        if self._hold is None:
            raise ValueError("the draft is sealed or given up")
        self._reserve_up_to(self._extent.length)
        self._arena.pages.make_later(self._extent)
        hold, self._hold = self._hold, None
        try:
            self._arena.seal(hold.row)
        except BaseException:
            del hold
            self._arena.abandon()
            raise
        return Block(self._arena, hold, self._extent, self._size)

    def __enter__(self) -> Draft:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hold is not None:
            self._hold = None
            self._arena.abandon()

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
    Thread-safe. Views keep references of their own and outlive the block they were taken from.
    """

    def __init__(self, arena: Home, hold: Hold, extent: Extent, size: int) -> None:
        self._arena = arena
        self._extent, self._used = extent, size
        self._pid = os.getpid()
        self._hold: Hold | None = hold
        self.row = hold.row

    @property
    def descriptor(self) -> Descriptor:
        """The block's name."""
        return Descriptor(self._arena.arena_id, self.row)

    @property
    def holders(self) -> int:
        """How many members refer to the block now."""
        return self._arena.holders(self.row)

    @property
    def size(self) -> int:
        """Bytes that the block takes in the arena, a multiple of the page size."""
        return self._extent.length

    def view(self, offset: int, length: int) -> memoryview:
        """Map a part of the block copy-on-write.

        Returns
        -------
        memoryview
            ``length`` writeable bytes, flat. Writes stay in this view; the mapping lives as long as anything made
            from it.

        Raises
        ------
        MappingRefused
            The process has too many mappings or too little address space.
        """
        return self._arena.holdings.map(self.row, self._extent, self._used, offset, length)

    def read(self, offset: int, length: int) -> memoryview:
        """Copy a part of the block into private memory, for a process that can map no more."""
        insist_within(self._used, offset, length)
        return self._arena.pages.read(self._extent, offset, length)

    def close(self) -> None:
        """Drop the reference; the space is free when the last one of all processes goes."""
        self._hold = None

    def detach(self) -> Hold:
        """Return the reference, which lasts as long as what is returned, and close the block.

        Raises
        ------
        ValueError
            It was closed before.
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
