"""The copy-on-write mappings of an arena: each view has one of its own, and what nobody wrote to is used again.

A mapping that is made anew has an empty page table, and to fill it costs its reader as much as a copy of the bytes would
(256 MiB: 27 ms for one access to each page, against 1.5 ms the next time; 2 cores, November 2026). Blocks come and go at
the same places, for what is low and warm is taken first. So a mapping whose views are gone is kept for the next block at
its place, if none of its pages was written: such pages are the arena's own, whatever they hold by then.
"""

from __future__ import annotations

import contextlib
import threading
from typing import NamedTuple

from dask_shm_plugin import syscalls, views
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import MappingRefused
from dask_shm_plugin.segment import Segment

_SMALLEST = 1 << 20
_MOST, _MOST_BYTES = 64, 1 << 30


class Mapping(NamedTuple):
    """A part of a segment, in bytes, aligned to pages, and where it is mapped."""

    offset: int
    length: int
    address: int


class Mappings:
    """The private mappings of one process.

    Parameters
    ----------
    segment
        Of the arena.

    Notes
    -----
    Thread-safe. There must never be a moment when a mapping is kept and a view of it lives, or when one is kept that
    somebody has written to: its page would be a copy of an earlier block's.
    """

    def __init__(self, segment: Segment) -> None:
        # Where address space is limited, a process may need it for other things.
        self._segment, self._keep = segment, 0 if syscalls.address_space_is_limited() else _MOST_BYTES
        self._lock = threading.Lock()
        self._kept: list[Mapping] = []

    def map(self, offset: int, length: int) -> Mapping:
        """Map a part of the segment copy-on-write, which the caller has seen to be whole.

        Raises
        ------
        MappingRefused
            The process has too many mappings or too little address space, and none of them is only kept.
        TableCorrupt
            Somebody has cut the segment short.
        """
        kept = self._take(offset, length)
        if kept is not None:
            return kept
        try:
            return Mapping(offset, length, self._segment.map_private(offset, length))
        except MappingRefused:
            if not self.clear():
                raise
            return Mapping(offset, length, self._segment.map_private(offset, length))

    @step("unmap")
    def give_back(self, mapping: Mapping) -> None:
        """Take a mapping back whose views are all gone, to keep it or to unmap it."""
        views.ATLAS.remove(mapping.address)
        too_many = [mapping]
        if _SMALLEST <= mapping.length <= self._keep and not _is_written(mapping):
            with self._lock:
                self._kept.append(mapping)
                too_many = self._beyond()
        for one in too_many:
            _unmap(one)

    def clear(self) -> bool:
        """Unmap what is only kept; return whether that was anything."""
        with self._lock:
            kept, self._kept = self._kept, []
        for mapping in kept:
            _unmap(mapping)
        return bool(kept)

    def clear_all(self) -> None:
        """Unmap what is only kept, and what nobody knows of: a call that maps may be interrupted before it returns.

        For a process that has no view any more and will have none: a mapping would keep the memory of the whole arena.
        """
        self.clear()
        for address, length in self._segment.private_mappings():
            _unmap(Mapping(0, length, address))

    def _take(self, offset: int, length: int) -> Mapping | None:
        with self._lock:
            return self._pop(offset, length)

    def _pop(self, offset: int, length: int) -> Mapping | None:
        for at, mapping in enumerate(self._kept):
            if (mapping.offset, mapping.length) == (offset, length):
                return self._kept.pop(at)
        return None

    def _beyond(self) -> list[Mapping]:
        """Take out the oldest, until what stays is not too much."""
        taken = []
        while len(self._kept) > _MOST or sum(mapping.length for mapping in self._kept) > self._keep:
            taken.append(self._kept.pop(0))
        return taken

    def __len__(self) -> int:
        return len(self._kept)


def _is_written(mapping: Mapping) -> bool:
    # To look takes memory of its own; what cannot be looked at is unmapped, or its references would stay for good.
    try:
        return views.is_written(mapping.address, mapping.length)
    except MemoryError:
        return True


def _unmap(mapping: Mapping) -> None:
    with contextlib.suppress(OSError):
        syscalls.unmap(mapping.address, mapping.length)
