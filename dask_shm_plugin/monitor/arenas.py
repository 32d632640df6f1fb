"""Take snapshots of all arenas of this user on this machine, without a scheduler."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from dask_shm_plugin.exceptions import TableCorrupt
from dask_shm_plugin.linux.sightings import Sighting, sightings
from dask_shm_plugin.monitor import snapshot
from dask_shm_plugin.monitor.seen import Snapshot


def snapshots(*, measure_large: bool = False) -> list[Snapshot]:
    """Return a snapshot of each arena, the largest first; a segment with another layout is left out.

    For ``measure_large``, see :func:`snapshot.take`.
    """
    found = []
    for seen in sightings():
        with contextlib.suppress(OSError, TableCorrupt), _opened(seen) as fd:
            found.append(snapshot.take(fd, seen, measure_large=measure_large))
    return sorted(found, key=lambda one: (-one.used, one.arena))


@contextlib.contextmanager
def _opened(seen: Sighting) -> Iterator[int]:
    """Yield a descriptor of a segment.

    In a process that is a member, it is the member's own: closing any other descriptor of the file would drop the
    locks that prove the member alive.
    """
    if os.getpid() in seen.descriptors:
        yield seen.descriptors[os.getpid()]
        return
    fd = _open(seen)
    try:
        yield fd
    finally:
        os.close(fd)


def _open(seen: Sighting) -> int:
    error = OSError("no process has it open any more")
    for pid, number in seen.descriptors.items():
        try:
            fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as refusal:
            error = refusal
            continue
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) == seen.file:
            return fd
        os.close(fd)
    raise error
