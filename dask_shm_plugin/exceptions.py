"""The exceptions of this package, each with its remedy.

No exception of this module reaches a user of Dask: every role catches it and sends the value as bytes instead. Callers
of the lower layers handle them, and the counters use ``reason`` as their key.
"""

from __future__ import annotations

import traceback


class SharedMemoryError(Exception):
    """A value cannot be shared: the message names the remedy, and the fall-back is to copy the bytes."""

    reason = "error"


class ArenaUnavailable(SharedMemoryError):
    """No arena is available: it cannot be created, found or opened, or this process has left it."""

    reason = "no-arena"


class SwitchedOff(ArenaUnavailable):
    """The user has switched off shared memory in this process (``shm.capacity`` is zero)."""

    reason = "switched-off"


class ArenaBusy(SharedMemoryError):
    """The lock of the arena's table was not free within a bounded time; a later attempt may succeed."""

    reason = "lock-busy"


class OutOfResources(SharedMemoryError):
    """A resource has run out: the message names it and the remedy; sharing resumes when the resource is back."""

    reason = "out-of-resources"


class ArenaFull(OutOfResources):
    """The arena has no room for a block; raise ``shm.capacity`` or release results."""

    reason = "arena-full"


class MemoryExhausted(ArenaFull):
    """The operating system has no pages for the arena, although the capacity of the arena would allow more."""

    reason = "memory-exhausted"


class FileSizeLimited(MemoryExhausted):
    """The process may not write that far into the segment, which counts as a file; raise ``ulimit -f``."""

    reason = "file-size-limited"


class NoHeadRoom(ArenaFull):
    """The machine, or a control group above this process, is short of memory: the kernel would kill processes."""

    reason = "no-head-room"


class LimitsReached(ArenaFull):
    """The workers of this node, shared values included, would use more memory than the sum of their limits."""

    reason = "limits-reached"


class TableFull(ArenaFull):
    """All rows of the arena's table are taken; raise ``shm.threshold`` so that fewer and larger values are shared."""

    reason = "table-full"


class MembersFull(ArenaFull):
    """All slots for members of the arena are taken."""

    reason = "members-full"


class StaleBlock(SharedMemoryError):
    """The block that a descriptor names has been released; ask the sender for the bytes."""

    reason = "stale"


class HandleDamaged(SharedMemoryError):
    """A handle was changed on its way, or names bytes outside its block; ask the sender for the bytes."""

    reason = "damaged"


class DescriptorsExhausted(OutOfResources):
    """The process can open no more files, so it cannot read how much memory is left; raise ``ulimit -n``."""

    reason = "descriptors-exhausted"


class MappingRefused(OutOfResources):
    """The kernel refused another mapping; raise ``vm.max_map_count`` or ``ulimit -v``."""

    reason = "mapping-refused"


class TableCorrupt(SharedMemoryError):
    """The arena's table or segment is damaged, for example by a stray write; this process stops using it for good."""

    reason = "corrupt"


class DescriptorLost(TableCorrupt):
    """Code in this process has closed the arena's descriptor; this process stops using the arena for good.

    The number of the descriptor may belong to another file by now.
    """

    reason = "descriptor-lost"


class Unshareable(SharedMemoryError):
    """The serialized form of the value cannot be shared: it is compressed, or consists of very many small frames."""

    reason = "unshareable"


def forget_values(error: BaseException | None) -> None:
    """Clear the local variables of all frames in the tracebacks of an error and of its causes.

    A worker's log keeps the records of its last 10,000 messages, with their tracebacks (``DequeHandler`` in
    distributed/utils.py, 2026.8.0). The frames of a traceback refer to values, so the blocks of these values would be
    held as long as the worker lives.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _reasons(kind: type[SharedMemoryError]) -> set[str]:
    return {kind.reason}.union(*(_reasons(more) for more in kind.__subclasses__()))


REASONS = _reasons(SharedMemoryError)
"""The ``reason`` of every exception of this module."""
