"""Large pages under an arena: 2 MiB instead of 4 KiB, if the kernel makes them and reports private copies of them.

Large pages are quicker to make, and make the first access to a value of another process cheap. For 256 MiB, to make and
write the pages takes 36 ms instead of 102, and to read one element of each 4 KiB 1 ms instead of 24 (2 cores, Linux
6.18, November 2026). The administrator need not configure anything: the kernel is asked for each large page. They are
made only where a draft covers a whole one, so they take no memory beyond that of the draft.

Whether a view was written to is read from the page table. Before Linux 6.11, the page table does not tell this for
large pages. So each process tests it on a page of its own before it makes any.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from dask_shm_plugin.linux import limits, pagemap, syscalls
from dask_shm_plugin.linux.segment import NAME_PREFIX, Segment
from dask_shm_plugin.mapping import exporter
from dask_shm_plugin.mapping.shared import WriteMapping
from dask_shm_plugin.units import LARGE, PAGE

_KERNEL_SIZE_FILE = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"
_FAIR_S, _GRACE_S = 0.5e-3, 2e-3
"""Seconds allowed per large page, as long as its small pages take, and seconds in addition, before giving up."""
_REST_S = 10.0
"""Seconds until large pages are tried again after they took too long, or could not be made."""
_LONG_REST_S = 60.0
"""Seconds until a failed test of the kernel's support is repeated."""
_TURN_S = 0.01
"""Seconds that one :meth:`LargePages.make_up` may take; it is called up to ten times a second."""
_SPARE_BYTES = 64 << 20
"""Bytes of head-room that :meth:`LargePages.make_up` needs: for a moment, it takes one large page more."""

_are_served, _tried_at = False, -_LONG_REST_S


class LargePages:
    """Makes the large pages of one segment.

    Parameters
    ----------
    segment, window
        The segment, and the mapping through which this process writes to it.

    Notes
    -----
    Thread-safe. The kernel may take long to make a large page: if memory is fragmented, if all processors are busy (it
    waits for each of them), and in a virtual machine if the host has to find memory first (4 ms instead of 0.1). A
    writer then gets small pages at once. They are made large later, while they are in use.
    """

    def __init__(self, segment: Segment, window: WriteMapping) -> None:
        self._segment, self._window = segment, window
        self._lock = threading.Lock()
        self._small: dict[int, None] = {}
        self._large: set[int] = set()
        self._large_at = 0
        self._not_before = self._make_up_from = 0.0

    def make(self, offset: int, length: int) -> bool:
        """Make the pages of a part exist, large ones where it covers a whole one.

        Parameters
        ----------
        offset, length
            The part of the segment, in bytes, aligned to small pages.

        Returns
        -------
        bool
            Whether all pages exist, and all large ones were made. False also if the part covers no whole large page.

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
        """Note a part with pages that exist, but may be small, so that :meth:`make_up` makes them large.

        Parameters
        ----------
        offset, length
            The part of the segment, in bytes.
        trims
            The trim counter of the table. Once it has changed, pages that are known to be large may be gone.
        """
        pages = range(*within(offset, length), LARGE)
        if pages and are_served():
            with self._lock:
                if self._large_at != trims:
                    self._large, self._large_at = set(), trims
                self._small.update(dict.fromkeys(page for page in pages if page not in self._large))

    @property
    def are_behind(self) -> bool:
        """Whether pages are to be made large, and may be tried now."""
        return bool(self._small) and time.monotonic() >= self._make_up_from

    def make_up(self) -> None:
        """Make noted pages large, for a bounded time. A page that is large already takes 17 µs."""
        # Read once, not per page: the head-room takes 20 times as long as a page that is large already (November 2026).
        if not self.are_behind or limits.head_room() < _SPARE_BYTES:
            return
        until = time.monotonic() + _TURN_S
        while time.monotonic() < until and (page := self._next_small()) is not None:
            if self._segment.missing(page, LARGE):  # given back meanwhile: a large page would take memory again
                continue
            if not self._window.enlarge(page, LARGE):
                self._make_up_from = time.monotonic() + _REST_S
                return
            self._large.add(page)

    def _next_small(self) -> int | None:
        with self._lock:
            return self._small.popitem()[0] if self._small else None

    def _make_quickly(self, first: int, end: int) -> bool:
        """Make large pages until that takes too long or fails; return whether all were made."""
        started, pages, at = time.monotonic(), 1, first
        while at < end:
            # Several pages per call, four times as many each time: the kernel may wait for all processors in each call.
            step = min(pages * LARGE, end - at)
            for page in range(at, at + step, LARGE):
                # The kernel needs one small page to begin with, and takes the large one from the same NUMA node.
                self._segment.reserve(page, 1)
            is_made = self._window.enlarge(at, step)
            pages, at = 4 * pages, at + step
            if not is_made or time.monotonic() - started > (at - first) // LARGE * _FAIR_S + _GRACE_S:
                self._not_before = time.monotonic() + _REST_S
                return is_made and at == end
        return True


def within(offset: int, length: int) -> tuple[int, int]:
    """Return start and end of the whole large pages that a part of a segment covers; none if the end is not greater."""
    return -(-offset // LARGE) * LARGE, (offset + length) // LARGE * LARGE


def are_served() -> bool:
    """Tell whether this kernel makes large pages, and reports which of them are private copies.

    A failed test is repeated after a while, because it may have failed for lack of memory or descriptors.
    """
    global _are_served, _tried_at
    if not _are_served and time.monotonic() - _tried_at > _LONG_REST_S:
        _tried_at = time.monotonic()
        try:
            _are_served = int(Path(_KERNEL_SIZE_FILE).read_text()) == LARGE and _are_told_apart()
        except (OSError, ValueError, MemoryError):
            _are_served = False
    return _are_served


def _are_told_apart() -> bool:
    """Make a large page, write to a private mapping of it, and tell whether the page table reports that correctly."""
    fd = syscalls.memory_file(f"{NAME_PREFIX}trial")
    try:
        os.ftruncate(fd, LARGE)
        os.pwrite(fd, b"1", 0)
        addresses = [how(fd, 0, LARGE) for how in (syscalls.map_shared, syscalls.map_private)]
    finally:
        os.close(fd)
    shared, private = (
        exporter.Exporter(at, LARGE, exporter.AtEnd(syscalls.unmap, at, LARGE)).bytes() for at in addresses
    )
    made, seen = addresses
    if not syscalls.collapse(made, LARGE) or bytes(private[:2]) != b"1\0":
        return False
    is_clean = pagemap.is_present(seen, LARGE) and not pagemap.is_written(seen, LARGE)
    private[0] = 0
    is_split = pagemap.is_written(seen, PAGE) and not pagemap.is_written(seen + PAGE, LARGE - PAGE)
    return is_clean and is_split and bytes(shared[:2]) == b"1\0"
