"""The drafts of one arena in which NumPy allocates the arrays of this process.

A *chunk* is a draft that is mapped at reserved addresses, at the same place among them as in the arena. An array that
is about to be published keeps its address: its chunk is mapped again, copy-on-write, and then its draft is sealed. From
then on nobody writes to the block, and what the owner writes stays private.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from typing import NamedTuple

import numpy as np

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.references import Hold
from dask_shm_plugin.born.library import Figures, Lease, Library, Setup
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import MappingRefused, MemoryExhausted, SharedMemoryError
from dask_shm_plugin.linux import syscalls
from dask_shm_plugin.mapping.atlas import ATLAS, Place
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.table.layout import BLOCKS, BLOCKS_FROM, Extent
from dask_shm_plugin.units import PAGE

logger = logging.getLogger("dask_shm_plugin")

_GRANULE_BYTES = 64 << 10
_MAX_IDLE_BYTES = 32 << 20
_MAX_CHUNK_BYTES = 1 << 30
"""Larger arrays lie in ordinary memory: their pages exist only once they are touched."""
_SHORT = 0.6
"""Fraction of the worker's memory limit beyond which no chunk is kept idle; by default, Dask then begins to spill."""
_FULL = 0.75
"""Fraction of the capacity beyond which no chunk is added or kept idle: the rest is for publishing."""
_MAX_ROWS = BLOCKS // 2
"""Number of drafts and blocks in the arena from which on no chunk is added: the other rows are for publishing."""
_PAUSE_MS = 250
"""How long nothing is leased after a lease has failed."""
_INTERVAL_S = 0.5
_IDLE_S = 1.0
"""How long a chunk is kept idle at most: the pages of a draft that was given back stay warm, so a lease is quick."""


_given: list[object] = []
"""What the library has pointers to, also in forked children: kept until it is given others."""


class _Chunk:
    """A chunk: the reference to its draft or block, its place in the arena, and whether it is sealed."""

    __slots__ = ("extent", "hold", "is_sealed")

    def __init__(self, hold: Hold, extent: Extent) -> None:
        self.hold, self.extent, self.is_sealed = hold, extent, False


class _Limits(NamedTuple):
    """Bytes that all chunks, the idle ones, and one chunk may have."""

    drafts: int
    idle: int
    largest: int


class Nursery:
    """The chunks of this process in one arena, from :meth:`start` until :meth:`stop` was called and all are freed.

    Parameters
    ----------
    library
        The C library.
    arena
        The arena.
    memory_limit
        The memory limit of the worker in bytes, or None.
    warm
        Seconds for which free memory stays resident. A chunk is not kept idle for longer.

    Attributes
    ----------
    is_over
        Whether it was stopped and its last chunk is given back.

    Notes
    -----
    Thread-safe. A chunk is claimed before it is mapped, and its mapping is closed off before its claim is released. There
    must never be a moment when two processes can write to a chunk, or one of them to a sealed one.
    """

    def __init__(self, library: Library, arena: Arena, memory_limit: int | None, warm: float) -> None:
        self._library, self._arena, self._idle_s = library, arena, min(warm, _IDLE_S)
        self._memory_limit = memory_limit or 1 << 62
        self._pid = os.getpid()
        self._chunks: dict[int, _Chunk] = {}
        self._sealing = threading.RLock()  # a finalizer may fork while this thread seals
        self._is_stopped = self.is_over = False
        self._fd = -1

    def start(self) -> str | None:
        """Begin to hand out chunks; return the reason if that is not possible."""
        segment = self._arena.segment
        if syscalls.address_space_is_limited():
            return "the address space of this process is limited (ulimit -v)"
        self._span = segment.size - BLOCKS_FROM
        granules, lease = np.zeros(self._span // _GRANULE_BYTES + 1, np.uint16), Lease(self._lease)
        try:
            self._area = syscalls.reserve_addresses(self._span)
        except OSError as error:
            return f"no addresses can be reserved ({error})"
        setup = Setup(self._area, self._span, BLOCKS_FROM, segment.device, segment.inode, PAGE, lease)
        setup.fd = segment.fd
        self._fd = self._library.begin(setup, granules.ctypes.data)
        if self._fd < 0:
            syscalls.unmap(self._area, self._span)
            return "arrays that this process has allocated in an arena are still alive"
        _given[:] = granules, lease
        self._arena.budget.drafts = self.bytes_in_drafts
        try:
            threading.Thread(target=self._run, name="dask-shm-born", daemon=True).start()
        except RuntimeError as error:
            self.stop()
            self._end()
            return str(error)
        self._set_limits()
        return None

    def stop(self) -> None:
        """Hand out no more chunks; those in use stay until they are freed."""
        self._is_stopped = True
        self._library.functions.born_stop()
        self._give_back()
        self._library.functions.born_wake()

    def bytes_in_drafts(self) -> int:
        """Return the bytes of all chunks that are not sealed."""
        return sum(chunk.extent.length for chunk in list(self._chunks.values()) if not chunk.is_sealed)

    def figures(self) -> Figures:
        """Return the figures of the library."""
        return self._library.figures()

    # -- called by the library, inside an allocation

    def _lease(self, length: int) -> int:
        """Add a chunk for the calling thread; if that is not possible, add none. Never raises."""
        started = time.monotonic()
        try:
            if not self._is_stopped and os.getpid() == self._pid:
                self.lease(length)
                return 1
        except Exception:
            # The allocation has another way to its memory. Where a failure takes long, it must be rare.
            spent_ms = int(1000 * (time.monotonic() - started))
            self._library.functions.born_pause(max(_PAUSE_MS, 20 * spent_ms))
        except BaseException as error:  # an interruption of this thread, which is not meant for the allocation
            self._library.raise_later(error)
        return 0

    @step("lease")
    def lease(self, length: int) -> None:
        """Add a chunk: for the allocation that waits for it, else an idle one.

        Raises
        ------
        SharedMemoryError
            There is no room, or no memory.
        """
        self._give_back()
        held, rows = self._taken()
        if held + length > self._arena.capacity * _FULL or rows >= _MAX_ROWS:
            raise MemoryExhausted("the rest of the arena is for publishing")
        hold, extent = self._arena.reserve(length)
        self._arena.pages.make(extent)
        address = self._area + extent.offset
        self._arena.segment.map_shared_at(address, BLOCKS_FROM + extent.offset, length)
        # Pages exist, so a failure costs faults, not a crash.
        syscalls.populate_for_writing(address, length)
        self._chunks[address] = _Chunk(hold, extent)
        if not self._library.functions.born_add(address, length):
            self._drop(address, length)
            raise MappingRefused("there are too many chunks")

    # -- called by whoever publishes

    def seal(self, address: int, length: int) -> bool:
        """Seal the chunk in which some bytes lie, unless they are a small part of it; return whether it is sealed.

        The caller keeps the owner of these bytes alive.
        """
        if not 0 <= address - self._area < self._span or os.getpid() != self._pid:
            return False
        with self._sealing:
            return self._seal(address, length)

    @step("seal chunk")
    def _seal(self, address: int, length: int) -> bool:
        found = self._make_private(address, length)
        if found is None:
            return False
        start, whole = found
        chunk = self._chunks.get(start)
        if chunk is None or chunk.is_sealed:
            return chunk is not None
        try:
            self._arena.pages.make_later(chunk.extent)
            self._arena.allocator.seal(chunk.hold.row)
        except (SharedMemoryError, OSError):
            # It stays a draft that nobody writes; this time, the value is copied.
            logger.debug("a chunk was not sealed", exc_info=True)
            return False
        chunk.is_sealed = True
        ATLAS.add(start, Place(self._arena.arena_id, chunk.hold.row, 0, whole))
        COUNTERS.count("born", whole)
        return True

    @step("remap")
    def _make_private(self, address: int, length: int) -> tuple[int, int] | None:
        return self._library.make_private(address, length)

    def before_fork(self) -> None:
        """Seal all chunks in use: parent and child must not see each other's writes."""
        if os.getpid() != self._pid:
            return
        with self._sealing:
            for address, length in self._library.used():
                if not self._seal(address, length):
                    # A draft goes with its owner, so the child needs copies of its pages.
                    syscalls.populate_for_writing(address, length)

    # -- giving back

    def _run(self) -> None:
        """Give chunks back when the library says so, and about once a second; ends after :meth:`stop`."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        while os.getpid() == self._pid:
            try:
                if poll.poll(_INTERVAL_S * 1000):
                    os.read(self._fd, 8)
                self._give_back()
                if self._is_stopped and not self._chunks and self._end():
                    return
                self._set_limits()
            except Exception:
                logger.debug("chunks are given back later", exc_info=True)
                time.sleep(_INTERVAL_S)

    def _end(self) -> bool:
        if not self._library.functions.born_end():
            return False
        with contextlib.suppress(OSError):
            syscalls.unmap(self._area, self._span)
        self._arena.budget.drafts = int
        self.is_over = True
        return True

    def _give_back(self) -> None:
        """Give back all chunks that are gone, or were idle for too long, or are idle and too many."""
        any_gone = False
        while self._give_one_back():
            any_gone = True
        if any_gone:
            self._arena.holdings.tidy()

    def _give_one_back(self) -> bool:
        # Not while a chunk is sealed: it may be freed meanwhile, and its address must not be entered after it was removed.
        with self._sealing:
            gone = self._library.take_gone(0 if self._is_stopped else self._idle_s)
            if gone is not None:
                self._drop(*gone)
            return gone is not None

    @step("drop chunk")
    def _drop(self, address: int, length: int) -> None:
        ATLAS.remove(address)
        # A draft that stays mapped could be written by two processes, so it is kept if it cannot be closed off.
        syscalls.close_off(address, length)
        self._chunks.pop(address, None)

    def _taken(self) -> tuple[int, int]:
        """Return the bytes of all drafts and blocks of the arena, and their number, as an estimate."""
        lengths = self._arena._access.table.blocks.taken_by_now()[:, 1]
        return int(lengths.sum()), len(lengths)

    def _set_limits(self) -> None:
        limits = self._limits()
        self._library.functions.born_limit(*limits)

    def _limits(self) -> _Limits:
        capacity = self._arena.capacity
        try:
            held, _ = self._taken()
            workers = self._arena.budget.count_workers()
            own = self._arena.budget.measure()
        except (SharedMemoryError, OSError):
            return _Limits(0, 0, 0)
        drafts = min(capacity // (2 * workers), self._memory_limit // 2)
        is_full = held > capacity * _FULL or own > self._memory_limit * _SHORT or self._is_stopped
        return _Limits(drafts, 0 if is_full else min(drafts // 8, _MAX_IDLE_BYTES), min(drafts // 2, _MAX_CHUNK_BYTES))
