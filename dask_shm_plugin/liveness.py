"""Proof that a process is gone: a lock that the kernel drops.

Two kinds of lock, because each can do what the other cannot.

- Being alive is an *open file description* lock. It lasts as long as anything of the process lives on: its
  descriptor, its mappings, and a forked child that inherited either. So it covers exactly the views that may exist.
- Being at work on the table is a classic *record* lock. It falls with the process itself, even when a forked child
  lives on, so no death can keep it. It does not exclude threads of one process, so a ``threading.Lock`` goes with it.
  Another one, per member, tells whether the process itself is left, or only a child of it. It falls when the last thread
  has ended, so nobody writes any more, where ``/proc`` would call a process dead of which one thread still does.

Both are taken on bytes that lie far behind the end of the file, where no data will ever be.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType

from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import ArenaBusy, ArenaUnavailable
from dask_shm_plugin.syscalls import RecordLock

_FLOCK = struct.Struct("hhxxxxqqixxxx")
_BEHIND_THE_FILE = 1 << 60
_MUTEX_BYTE = _BEHIND_THE_FILE - 1
_FIRST_PAUSE, _LONGEST_PAUSE = 20e-6, 2e-3
_PATIENCE_AFTER_ALL = 1e-3
"""Seconds that somebody waits who has waited in vain before: those who are at work have the lock for less."""


def _description_lock(fd: int, command: int, kind: int, byte: int) -> int:
    request = _FLOCK.pack(kind, os.SEEK_SET, _BEHIND_THE_FILE + byte, 1, 0)
    answer = fcntl.fcntl(fd, command, request)
    return int(_FLOCK.unpack(answer)[0])


def hold(fd: int, byte: int, *, shared: bool = False) -> bool:
    """Take the lock on a byte for the open file description behind ``fd``; return whether it was free."""
    try:
        _description_lock(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK if shared else fcntl.F_WRLCK, byte)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def let_go(fd: int, byte: int) -> None:
    """Drop the lock on a byte."""
    _description_lock(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, byte)


def is_held(fd: int, byte: int) -> bool:
    """Tell whether another open file description has a lock on a byte. Its own locks are not seen."""
    return _description_lock(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK


def appear(fd: int, byte: int) -> bool:
    """Take the lock on a byte, and another one that falls with this very process; return whether both were free."""
    return hold(fd, byte) and RecordLock(fd, _BEHIND_THE_FILE + _of_process(byte)).take() == 0


def is_orphaned(fd: int, byte: int) -> bool:
    """Tell whether the process that has appeared under a byte is gone, even if a forked child of it lives on."""
    return not is_held(fd, _of_process(byte))


def _of_process(byte: int) -> int:
    # Before the mutex, going down.
    return -2 - byte


def start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since boot, or 0 when there is no such process."""
    return _number_about(pid, 19)


def parent(pid: int) -> int:
    """Return the parent of a process, or 0 when there is no such process."""
    return _number_about(pid, 1)


def _number_about(pid: int, field: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name of the program stands in parentheses and may contain anything, parentheses too.
            return int(file.read().rpartition(b")")[2].split()[field])
    except (OSError, IndexError, ValueError):
        return 0


class _AmongThreads:
    """Exclusion among the threads of this process, as a context manager that may be entered from inside.

    A signal handler or a finalizer that forks may come at any moment.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0

    def enter_first(self, patience: float) -> None:
        """Enter within so many seconds, and not from inside; else raise :exc:`ArenaBusy`."""
        if not self._lock.acquire(timeout=patience):
            raise ArenaBusy("another thread holds the table")
        self._depth += 1
        if self._depth > 1:
            self.leave()
            raise ArenaBusy("this very thread is inside, and was interrupted")

    def leave(self) -> None:
        """Leave."""
        self._depth -= 1
        self._lock.release()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *of_error: object) -> None:
        self.leave()


class Mutex:
    """Exclusion among all threads of all processes that have one file open.

    Parameters
    ----------
    fd
        The one descriptor by which this process has the file.
    patience
        Seconds after which waiting ends with :exc:`ArenaBusy`. Whoever has waited in vain waits a millisecond at most
        until the lock was free once: a stopped process shall not stop everybody else again and again.

    Attributes
    ----------
    among_threads
        Entered, it excludes the other threads of this process only, which hold the mutex for a bounded time.

    Notes
    -----
    Not reentrant. Useless in a forked child, which must not touch its parent's table: entering raises there.
    """

    def __init__(self, fd: int, patience: float = 0.25) -> None:
        self._among_processes = RecordLock(fd, _MUTEX_BYTE)
        self._pid = os.getpid()
        self._patience = patience
        self._in_vain = False
        self.among_threads = _AmongThreads()
        self.retired = False

    def __enter__(self) -> None:
        if os.getpid() != self._pid:
            raise ArenaUnavailable("a forked child does not share its parent's membership")
        self.among_threads.enter_first(self._patience)
        try:
            if self.retired:
                raise ArenaUnavailable("this process has left the arena")
            self._lock_file()
        except BaseException:
            self.among_threads.leave()
            raise

    @step("unlock")
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.retired:
                self._close()
            else:
                self._among_processes.drop()
        finally:
            self.among_threads.leave()

    def retire(self, close: Callable[[], None]) -> None:
        """From inside: refuse to be entered again, and close the file when left.

        There must never be a moment when the file could be entered or opened anew by this process, and is closed only
        then: that would drop the locks of the new descriptor, too.
        """
        self.retired, self._close = True, close

    @step("lock")
    def _lock_file(self) -> None:
        failure = self._among_processes.take()
        if failure:
            self._wait(failure)
        self._in_vain = False

    def _wait(self, failure: int) -> None:
        deadline = time.monotonic() + (_PATIENCE_AFTER_ALL if self._in_vain else self._patience)
        pause = _FIRST_PAUSE
        while failure:
            if failure not in (errno.EAGAIN, errno.EACCES):
                raise ArenaUnavailable(f"the table cannot be locked: {os.strerror(failure)}")
            if time.monotonic() >= deadline:
                self._in_vain = True
                raise ArenaBusy("another process holds the table")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            failure = self._among_processes.take()
