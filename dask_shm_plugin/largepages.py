"""Large pages under an arena: 2 MiB at a time instead of 4 KiB, made where a kernel can, and tells what it has made.

They are quicker to make, and the first access to a value that others have written costs its reader next to nothing
(256 MiB: to make and to write the pages takes 36 ms instead of 102, to read one element of each 1 ms instead of 24; 2
cores, Linux 6.18, November 2026). Nothing has to be set up: a page is made large by asking for just that one. They are
made under drafts only, and only where a draft takes all of one: so they take no memory that would not be taken anyway.

Who has written to a view is read from the page table. Before Linux 6.11 that says nothing of large pages; so it is tried
once in each process, on a page of its own.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from dask_shm_plugin import limits, syscalls, views
from dask_shm_plugin.segment import NAME_PREFIX, PAGE, Segment
from dask_shm_plugin.syscalls import LARGE
from dask_shm_plugin.window import Window

_SIZE_OF_THE_KERNELS = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"
_FAIR, _GRACE = 0.5e-3, 2e-3
"""Seconds for each large page, as many small ones take, and how many more before it is given up."""
_REST = 10.0
"""Seconds until it is tried again."""
_LONG_REST = 60.0
"""Seconds until it is tried again whether there are any."""
_EACH_TIME = 0.01
"""Seconds for what is made up for at a time, ten times a second."""
_SPARE = 64 << 20
"""Bytes that must be left of the memory before something is made up for, which takes one page for a moment."""

_are_served, _tried_at = False, -_LONG_REST


class LargePages:
    """Makes the large pages of one segment.

    Parameters
    ----------
    segment, window
        Of one arena.

    Notes
    -----
    Thread-safe. To find a large page may take the kernel long: where memory is fragmented, where all processors are busy
    (it waits for each), and where it is a guest, the host of which has to find memory first (4 ms instead of 0.1). So
    whoever waits for a page gets small ones then; they are made large later, while they are in use.
    """

    def __init__(self, segment: Segment, window: Window) -> None:
        self._segment, self._window = segment, window
        self._lock = threading.Lock()
        self._small: dict[int, None] = {}
        self._large: set[int] = set()
        self._large_at = 0
        self._not_before = self._make_up_from = 0.0

    def make(self, offset: int, length: int) -> bool:
        """Make the pages of a part exist, large where it takes all of one; return whether all large ones were made.

        Parameters
        ----------
        offset, length
            The part, in the segment, in bytes, aligned to small pages.

        Raises
        ------
        MemoryExhausted
            There are no pages left.
        """
        first, end = within(offset, length)
        if first >= end or time.monotonic() < self._not_before or not are_served():
            return False
        for start, stop in ((offset, first), (end, offset + length)):
            if start < stop:
                self._segment.reserve(start, stop - start)
        return self._make_quickly(first, end)

    def make_later(self, offset: int, length: int, trims: int) -> None:
        """Take note of a part the pages of which exist, but may be small, as of a moment when pages were given back so often."""
        pages = range(*within(offset, length), LARGE)
        if pages and are_served():
            with self._lock:
                if self._large_at != trims:
                    self._large, self._large_at = set(), trims
                self._small.update(dict.fromkeys(page for page in pages if page not in self._large))

    @property
    def are_behind(self) -> bool:
        """Whether there is something to make up for."""
        return bool(self._small) and time.monotonic() >= self._make_up_from

    def make_up(self) -> None:
        """Make large what had to be small, for a bounded time. What is large already takes 17 microseconds."""
        # Not at each page: to look for room takes twenty times as long as to find a page large already (November 2026).
        if not self.are_behind or limits.head_room() < _SPARE:
            return
        until = time.monotonic() + _EACH_TIME
        while time.monotonic() < until and (page := self._next_small()) is not None:
            if self._segment.missing(page, LARGE):  # given back meanwhile: it would take memory again
                continue
            if not self._window.enlarge(page, LARGE):
                self._make_up_from = time.monotonic() + _REST
                return
            self._large.add(page)

    def _next_small(self) -> int | None:
        with self._lock:
            return self._small.popitem()[0] if self._small else None

    def _make_quickly(self, first: int, end: int) -> bool:
        """Make large pages as long as it does not take long; return whether it came to the end."""
        started, pages, at = time.monotonic(), 1, first
        while at < end:
            # Some at a time, and more each time: for each call, the kernel may have to wait for all processors.
            step = min(pages * LARGE, end - at)
            for page in range(at, at + step, LARGE):
                # The kernel wants to see one page, and looks for the large one on the same NUMA node.
                self._segment.reserve(page, 1)
            is_made = self._window.enlarge(at, step)
            pages, at = 4 * pages, at + step
            if not is_made or time.monotonic() - started > (at - first) // LARGE * _FAIR + _GRACE:
                self._not_before = time.monotonic() + _REST
                return is_made and at == end
        return True


def within(offset: int, length: int) -> tuple[int, int]:
    """Return where the large pages begin and end that a part of a segment takes as a whole."""
    return -(-offset // LARGE) * LARGE, (offset + length) // LARGE * LARGE


def are_served() -> bool:
    """Tell whether this kernel makes large pages, and tells which of them are still what others have written.

    What failed may have failed for lack of something: it is tried again after a while.
    """
    global _are_served, _tried_at
    if not _are_served and time.monotonic() - _tried_at > _LONG_REST:
        _tried_at = time.monotonic()
        try:
            _are_served = int(Path(_SIZE_OF_THE_KERNELS).read_text()) == LARGE and _are_told_apart()
        except (OSError, ValueError, MemoryError):
            _are_served = False
    return _are_served


def _are_told_apart() -> bool:
    """Make a large page, and tell whether the page table says of a private view of it what was written."""
    fd = syscalls.memory_file(f"{NAME_PREFIX}trial")
    try:
        os.ftruncate(fd, LARGE)
        os.pwrite(fd, b"1", 0)
        addresses = [how(fd, 0, LARGE) for how in (syscalls.map_shared, syscalls.map_private)]
    finally:
        os.close(fd)
    shared, private = (views.Exporter(at, LARGE, views.AtEnd(syscalls.unmap, at, LARGE)).bytes() for at in addresses)
    made, seen = addresses
    if not syscalls.collapse(made, LARGE) or bytes(private[:2]) != b"1\0":
        return False
    is_clean = views.is_present(seen, LARGE) and not views.is_written(seen, LARGE)
    private[0] = 0
    is_split = views.is_written(seen, PAGE) and not views.is_written(seen + PAGE, LARGE - PAGE)
    return is_clean and is_split and bytes(shared[:2]) == b"1\0"
