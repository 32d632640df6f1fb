"""Locks that the kernel drops when a process dies: they prove that a process is gone.

Two kinds of lock are used, because neither covers both cases.

- A member is live while it holds an *open file description* lock. The lock lasts as long as the process's descriptor,
  its mappings, or a forked child that inherited either. So it covers exactly the views that may exist.
- The process itself holds a classic *record* lock. The kernel drops it with the last thread of the process, even if a
  forked child lives on. ``/proc`` would report a process as dead while one of its threads still runs.

All locks are on bytes far behind the end of the file, where there will never be data.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from dask_shm_plugin.exceptions import ArenaUnavailable
from dask_shm_plugin.linux.syscalls import F_OFD_GETLK, F_OFD_SETLK, RecordLock

_FLOCK = struct.Struct("hhxxxxqqixxxx")
BEHIND_THE_FILE = 1 << 60


def hold(fd: int, byte: int, *, shared: bool = False) -> bool:
    """Take the lock on a byte for the open file description of ``fd``, without waiting; return whether it was free.

    Raises
    ------
    ArenaUnavailable
        The kernel has no such locks. Without them, live and dead members cannot be told apart.
    """
    try:
        _description_lock(fd, F_OFD_SETLK, fcntl.F_RDLCK if shared else fcntl.F_WRLCK, byte)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise ArenaUnavailable(
                f"this kernel or sandbox refuses open file description locks ({error}); "
                "sharing needs F_OFD_SETLK, which Linux has since 3.15"
            ) from error
        raise
    return True


def let_go(fd: int, byte: int) -> None:
    """Drop the lock of the open file description of ``fd`` on a byte."""
    _description_lock(fd, F_OFD_SETLK, fcntl.F_UNLCK, byte)


def is_held(fd: int, byte: int) -> bool:
    """Tell whether a byte is locked by a record lock, or by another open file description than that of ``fd``."""
    return _description_lock(fd, F_OFD_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK


def appear(fd: int, byte: int) -> bool:
    """Take the lock on a byte, and a record lock for it that ends with this process; return whether both were free."""
    return hold(fd, byte) and RecordLock(fd, BEHIND_THE_FILE + _of_process(byte)).take() == 0


def is_orphaned(fd: int, byte: int) -> bool:
    """Tell whether the process that called :func:`appear` for a byte is gone, even if a forked child of it lives on."""
    return not is_held(fd, _of_process(byte))


def _of_process(byte: int) -> int:
    # Byte -1 is the mutex's (``mutex``); the record locks take the bytes below it.
    return -2 - byte


def _description_lock(fd: int, command: int, kind: int, byte: int) -> int:
    request = _FLOCK.pack(kind, os.SEEK_SET, BEHIND_THE_FILE + byte, 1, 0)
    answer = fcntl.fcntl(fd, command, request)
    return int(_FLOCK.unpack(answer)[0])
