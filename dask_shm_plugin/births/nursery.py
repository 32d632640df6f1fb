"""The drafts of one arena in which NumPy allocates the arrays of this process.

A *chunk* is a draft that is mapped at reserved addresses, at the same place among them as in the arena. An array that
is about to be published keeps its address: its chunk is mapped again, copy-on-write, and then its draft is sealed. From
then on nobody writes to the block, and what the owner writes stays private.

An allocation takes a chunk only if there is one. A thread adds chunks of those lengths that were asked for lately.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import threading
import time

import numpy as np

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.references import Hold
from dask_shm_plugin.births import bounds
from dask_shm_plugin.births.library import Figures, Library, Setup
from dask_shm_plugin.births.standby import Standby
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import MappingRefused, SharedMemoryError, StaleBlock
from dask_shm_plugin.linux import syscalls
from dask_shm_plugin.mapping import large_pages
from dask_shm_plugin.mapping.atlas import ATLAS, Place
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.table.layout import BLOCKS_FROM, Extent
from dask_shm_plugin.units import PAGE

logger = logging.getLogger("dask_shm_plugin")

_GRANULE_BYTES = 64 << 10
_QUIET_S = 0.25
"""How long no chunk is added after one could not be: at least, or 20 times as long as the failure took."""
_INTERVAL_S = 0.5
_IDLE_S = 1.0
"""How long a chunk is kept idle at most: the pages of a draft that was given back stay warm, so a new one is quick."""
_FORK_WAIT_S = 2.0
"""How long a fork waits for a chunk that is being added."""

_given: list[object] = []
"""What the library has pointers to, also in forked children: kept until it is given others."""


class Sealed(enum.IntEnum):
    """Whether a chunk is sealed: from this moment on, so that it has the owner's present bytes, or from an earlier one."""

    NOT, EARLIER, NOW = range(3)


class _Chunk:
    """A chunk: the reference to its draft or block, its place in the arena, whether it was on standby and is longer than its
    array, and whether it is sealed.

    ``rest`` is the reference while that of a shorter draft takes its place, so that an interrupt does not drop it.
    """

    __slots__ = ("extent", "hold", "is_sealed", "is_standby", "rest")

    def __init__(self, hold: Hold, extent: Extent, *, is_standby: bool) -> None:
        self.hold, self.extent, self.is_standby, self.is_sealed = hold, extent, is_standby, False
        self.rest: Hold | None = None


class Nursery:
    """The chunks of this process in one arena, from :meth:`start` until :meth:`stop` was called and all are freed.

    Parameters
    ----------
    library
        The C library.
    arena
        The arena.
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

    def __init__(self, library: Library, arena: Arena, warm: float) -> None:
        self._library, self._arena, self._idle_s = library, arena, min(warm, _IDLE_S)
        self._memory_limit: int | None = None
        self._pid = os.getpid()
        self._chunks: dict[int, _Chunk] = {}
        # Taken in this order. A finalizer may fork while this thread adds or seals.
        self._adding, self._sealing = threading.RLock(), threading.RLock()
        self._is_stopped = self.is_over = False
        self._next_look = self._quiet_until = 0.0
        self._standby = Standby(library, arena, self._add_standby)

    def start(self) -> str | None:
        """Begin to hand out chunks; return the reason if that is not possible."""
        segment = self._arena.segment
        if reason := bounds.why_not_here():
            return reason
        self._span = segment.size - BLOCKS_FROM
        granules = np.zeros(self._span // _GRANULE_BYTES + 1, np.uint16)
        try:
            self._area = syscalls.reserve_addresses(self._span)
        except OSError as error:
            return f"no addresses can be reserved ({error})"
        setup = Setup(self._area, self._span, BLOCKS_FROM, segment.device, segment.inode, PAGE, segment.fd)
        if not self._library.begin(setup, granules.ctypes.data):
            syscalls.unmap(self._area, self._span)
            return "arrays that this process has allocated in an arena are still alive"
        _given[:] = [granules]
        self._arena.budget.drafts, self._arena.budget.bare = self.bytes_in_drafts, self.bytes_without_pages
        self._set_limits()
        try:
            threading.Thread(target=self._run, name="dask-shm-born", daemon=True).start()
        except RuntimeError as error:
            self.stop()
            self._end()
            return str(error)
        return None

    def add_worker(self, memory_limit: int | None) -> None:
        """Let the tasks of a worker allocate here, within its memory limit; without a worker, only blocks of the client do."""
        self._memory_limit = memory_limit or 1 << 62

    def stop(self) -> None:
        """Hand out no more chunks; those in use stay until they are freed."""
        self._is_stopped = True
        self._library.functions.born_stop()
        self._library.stands_by(ends=True)
        self._give_back()

    def bytes_in_drafts(self) -> int:
        """Return the bytes of all chunks that have pages and are not sealed."""
        drafts = [one for one in list(self._chunks.values()) if not (one.is_standby or one.is_sealed)]
        return max(0, sum(chunk.extent.length for chunk in drafts) - self._library.figures().bare)

    def bytes_without_pages(self) -> int:
        """Return the bytes of all chunks that have no pages yet."""
        standby = [chunk.extent.length for chunk in list(self._chunks.values()) if chunk.is_standby]
        return self._library.figures().bare + sum(standby)

    def figures(self) -> Figures:
        """Return the figures of the library."""
        return self._library.figures()

    def block(self) -> contextlib.AbstractContextManager[None]:
        """Return the context of a block of the client, in which large arrays are born even if they are the first.

        In a process with a worker, only as many arrays are born as in its tasks: a task may make one that it hardly touches.
        """
        is_kept = self._memory_limit is None and not self._is_stopped
        return self._standby.block() if is_kept else contextlib.nullcontext()

    # -- adding, in the nursery's own thread

    def _fill(self) -> None:
        """Add the chunks that are wanted, until one cannot be had."""
        while not self._is_stopped and (length := self._library.functions.born_wanted()):
            started = time.monotonic()
            try:
                with self._adding:
                    self._add(length)
            except (SharedMemoryError, OSError):
                logger.debug("no chunk was added", exc_info=True)
                self._drop_strays()
                now = time.monotonic()
                self._quiet_until = now + max(_QUIET_S, 20 * (now - started))
                return
            finally:
                self._give_back()

    @step("add chunk")
    def _add(self, length: int, *, is_standby: bool = False) -> None:
        """Add a bare chunk, idle or on standby; the allocation that takes it makes its pages.

        Raises
        ------
        OSError, SharedMemoryError
            There is no room, or no memory.
        """
        bounds.insist_on_room(self._arena, length)
        # Stock Dask frees temporary arrays at once, so their pages must not add up over the phases of a computation.
        hold, extent = self._arena.reserve(length, stays_warm=False)
        address = self._area + extent.offset
        self._chunks[address] = _Chunk(hold, extent, is_standby=is_standby)
        self._arena.segment.map_shared_at(address, BLOCKS_FROM + extent.offset, length)
        if not self._library.functions.born_add(address, length, is_standby, large_pages.are_served()):
            raise MappingRefused("there are too many chunks")

    def _add_standby(self, length: int) -> None:
        with self._adding:
            self._add(length, is_standby=True)

    def _fit_all(self) -> None:
        with self._sealing, contextlib.suppress(SharedMemoryError, OSError):  # the table may be full
            for address in [address for address, chunk in list(self._chunks.items()) if chunk.is_standby]:
                self._fit(address)

    def _fit(self, address: int) -> None:
        """Give back what is left of a chunk that was on standby, if it is not any more; the caller holds the lock."""
        chunk = self._chunks[address]
        length = self._library.functions.born_length(address)
        if chunk.is_standby and 0 < length < chunk.extent.length:
            # First the mapping goes, then the claim.
            syscalls.close_off(address + length, chunk.extent.length - length)
            chunk.rest = Hold()
            chunk.extent = self._arena.allocator.shorten(chunk.hold, chunk.extent, length, chunk.rest)
            chunk.hold = chunk.rest
            chunk.is_standby = False

    # -- called by whoever publishes

    def seal(self, address: int, length: int) -> Sealed:
        """Seal the chunk in which some bytes lie, unless they are a small part of it; return whether it is sealed.

        The caller keeps the owner of these bytes alive.
        """
        if not 0 <= address - self._area < self._span or os.getpid() != self._pid:
            return Sealed.NOT
        with self._sealing:
            return Sealed.NOT if self.is_over else self._seal(address, length)

    @step("seal chunk")
    def _seal(self, address: int, length: int) -> Sealed:
        found = self._make_private(address, length)
        if found is None:
            return Sealed.NOT
        start, whole, was_private = found
        chunk = self._chunks.get(start)
        if chunk is None or chunk.is_sealed:
            return Sealed.NOT if chunk is None else Sealed.EARLIER
        try:
            self._fit(start)
            self._arena.pages.make_later(chunk.extent)
            self._seal_row(chunk)
        except (SharedMemoryError, OSError):
            # It stays a draft that nobody writes; this time, the value is copied.
            logger.debug("a chunk was not sealed", exc_info=True)
            return Sealed.NOT
        # Last what ends this: after an interruption before it, all is done again.
        ATLAS.add(start, Place(self._arena.arena_id, chunk.hold.row, 0, whole))
        chunk.is_sealed = True
        COUNTERS.count("born", whole)
        return Sealed.EARLIER if was_private else Sealed.NOW

    def _seal_row(self, chunk: _Chunk) -> None:
        try:
            self._arena.allocator.seal(chunk.hold.row)
        except StaleBlock:
            # An earlier call may have been interrupted right after this.
            if not self._arena.allocator.is_sealed(chunk.hold.row):
                raise

    @step("remap")
    def _make_private(self, address: int, length: int) -> tuple[int, int, bool] | None:
        return self._library.make_private(address, length)

    def before_fork(self) -> None:
        """Give back the chunks that are not in use, and seal the others: parent and child must not see each other's writes.

        The references that are left are held as long as the child lives.
        """
        if os.getpid() != self._pid:
            return
        # Not for ever: the thread that adds a chunk may wait for a lock that the caller has.
        with contextlib.ExitStack() as stack:
            if self._adding.acquire(timeout=_FORK_WAIT_S):
                stack.callback(self._adding.release)
            self._library.stands_by(ends=True)
            with contextlib.suppress(SharedMemoryError, OSError):
                self._give_back(every=True)
            stack.enter_context(self._sealing)
            for address, length in self._library.used():
                if not self._seal(address, length):
                    # A draft goes with its owner, so the child needs copies of its pages.
                    syscalls.populate_for_writing(address, length)

    # -- giving back

    def _run(self) -> None:
        """Give chunks back and add others, when the library says so and about twice a second; ends after :meth:`stop`."""
        while os.getpid() == self._pid:
            try:
                if self._take_a_turn():
                    return
                is_quiet = time.monotonic() < self._quiet_until
                wait_s = _QUIET_S if is_quiet else _INTERVAL_S
                self._library.functions.born_wait(int(wait_s * 1000), not is_quiet)
            except Exception:
                logger.debug("chunks are given back later", exc_info=True)
                time.sleep(_INTERVAL_S)

    def _take_a_turn(self) -> bool:
        """Do what is due; return whether all is over."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + _INTERVAL_S
            self._set_limits()
            self._drop_strays()
        self._give_back()
        self._fit_all()
        if self._standby.is_due:
            self._standby.keep(is_allowed=self._memory_limit is None and not self._is_stopped)
            self._give_back()
        if now >= self._quiet_until:
            self._fill()
        if not self._is_stopped:
            return False
        self._drop_strays()
        return self._end()

    def _end(self) -> bool:
        with self._sealing:
            if self._chunks or not self._library.functions.born_end():
                return False
            with contextlib.suppress(OSError):
                syscalls.unmap(self._area, self._span)
            self._arena.budget.drafts = self._arena.budget.bare = int
            with contextlib.suppress(SharedMemoryError, OSError):  # as when this process has left the arena
                self._arena.budget.measure()
            self.is_over = True
            return True

    def _give_back(self, *, every: bool = False) -> None:
        """Give back all chunks that are gone, or idle for too long or too many, or idle at all."""
        any_gone = False
        while self._give_one_back(every):
            any_gone = True
        if any_gone:
            self._arena.holdings.tidy()

    def _give_one_back(self, every: bool) -> bool:
        # Not while a chunk is sealed: it may be freed meanwhile, and its address must not be entered after it was removed.
        with self._sealing:
            gone = self._library.take_gone(self._idle_s, every=every or self._is_stopped)
            if gone is not None:
                self._drop(*gone)
            return gone is not None

    def _drop_strays(self) -> None:
        """Drop the chunks that the library does not know: adding or dropping them was interrupted, or has failed."""
        with self._sealing:
            for address in list(self._chunks):
                if not self._library.functions.born_length(address):
                    self._drop(address, is_emptied=True)

    @step("drop chunk")
    def _drop(self, address: int, is_emptied: bool) -> None:
        ATLAS.remove(address)
        if is_emptied:
            # Before the place is free: other processes may remember its pages.
            self._arena.allocator.count_trim()
        # A draft that stays mapped could be written by two processes, so it is kept if it cannot be closed off.
        syscalls.close_off(address, self._chunks[address].extent.length)
        self._chunks.pop(address, None)

    def _set_limits(self) -> None:
        if self._is_stopped:
            limits = bounds.NOTHING
        elif self._memory_limit is not None:
            limits = bounds.limits_of(self._arena, self._memory_limit)
        else:
            limits = bounds.limits_in_blocks(self._arena)
        self._library.functions.born_limit(*limits)
