"""The shared mapping through which a process writes to pages that exist: as fast as a copy in memory.

To write to existing pages, ``pwrite`` takes twice as long as a copy in memory (256 MiB: 55 to 60 ms against 28; 2
cores, November 2026). For missing pages, ``pwrite`` is quicker, and it reports a lack of memory as an error: a store
through a mapping would be answered by SIGBUS.

To check whether all pages of a part are mapped may take a quarter of the time of a copy. So the result is remembered
until pages are given back.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dask_shm_plugin.exceptions import ArenaUnavailable, MappingRefused
from dask_shm_plugin.linux import pagemap, syscalls
from dask_shm_plugin.linux.copying import Copier
from dask_shm_plugin.linux.segment import Segment
from dask_shm_plugin.mapping.exporter import AtEnd, Exporter

_MAX_KNOWN_PARTS = 64
_GRANULE_BYTES = 16 << 20
"""Bytes that are made accessible at a time, on first use: ``mlockall`` makes no pages in an inaccessible part."""


class WriteMapping:
    """A shared mapping of a whole segment, made when it is first needed.

    Parameters
    ----------
    segment
        The segment. The caller makes sure that each part has only one writer.

    Notes
    -----
    Thread-safe. Forked children do not inherit the mapping: they have nothing to write.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment, self._pid = segment, os.getpid()
        self._lock = threading.Lock()
        self._copier = Copier()
        self._bytes: npt.NDArray[np.uint8] | None = None
        self._open: set[int] = set()
        self._known: list[tuple[int, int]] = []
        self._known_at = 0
        # The mapping takes as much address space as the whole segment, which a process with a limit may need.
        self._is_refused = syscalls.address_space_is_limited()

    def knows(self, offset: int, length: int, trims: int) -> bool:
        """Tell whether all pages of a part are known to be mapped.

        Parameters
        ----------
        offset, length
            The part, in bytes.
        trims
            The trim counter of the table; parts learned at another value are not known any more.
        """
        with self._lock:
            known = self._known if self._known_at == trims else []
        return any(start <= offset and offset + length <= end for start, end in known)

    def learn(self, offset: int, length: int, trims: int) -> None:
        """Remember that all pages of a part are mapped, after :meth:`sees` or :meth:`fill`; see :meth:`knows`."""
        with self._lock:
            self._learn(offset, length, trims)

    def _learn(self, offset: int, length: int, trims: int) -> None:
        known = self._known if self._known_at == trims else []
        apart = [part for part in known if part[1] < offset or offset + length < part[0]]
        touching = [part for part in known if part not in apart]
        merged = (
            min([offset, *(start for start, _ in touching)]),
            max([offset + length, *(end for _, end in touching)]),
        )
        self._known, self._known_at = [*apart[-_MAX_KNOWN_PARTS:], merged], trims

    def sees(self, offset: int, length: int) -> bool:
        """Tell whether this process's page table has all pages of a part, so that all of them exist (256 MiB: 1 ms)."""
        part = self._part(offset, length)
        return part is not None and pagemap.is_present(part.ctypes.data, length)

    def fill(self, offset: int, length: int) -> bool:
        """Fill the page table for a part with pages that all exist; return False if that is not possible."""
        part = self._part(offset, length)
        return part is not None and syscalls.populate(part.ctypes.data, length)

    def enlarge(self, offset: int, length: int) -> bool:
        """Make the pages of a part large; return False if that is not possible, see :func:`syscalls.collapse`."""
        part = self._part(offset, length)
        return part is not None and syscalls.collapse(part.ctypes.data, length)

    def write(self, offset: int, data: memoryview, keep: Callable[[], object] = lambda: None) -> None:
        """Copy flat bytes to mapped pages, without the GIL; see :meth:`Copier.copy` for ``keep``.

        Raises
        ------
        ArenaUnavailable
            The mapping is closed or cannot be made.
        """
        part = self._part(offset, len(data))
        if part is None:
            raise ArenaUnavailable("this process has left the arena")
        self._copier.copy(part, np.frombuffer(data, np.uint8), keep)

    def part(self, offset: int, length: int) -> npt.NDArray[np.uint8]:
        """Return a part of the mapping, which stays mapped as long as the array lives.

        All pages of the part must exist when it is read or written: a missing one may be answered by SIGBUS.

        Raises
        ------
        MappingRefused
            The mapping is closed or cannot be made, or this process is a forked child, which does not inherit it.
        """
        part = self._part(offset, length) if os.getpid() == self._pid else None
        if part is None:
            raise MappingRefused("this process cannot map the arena; check ulimit -v and vm.max_map_count")
        return part

    def close(self) -> None:
        """Unmap the segment as soon as no write is in progress; it is not mapped again."""
        with self._lock:
            self._bytes, self._is_refused = None, True
        self._copier.close()

    def _part(self, offset: int, length: int) -> npt.NDArray[np.uint8] | None:
        self._segment.insist_whole()
        with self._lock:
            if self._bytes is None and not self._is_refused:
                try:
                    self._bytes = self._mapped()
                except (MappingRefused, OSError):
                    self._is_refused = True
            return self._opened(self._bytes, offset, offset + length) if self._bytes is not None else None

    def _opened(self, window: npt.NDArray[np.uint8], start: int, end: int) -> npt.NDArray[np.uint8] | None:
        for granule in range(start // _GRANULE_BYTES, -(-end // _GRANULE_BYTES)):
            if granule not in self._open:
                first = granule * _GRANULE_BYTES
                try:
                    syscalls.open_up(window.ctypes.data + first, min(_GRANULE_BYTES, len(window) - first))
                except OSError:  # this splits a mapping, and the process may have too many mappings
                    return None
                self._open.add(granule)
        return window[start:end]

    def _mapped(self) -> npt.NDArray[np.uint8]:
        size = self._segment.size
        address = self._segment.map_closed(0, size)
        exporter = Exporter(address, size, AtEnd(syscalls.unmap, address, size))
        syscalls.keep_from_children(address, size)
        return np.asarray(exporter)
