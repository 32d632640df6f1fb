"""The one mapping through which a process writes: for pages that exist, it is as fast as memory.

Where a page exists already, ``pwrite`` takes twice the time of a copy in memory (256 MiB: 55 to 60 ms against 28; 2 cores,
November 2026). Where it does not, ``pwrite`` is quicker, and it is the one that reports a lack of memory: a store through
a mapping would be answered by SIGBUS.
"""

from __future__ import annotations

import functools
import threading

import numpy as np
import numpy.typing as npt

from dask_shm_plugin import syscalls, views
from dask_shm_plugin.exceptions import ArenaUnavailable, MappingRefused
from dask_shm_plugin.segment import Segment


class Window:
    """A mapping of a whole segment, made when it is first needed.

    Parameters
    ----------
    segment
        Of which nobody else writes the same part.

    Notes
    -----
    Thread-safe. Forked children do not inherit it: they have nothing to write.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._lock = threading.Lock()
        self._bytes: npt.NDArray[np.uint8] | None = None
        # It takes the address space of the whole segment, which a process may need for other things.
        self._is_refused = syscalls.address_space_is_limited()

    def sees(self, offset: int, length: int) -> bool:
        """Tell whether a part is mapped page by page, so that all its pages exist (256 MiB: 1 ms)."""
        part = self._part(offset, length)
        return part is not None and views.is_present(part.ctypes.data, length)

    def fill(self, offset: int, length: int) -> bool:
        """Map all pages of a part, which exist; return False where that cannot be done at once."""
        part = self._part(offset, length)
        return part is not None and syscalls.populate(part.ctypes.data, length)

    def write(self, offset: int, data: memoryview) -> None:
        """Copy flat bytes to pages that are mapped, without holding the GIL."""
        part = self._part(offset, len(data))
        if part is None:
            raise ArenaUnavailable("this process has left the arena")
        np.copyto(part, np.frombuffer(data, np.uint8))

    def close(self) -> None:
        """Unmap it, as soon as nobody writes."""
        with self._lock:
            self._bytes, self._is_refused = None, True

    def _part(self, offset: int, length: int) -> npt.NDArray[np.uint8] | None:
        self._segment.insist_whole()
        with self._lock:
            if self._bytes is None and not self._is_refused:
                try:
                    self._bytes = self._mapped()
                except MappingRefused:
                    self._is_refused = True
            return None if self._bytes is None else self._bytes[offset : offset + length]

    def _mapped(self) -> npt.NDArray[np.uint8]:
        size = self._segment.size
        address = self._segment.map_shared(0, size)
        exporter = views.Exporter(address, size, functools.partial(syscalls.unmap, address, size))
        syscalls.keep_from_children(address, size)
        return np.asarray(exporter)
