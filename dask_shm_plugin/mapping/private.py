"""The copy-on-write mappings of an arena: one for each view, and reused if no view has written to them.

A new mapping has an empty page table, and to fill it costs the reader as much as a copy of the bytes (256 MiB: 27 ms
for one access to each page, against 1.5 ms the next time; 2 cores, November 2026). Blocks come and go at the same
places, because the lowest free space is taken first. So when the views of a mapping are gone and none of its pages was
written, the mapping is kept for the next block at its place. Its pages are the arena's own and show the new block.
"""

from __future__ import annotations

import contextlib
import threading
from typing import NamedTuple

from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import MappingRefused
from dask_shm_plugin.linux import pagemap, syscalls
from dask_shm_plugin.linux.segment import Segment
from dask_shm_plugin.mapping import atlas

_MIN_KEPT_BYTES = 1 << 20
_MAX_KEPT, _MAX_KEPT_BYTES = 64, 1 << 30


class PrivateMapping(NamedTuple):
    """A part of a segment, as offset and length in bytes, aligned to pages, and the address at which it is mapped."""

    offset: int
    length: int
    address: int


class PrivateMappings:
    """The private mappings of one process.

    Parameters
    ----------
    segment
        The segment of the arena.

    Notes
    -----
    Thread-safe. There must never be a moment when a kept mapping has a living view, or contains a written page: that
    page would be a private copy of an earlier block's.
    """

    def __init__(self, segment: Segment) -> None:
        # If address space is limited, no mapping is kept: the process may need the addresses.
        self._segment, self._keep = segment, 0 if syscalls.address_space_is_limited() else _MAX_KEPT_BYTES
        self._lock = threading.Lock()
        self._kept: list[PrivateMapping] = []

    def map(self, offset: int, length: int) -> PrivateMapping:
        """Map a part of the segment copy-on-write, after the caller has checked it with :meth:`Segment.insist_whole`.

        Parameters
        ----------
        offset, length
            The part, in bytes, aligned to pages.

        Raises
        ------
        MappingRefused
            The process has too many mappings or too little address space, even without the kept mappings.
        TableCorrupt
            The segment was truncated.
        """
        kept = self._take(offset, length)
        if kept is not None:
            return kept
        try:
            return PrivateMapping(offset, length, self._segment.map_private(offset, length))
        except MappingRefused:
            if not self.clear():
                raise
            return PrivateMapping(offset, length, self._segment.map_private(offset, length))

    @step("unmap")
    def give_back(self, mapping: PrivateMapping) -> None:
        """Keep or unmap a mapping after all its views are gone."""
        atlas.ATLAS.remove(mapping.address)
        too_many = [mapping]
        if _MIN_KEPT_BYTES <= mapping.length <= self._keep and not _is_written(mapping):
            with self._lock:
                self._kept.append(mapping)
                too_many = self._beyond()
        for one in too_many:
            _unmap(one)

    def clear(self) -> bool:
        """Unmap all kept mappings; return whether there were any."""
        with self._lock:
            kept, self._kept = self._kept, []
        for mapping in kept:
            _unmap(mapping)
        return bool(kept)

    def clear_all(self) -> None:
        """Unmap all private mappings of the segment, known or not: an interrupted :meth:`map` may have left one behind.

        For a process that has no views and will have none. A mapping left behind would keep the memory of the whole
        arena.
        """
        self.clear()
        for address, length in self._segment.private_mappings():
            _unmap(PrivateMapping(0, length, address))

    def _take(self, offset: int, length: int) -> PrivateMapping | None:
        with self._lock:
            return self._pop(offset, length)

    def _pop(self, offset: int, length: int) -> PrivateMapping | None:
        for at, mapping in enumerate(self._kept):
            if (mapping.offset, mapping.length) == (offset, length):
                return self._kept.pop(at)
        return None

    def _beyond(self) -> list[PrivateMapping]:
        """Remove and return the oldest kept mappings, until the rest is within the limits."""
        taken = []
        while len(self._kept) > _MAX_KEPT or sum(mapping.length for mapping in self._kept) > self._keep:
            taken.append(self._kept.pop(0))
        return taken

    def __len__(self) -> int:
        return len(self._kept)


def _is_written(mapping: PrivateMapping) -> bool:
    # The check needs memory of its own. If there is none, the mapping counts as written, so that it is unmapped.
    try:
        return pagemap.is_written(mapping.address, mapping.length)
    except MemoryError:
        return True


def _unmap(mapping: PrivateMapping) -> None:
    with contextlib.suppress(OSError):
        syscalls.unmap(mapping.address, mapping.length)
