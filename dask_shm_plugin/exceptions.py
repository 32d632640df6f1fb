"""What can go wrong, and what the caller should do about it.

None of these ever reaches a user of Dask: every role turns them into "send the bytes instead". They matter to
callers of the pure layers and to the counters, which use ``reason`` as their key.
"""

from __future__ import annotations

import traceback


class SharedMemoryError(Exception):
    """Sharing was not possible; the remedy is in the message, the fall-back is to copy the bytes."""

    reason = "error"


class ArenaUnavailable(SharedMemoryError):
    """There is no arena to work with: it cannot be created, found or opened, or this process has left it."""

    reason = "no-arena"


class SwitchedOff(ArenaUnavailable):
    """The user wants no shared memory in this process."""

    reason = "switched-off"


class ArenaBusy(SharedMemoryError):
    """The table's lock was not free within a bounded time; trying again later may succeed."""

    reason = "lock-busy"


class OutOfResources(SharedMemoryError):
    """Something has run out: the message says what, and what the user can do; when it returns, so does sharing."""

    reason = "out-of-resources"


class ArenaFull(OutOfResources):
    """There is no room in the arena; raise ``shm.capacity`` or release results."""

    reason = "arena-full"


class MemoryExhausted(ArenaFull):
    """The operating system gave no pages for the arena, although its capacity would allow more."""

    reason = "memory-exhausted"


class FileSizeLimited(MemoryExhausted):
    """A process may not write that far into a file; raise ``ulimit -f``."""

    reason = "file-size-limited"


class NoHeadRoom(ArenaFull):
    """The machine, or a control group above this process, has not enough memory left; the kernel would kill."""

    reason = "no-head-room"


class LimitsReached(ArenaFull):
    """The workers of this node use as much memory, shared values included, as their limits allow altogether."""

    reason = "limits-reached"


class TableFull(ArenaFull):
    """Every row of the table is taken; raise ``shm.threshold`` so that fewer and larger values are shared."""

    reason = "table-full"


class MembersFull(ArenaFull):
    """The arena has as many members as it can hold."""

    reason = "members-full"


class StaleBlock(SharedMemoryError):
    """The block that a descriptor names has been released since; ask its sender for the bytes."""

    reason = "stale"


class HandleDamaged(SharedMemoryError):
    """A handle is not what its sender made; ask for the bytes."""

    reason = "damaged"


class DescriptorsExhausted(OutOfResources):
    """A process can open no more files, so it cannot read how much memory is left; raise ``ulimit -n``."""

    reason = "descriptors-exhausted"


class MappingRefused(OutOfResources):
    """The kernel refused another mapping (``vm.max_map_count`` or ``ulimit -v``)."""

    reason = "mapping-refused"


class TableCorrupt(SharedMemoryError):
    """The arena does not hold what its layout promises: somebody has written there. This process leaves it for good."""

    reason = "corrupt"


class DescriptorLost(TableCorrupt):
    """Something in this process has closed the arena's descriptor; its number may be another file's. Like damage, for good."""

    reason = "descriptor-lost"


class Unshareable(SharedMemoryError):
    """The value's own serializer does something that only a wire can undo."""

    reason = "unshareable"


def forget_values(error: BaseException | None) -> None:
    """Clear the local variables behind an error.

    A worker's log keeps the records of its last 10,000 messages, with their tracebacks, and so the values that were at
    hand (``DequeHandler`` in distributed/utils.py, 2026.8.0): their blocks would stay as long as the worker.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _reasons(kind: type[SharedMemoryError]) -> set[str]:
    return {kind.reason}.union(*(_reasons(more) for more in kind.__subclasses__()))


REASONS = _reasons(SharedMemoryError)
"""All reasons of this module."""
