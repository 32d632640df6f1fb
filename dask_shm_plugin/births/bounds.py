"""How much of an arena, and of a worker's memory, the chunks of one process may take."""

from __future__ import annotations

from typing import NamedTuple

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.budget import NEAR
from dask_shm_plugin.exceptions import MemoryExhausted, SharedMemoryError
from dask_shm_plugin.linux import limits, syscalls
from dask_shm_plugin.table.layout import BLOCKS
from dask_shm_plugin.units import LARGE

_MAX_IDLE_BYTES = 32 << 20
_MAX_WARM_BYTES = 4 << 20
"""Idle chunks with pages: more would show in the peak of a computation. The others are bare."""
_MAX_CHUNK_BYTES = 1 << 30
"""Larger arrays lie in ordinary memory: their pages exist only once they are touched."""
_MAX_STANDBY_BYTES = 4 << 30
"""The same for arrays that are made in blocks of a client: their pages are made while NumPy has the GIL."""
_SHORT = 0.6
"""Fraction of the worker's memory limit beyond which no chunk is added or kept idle; by default, Dask then begins to spill."""
_FULL = 0.75
"""Fraction of the capacity beyond which no chunk is added or kept idle: the rest is for publishing."""
_MAX_ROWS = BLOCKS // 2
"""Number of drafts and blocks in the arena from which on no chunk is added: the other rows are for publishing."""


class Limits(NamedTuple):
    """Bytes that all chunks, the idle ones, one chunk, and the idle ones with pages may have.

    ``pages`` are the bytes of pages that allocations may make for bare chunks until the limits are set again.
    """

    drafts: int
    idle: int
    largest: int
    warm: int
    pages: int


NOTHING = Limits(0, 0, 0, 0, 0)


def why_not_here() -> str | None:
    """Return the reason why this process, on this machine, can have no chunks, or None."""
    if syscalls.address_space_is_limited():
        return "the address space of this process is limited (ulimit -v)"
    if limits.commits_are_limited():  # then a mapping that is to be replaced may be lost instead, before Linux 6.12
        return "the machine does not overcommit memory (vm.overcommit_memory=2)"
    return None


def insist_on_room(arena: Arena, length: int) -> None:
    """Check that one more chunk leaves room for publishing.

    Raises
    ------
    MemoryExhausted
        It does not.
    """
    now = arena.glance()
    if now.used + length > now.capacity * _FULL or now.blocks >= _MAX_ROWS:
        raise MemoryExhausted("the rest of the arena is for publishing")


def limits_in_blocks(arena: Arena) -> Limits:
    """Return the present limits for a process without a worker, whose arrays are born in blocks of the client only."""
    try:
        now = arena.glance()
        room = max(0, int(now.capacity * _FULL) - now.used + arena.budget.drafts())
    except (SharedMemoryError, OSError):
        return NOTHING
    return Limits(room, min(room, _MAX_IDLE_BYTES), room, min(room, _MAX_WARM_BYTES), _pages(arena, now.resident))


def room_on_standby(arena: Arena) -> int:
    """Return the bytes that a chunk without pages may have now: half of what is left for chunks, and of the machine's memory.

    Raises
    ------
    OSError, SharedMemoryError
        The figures cannot be read.
    """
    now = arena.glance()
    room = min(int(now.capacity * _FULL) - now.used, limits.head_room(), 2 * _MAX_STANDBY_BYTES) // 2
    # The table counts it in full, and so do the workers whose memory is nearly used up.
    while room >= LARGE and arena.budget.use(now.used + room) > NEAR:
        room //= 2
    return max(0, room // LARGE * LARGE)


def limits_of(arena: Arena, memory_limit: int) -> Limits:
    """Return the present limits for this process.

    Parameters
    ----------
    arena
        The arena.
    memory_limit
        The memory limit of the worker, in bytes.
    """
    try:
        now = arena.glance()
        workers = arena.budget.count_workers()
        own = arena.budget.measure()
    except (SharedMemoryError, OSError):
        return NOTHING
    # Of a chunk all pages exist, so it must fit beside the worker's other memory even if it is never touched.
    left = int(memory_limit * _SHORT) - (own - arena.budget.drafts())
    drafts = max(0, min(now.capacity // (2 * workers), memory_limit // 2, left))
    is_full = now.used > now.capacity * _FULL or own > memory_limit * _SHORT
    idle, warm = (0 if is_full else min(drafts, most) for most in (_MAX_IDLE_BYTES, _MAX_WARM_BYTES))
    return Limits(drafts, idle, min(drafts // 2, _MAX_CHUNK_BYTES), warm, _pages(arena, now.resident))


def _pages(arena: Arena, resident: int) -> int:
    """Return the bytes of pages that this process may make without asking: its part of half of what the machine has left."""
    if arena.budget.use(resident) > NEAR:
        return 0
    return max(0, limits.head_room()) // (2 * arena.budget.count_workers())
