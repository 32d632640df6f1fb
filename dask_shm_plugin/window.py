"""The one mapping through which a process writes: for pages that exist, it is as fast as memory.

Where a page exists already, ``pwrite`` takes twice the time of a copy in memory (256 MiB: 55 to 60 ms against 28; 2 cores,
November 2026). Where it does not, ``pwrite`` is quicker, and it is the one that reports a lack of memory: a store through
a mapping would be answered by SIGBUS.

To look whether all pages are mapped takes a quarter of a copy. So what was seen is remembered, until pages are given back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dask_shm_plugin import syscalls, views
from dask_shm_plugin.copying import Copier
from dask_shm_plugin.exceptions import ArenaUnavailable, MappingRefused
from dask_shm_plugin.segment import Segment

_MOST_KNOWN = 64
_GRANULE = 16 << 20
"""Bytes that are opened at once, where they are first of use: what is never used has no page, whatever reads all memory."""


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
        self._copier = Copier()
        self._bytes: npt.NDArray[np.uint8] | None = None
        self._open: set[int] = set()
        self._known: list[tuple[int, int]] = []
        self._known_at = 0
        # It takes the address space of the whole segment, which a process may need for other things.
        self._is_refused = syscalls.address_space_is_limited()

    def knows(self, offset: int, length: int, trims: int) -> bool:
        """Tell whether a part is known to be mapped page by page, as of a moment when pages were given back so often."""
        with self._lock:
            known = self._known if self._known_at == trims else []
        return any(start <= offset and offset + length <= end for start, end in known)

    def learn(self, offset: int, length: int, trims: int) -> None:
        """Remember what :meth:`sees` or :meth:`fill` has said."""
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
        self._known, self._known_at = [*apart[-_MOST_KNOWN:], merged], trims

    def sees(self, offset: int, length: int) -> bool:
        """Tell whether a part is mapped page by page, so that all its pages exist (256 MiB: 1 ms)."""
        part = self._part(offset, length)
        return part is not None and views.is_present(part.ctypes.data, length)

    def fill(self, offset: int, length: int) -> bool:
        """Map all pages of a part, which exist; return False where that cannot be done at once."""
        part = self._part(offset, length)
        return part is not None and syscalls.populate(part.ctypes.data, length)

    def enlarge(self, offset: int, length: int) -> bool:
        """Make large pages of a part; return False where that cannot be done, see :func:`syscalls.collapse`."""
        part = self._part(offset, length)
        return part is not None and syscalls.collapse(part.ctypes.data, length)

    def write(self, offset: int, data: memoryview, keep: Callable[[], object] = lambda: None) -> None:
        """Copy flat bytes to pages that are mapped, without holding the GIL; see :meth:`Copier.copy`."""
        part = self._part(offset, len(data))
        if part is None:
            raise ArenaUnavailable("this process has left the arena")
        self._copier.copy(part, np.frombuffer(data, np.uint8), keep)

    def close(self) -> None:
        """Unmap it, as soon as nobody writes."""
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
        for granule in range(start // _GRANULE, -(-end // _GRANULE)):
            if granule not in self._open:
                first = granule * _GRANULE
                try:
                    syscalls.open_up(window.ctypes.data + first, min(_GRANULE, len(window) - first))
                except OSError:  # it splits a mapping, of which there may be too many
                    return None
                self._open.add(granule)
        return window[start:end]

    def _mapped(self) -> npt.NDArray[np.uint8]:
        size = self._segment.size
        address = self._segment.map_closed(0, size)
        exporter = views.Exporter(address, size, views.AtEnd(syscalls.unmap, address, size))
        syscalls.keep_from_children(address, size)
        return np.asarray(exporter)
