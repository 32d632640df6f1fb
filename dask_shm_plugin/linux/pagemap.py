"""The pages under a mapping: which are present, and which are private copies, according to ``/proc/self/pagemap``."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from dask_shm_plugin.units import PAGE

_RUNS, _RUN = 64, 64
_COUNTED = _RUNS * _RUN
_PRESENT, _SWAPPED, _FROM_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def is_written(address: int, length: int) -> bool:
    """Tell whether any page under a part of a private mapping was written through that mapping.

    Such a page is a private copy, and no longer has the content of the block. In ``/proc/self/pagemap``, a private copy
    is a page that is present and not the file's, or that is swapped. If pagemap cannot be read, the answer is yes.
    """
    entries = _page_table(address, length)
    if entries is None:
        return True
    touched = (entries & (_PRESENT | _SWAPPED)) != 0
    copied = touched & ((entries & _FROM_FILE) == 0) | ((entries & _SWAPPED) != 0)
    return bool(np.any(copied))


def is_present(address: int, length: int) -> bool:
    """Tell whether all pages under a part of a shared mapping are in this process's page table.

    If pagemap cannot be read, the answer is no.
    """
    entries = _page_table(address, length)
    return entries is not None and bool(np.all(entries & _PRESENT))


def touched(address: int, length: int) -> int:
    """Estimate the bytes of a mapping that are in this process's page table and are not private copies.

    Counts all pages of a small mapping, and 64 runs of 64 pages spread evenly over a large one, so the cost does not
    grow with the size. Returns ``length`` if pagemap cannot be read.
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


def _page_table(address: int, length: int) -> npt.NDArray[np.uint64] | None:
    """Return the pagemap entry of each page under a part of a mapping, or None if they cannot be read."""
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
