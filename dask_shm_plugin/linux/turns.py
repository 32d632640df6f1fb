"""One writer at a time makes pages where memory is scarce, among all arenas of the machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

from dask_shm_plugin.exceptions import NoHeadRoom
from dask_shm_plugin.linux.segment import SHM_DIRECTORY

_TIMEOUT_S = 1.0
_PAUSE_S = 1e-3


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Exclude all other callers on this machine, by a lock on the directory of shared memory.

    Head-room is read, not reserved, and arenas know nothing of each other's drafts. There must never be a moment when
    writers of two arenas rely on the same room. The lock belongs to the open file, so the kernel drops it with its owner.

    Raises
    ------
    NoHeadRoom
        Another process has held the lock for a second.
    """
    try:
        fd = os.open(SHM_DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # without that directory, arenas cannot meet either
        yield
        return
    try:
        _lock(fd)
        yield
    finally:
        # Not only closed: a child that was forked meanwhile has the same open file.
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _lock(fd: int) -> None:
    until = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise NoHeadRoom("little memory is left, and another process is making pages; free memory") from None
        except OSError:  # this file system has no such locks
            return
        time.sleep(_PAUSE_S)
