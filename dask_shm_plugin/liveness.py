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
import functools
import os
import struct
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import ArenaBusy, ArenaUnavailable
from dask_shm_plugin.syscalls import F_OFD_GETLK, F_OFD_SETLK, RecordLock

T = TypeVar("T")

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
    """Take the lock on a byte for the open file description behind ``fd``; return whether it was free.

    Raises
    ------
    ArenaUnavailable
        The kernel has no such locks: without them, nobody could tell the living from the dead.
    """
    try:
        _description_lock(fd, F_OFD_SETLK, fcntl.F_RDLCK if shared else fcntl.F_WRLCK, byte)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise ArenaUnavailable(
                f"this kernel or sandbox refuses locks of open files ({error}); sharing needs F_OFD_SETLK, as Linux has it from 3.15"
            ) from error
        raise
    return True


def let_go(fd: int, byte: int) -> None:
    """Drop the lock on a byte."""
    _description_lock(fd, F_OFD_SETLK, fcntl.F_UNLCK, byte)


def is_held(fd: int, byte: int) -> bool:
    """Tell whether another open file description has a lock on a byte. Its own locks are not seen."""
    return _description_lock(fd, F_OFD_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK


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


def run_locked(lock: threading.RLock, patience: float, what: Callable[[], T]) -> T:
    """Call something while this thread has a lock, which it must not have yet.

    An exception may come between any two calls: from a signal handler, or another thread may send it. Whenever it comes, the
    lock is free afterwards: what follows a call that takes it is in the ``try``, and ``release``, which Python cannot be
    interrupted in, is the first call of the ``finally``. No loop stands in the ``try`` itself, nor below a ``with`` over a lock
    anywhere here: Python 3.13.0 may be interrupted where a loop jumps back, and then passes the ``finally`` by. A ``with`` over a class that is written in Python would not do: it
    may be interrupted before the first line of ``__exit__``.

    Raises
    ------
    ArenaBusy
        Another thread has it for longer than ``patience``, in seconds; or this very thread, which was interrupted, has it.
    """
    if lock._is_owned():  # type: ignore[attr-defined]  # as threading.Condition does
        raise ArenaBusy("this very thread is inside, and was interrupted")
    try:
        if not lock.acquire(timeout=patience):
            raise ArenaBusy("another thread holds the table")
        return what()
    finally:
        try:  # noqa: SIM105 - `suppress` would be another call before it
            lock.release()
        except RuntimeError:  # it was never taken
            pass


class _Nothing:
    """In the place of a lock on a file that this process has lost."""

    take, drop = int, int


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
        Held, it excludes the other threads of this process only, which hold the mutex for a bounded time. A thread may take
        it again that has it: a signal handler or a finalizer that forks may come at any moment.

    Notes
    -----
    Not reentrant. Useless in a forked child, which must not touch its parent's table: :meth:`run` raises there.
    """

    def __init__(self, fd: int, patience: float = 0.25) -> None:
        self._among_processes: RecordLock | _Nothing = RecordLock(fd, _MUTEX_BYTE)
        self._pid = os.getpid()
        self._patience = patience
        self._in_vain = False
        self.among_threads = threading.RLock()
        self.retired = False

    def run(self, what: Callable[[], T]) -> T:
        """Call something inside. Whatever interrupts it, and wherever, nobody is inside afterwards."""
        if os.getpid() != self._pid:
            raise ArenaUnavailable("a forked child does not share its parent's membership")
        return run_locked(self.among_threads, self._patience, functools.partial(self._among_threads, what))

    def _among_threads(self, what: Callable[[], T]) -> T:
        if self.retired:
            raise ArenaUnavailable("this process has left the arena")
        try:
            self._lock_file()
            return what()
        finally:
            try:
                self._unlock_file()
            except BaseException:
                # It may have come before the first line there. To drop what is dropped already does no harm.
                self._among_processes.drop()
                raise

    def go_alone(self) -> None:
        """Exclude nobody but the threads of this process any more: the descriptor is not the file's."""
        self._among_processes = _Nothing()

    def retire(self, close: Callable[[], None]) -> None:
        """From inside: close the file, and refuse to be entered again.

        There must never be a moment when the file could be entered or opened anew by this process, and is closed only
        then: that would drop the locks of the new descriptor, too.
        """
        close()
        self.retired = True

    @step("lock")
    def _lock_file(self) -> None:
        failure = self._among_processes.take()
        if failure:
            self._wait(failure)
        self._in_vain = False

    @step("unlock")
    def _unlock_file(self) -> None:
        if not self.retired:
            self._among_processes.drop()

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
