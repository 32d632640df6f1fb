"""A mutex for all threads of all processes that have one file open.

The kernel drops a classic *record* lock when its process dies, even if a forked child lives on, so a dead process
cannot keep it. It does not exclude the threads of one process from each other, so it is combined with a ``threading``
lock.
"""

from __future__ import annotations

import errno
import functools
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import ArenaBusy, ArenaUnavailable
from dask_shm_plugin.linux.locks import BEHIND_THE_FILE
from dask_shm_plugin.linux.syscalls import RecordLock

T = TypeVar("T")
_MUTEX_BYTE = BEHIND_THE_FILE - 1
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 20e-6, 2e-3
_RETRY_TIMEOUT_S = 1e-3
"""Seconds to wait after an earlier wait has timed out: a process that is not stopped holds the lock for less."""


def run_locked(lock: threading.RLock, patience: float, what: Callable[[], T]) -> T:
    """Call a function while this thread holds a lock, which it must not hold yet; the lock is free afterwards.

    Parameters
    ----------
    lock
        The lock.
    patience
        Seconds to wait for it.
    what
        Called without arguments.

    Returns
    -------
    object
        The result of the call.

    Raises
    ------
    ArenaBusy
        Another thread held the lock for longer than ``patience``. Or this thread holds it, and was interrupted by the
        caller, such as a signal handler.

    Notes
    -----
    A signal handler or another thread may raise an exception in this thread between any two calls. The lock is free
    afterwards in each case, because:

    - The call that takes the lock, and all code after it, is inside the ``try``.
    - ``release`` is the first call of the ``finally``. It is implemented in C and cannot be interrupted.
    - There is no loop directly inside the ``try``. Python 3.13.0 may be interrupted at the backward jump of a loop, and
      then skips the ``finally``. For the same reason, a ``with`` over a lock must not contain a loop.
    - There is no ``with`` over a context manager written in Python. It may be interrupted before the first line of
      ``__exit__``.
    """
    if lock._is_owned():  # type: ignore[attr-defined]  # as threading.Condition does
        raise ArenaBusy("this thread was interrupted while it held the lock")
    try:
        if not lock.acquire(timeout=patience):
            raise ArenaBusy("another thread holds the table")
        return what()
    finally:
        try:  # noqa: SIM105 - `suppress` would be another call before `release`
            lock.release()
        except RuntimeError:  # it was never taken
            pass


class _Nothing:
    """Takes the place of the record lock after this process has lost the file; its calls do nothing and return 0."""

    take, drop = int, int


class Mutex:
    """A mutex for all threads of all processes that have one file open.

    Parameters
    ----------
    fd
        The only descriptor by which this process has the file open.
    patience
        Seconds after which waiting ends with :exc:`ArenaBusy`. After a wait that timed out, this process waits for one
        millisecond at most, until it has got the lock again: a stopped process must not delay all others repeatedly.

    Attributes
    ----------
    among_threads
        Excludes only the other threads of this process. They hold the mutex for a bounded time. Reentrant, because a
        signal handler or finalizer that forks may run while this thread holds it.
    retired
        Whether the file is closed for good, see :meth:`retire`.

    Notes
    -----
    Not reentrant. :meth:`run` raises in a forked child, which must not touch its parent's table.
    """

    def __init__(self, fd: int, patience: float = 0.25) -> None:
        self._among_processes: RecordLock | _Nothing = RecordLock(fd, _MUTEX_BYTE)
        self._pid = os.getpid()
        self._patience = patience
        self._in_vain = False
        self.among_threads = threading.RLock()
        self.retired = False

    def run(self, what: Callable[[], T]) -> T:
        """Call a function while this thread holds the mutex, and return its result; see :func:`run_locked`.

        The mutex is free afterwards, even after an interruption at any point.

        Raises
        ------
        ArenaBusy
            Another thread or process held the mutex for too long, or this thread was interrupted while it held it.
        ArenaUnavailable
            The file cannot be locked, the mutex is retired, or this is a forked child.
        """
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
                # The interruption may have come before its first line. A second unlock does no harm.
                self._among_processes.drop()
                raise

    def go_alone(self) -> None:
        """Exclude only the threads of this process from now on: the descriptor is not the file's any more."""
        self._among_processes = _Nothing()

    def retire(self, close: Callable[[], None]) -> None:
        """Close the file and refuse all later calls of :meth:`run`; the caller must hold the mutex.

        Parameters
        ----------
        close
            Closes the file.

        Notes
        -----
        There must never be a moment when this process can lock the file or open it anew before the old descriptor is
        closed: closing it would also drop the locks taken through the new one.
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
        deadline = time.monotonic() + (_RETRY_TIMEOUT_S if self._in_vain else self._patience)
        pause = _FIRST_PAUSE_S
        while failure:
            if failure not in (errno.EAGAIN, errno.EACCES):
                raise ArenaUnavailable(f"the table cannot be locked: {os.strerror(failure)}")
            if time.monotonic() >= deadline:
                self._in_vain = True
                raise ArenaBusy("another process holds the table")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            failure = self._among_processes.take()
