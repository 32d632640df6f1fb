"""What a reader sees of a block: private, writeable, copied page by page only where it writes.

Every view is a mapping of its own, so bytes that one reader has written are never handed to another. A mapping hangs
on an exporter, which outlives every array, slice and memoryview made from it, and is given back when the last of them
is gone. The atlas knows which addresses of this process are such mappings; that is how a value, or a part of one, that
lies in the arena already is recognised: by where its *living* bytes are, never by what an address used to be.
"""

from __future__ import annotations

import bisect
import functools
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dask_shm_plugin.layout import Row
from dask_shm_plugin.segment import PAGE

_RUNS, _RUN = 64, 64
_COUNTED = _RUNS * _RUN
_PRESENT, _SWAPPED, _FROM_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


class Place(NamedTuple):
    """Bytes of a block: where a frame lies in the arena."""

    arena_id: bytes
    row: Row
    offset: int
    length: int


class AtEnd:
    """Calls a function, with arguments, when this object goes, in the process that has made it.

    Its finalizer may run at any moment, in any thread, even inside a lock that this thread holds, and in forked children,
    whose parent still needs what it gives back. So it compares pids, and the function must take no lock.
    """

    __slots__ = ("_call", "_pid")

    def __init__(self, function: Callable[..., object], *arguments: Any) -> None:
        self._call, self._pid = functools.partial(function, *arguments), os.getpid()

    def __del__(self, getpid: Callable[[], int] = os.getpid) -> None:
        if getpid() == self._pid:
            self._call()


class Exporter:
    """The object at the root of all arrays and memoryviews over one mapping.

    Parameters
    ----------
    address, length
        The mapping.
    kept
        What lives as long as anything that is made from it. It has no finalizer of its own: that would be Python, and might
        be interrupted.
    """

    __slots__ = ("__array_interface__", "_kept")

    def __init__(self, address: int, length: int, kept: object) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (length,), "typestr": "|u1", "version": 3}
        self._kept = kept

    def bytes(self) -> memoryview:
        """Return the whole mapping as flat bytes that keep this object alive."""
        return np.asarray(self).data


class Atlas:
    """The private mappings of this process, by address.

    Notes
    -----
    Thread-safe. Its lock is never taken by a finalizer. A mapping is removed *before* its addresses are unmapped, so
    an address found here is never one that the kernel has given to somebody else since. What an exception has interrupted
    is not found, and counts as private: only the two together, a start and its place, are an entry.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._starts: list[int] = []
        self._mapped: dict[int, Place] = {}

    def add(self, address: int, place: Place) -> None:
        """Enter a mapping."""
        with self._lock:
            self._mapped[address] = place
            # An earlier removal may have been interrupted.
            at = bisect.bisect_left(self._starts, address)
            if self._starts[at : at + 1] != [address]:
                self._starts.insert(at, address)

    def remove(self, address: int) -> None:
        """Forget a mapping that is about to be unmapped."""
        with self._lock:
            self._mapped.pop(address, None)
            at = bisect.bisect_left(self._starts, address)
            if self._starts[at : at + 1] == [address]:
                del self._starts[at]

    def locate(self, address: int, length: int) -> Place | None:
        """Tell where in an arena the bytes at an address lie, if they lie in one.

        The caller must keep whatever owns these bytes alive.
        """
        if not self._starts or length == 0:
            return None
        with self._lock:
            at = bisect.bisect_right(self._starts, address) - 1
            if at < 0:
                return None
            start = self._starts[at]
            mapped = self._mapped.get(start)
        if mapped is None or address + length > start + mapped.length:
            return None
        return Place(mapped.arena_id, mapped.row, mapped.offset + address - start, length)

    def forget(self) -> None:
        """Begin anew, in a forked child: its parent may release these places while the child still looks at them."""
        self.__init__()  # type: ignore[misc]

    def mappings(self, arena_id: bytes) -> list[tuple[int, int]]:
        """Return address and length of every mapping of an arena."""
        with self._lock:
            mapped = list(self._mapped.items())
        return [(start, place.length) for start, place in mapped if place.arena_id == arena_id]

    def __len__(self) -> int:
        return len(self._starts)


ATLAS = Atlas()


def is_written(address: int, length: int) -> bool:
    """Tell whether any page under a part of a mapping was written through its private mapping.

    Such a page is no longer what the block holds. The kernel says so in ``/proc/self/pagemap``: a page that is
    present or swapped, but is not the file's, is a private copy. Where that cannot be read, the answer is yes.
    """
    entries = _page_table(address, length)
    if entries is None:
        return True
    touched = (entries & (_PRESENT | _SWAPPED)) != 0
    copied = touched & ((entries & _FROM_FILE) == 0) | ((entries & _SWAPPED) != 0)
    return bool(np.any(copied))


def is_present(address: int, length: int) -> bool:
    """Tell whether all pages under a part of a shared mapping are in the page table of this process."""
    entries = _page_table(address, length)
    return entries is not None and bool(np.all(entries & _PRESENT))


def _page_table(address: int, length: int) -> npt.NDArray[np.uint64] | None:
    """Return what the kernel says of each page under a part of a mapping, or None where it says nothing."""
    first, last = address // PAGE, (address + length - 1) // PAGE
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            entries = np.frombuffer(os.pread(fd, (last - first + 1) * 8, first * 8), dtype=np.uint64)
        finally:
            os.close(fd)
    except (OSError, MemoryError):
        return None
    return entries if len(entries) == last - first + 1 else None


def touched(address: int, length: int) -> int:
    """Estimate how many bytes of a mapping are in this process's page table and are still the file's.

    Counts all pages of a small mapping, and 64 runs of 64 pages spread evenly over a large one, so the cost does not
    grow with the size.
    """
    pages = length // PAGE
    runs = [(0, pages)] if pages <= _COUNTED else [(n * (pages - _RUN) // (_RUNS - 1), _RUN) for n in range(_RUNS)]
    seen = present = 0
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            for first, count in runs:
                entries = np.frombuffer(os.pread(file.fileno(), count * 8, (address // PAGE + first) * 8), np.uint64)
                seen += len(entries)
                present += int(np.count_nonzero((entries & _PRESENT) & ((entries & _FROM_FILE) << np.uint64(2))))
    except OSError:
        return length
    return length * present // seen if seen else length
