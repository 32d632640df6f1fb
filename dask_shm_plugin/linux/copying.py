"""Copies within memory, by several threads if they are large: one thread does not use the full memory bandwidth."""

from __future__ import annotations

import collections
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_STEP_BYTES = 2 << 20
_MIN_PARALLEL_BYTES = 4 * _STEP_BYTES
_MAX_HELPERS = 3


class Copier:
    """Copies memory with the help of threads, which are started for the first large copy.

    Notes
    -----
    Thread-safe. Does not hold the GIL while it copies.

    The calling thread copies, too, and waits only for helpers that have begun. So while all processors are busy, a copy
    takes as long as without helpers.

    There must never be a moment when a helper copies and the target may be reused. The call waits for the helpers even
    after ``KeyboardInterrupt``; if that wait is interrupted as well, the helpers keep the target alive (``keep``).

    Unusable in a forked child if the parent has used it: the threads do not survive the fork.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def copy(self, target: Bytes, source: Bytes, keep: Callable[[], object] = lambda: None) -> None:
        """Copy flat bytes to a target of the same length.

        Parameters
        ----------
        target, source
            Flat arrays of equal length.
        keep
            Called once per helper. The helper keeps the returned object until it is done, so that the target is not
            reused while the helper still copies, even if the wait for it is interrupted.
        """
        if len(source) < _MIN_PARALLEL_BYTES:
            np.copyto(target, source)
            return
        steps = _Steps(target, source)
        helping: list[Future[None]] = []
        try:
            self._start(steps.help, keep, helping)
            steps.copy_all()
        finally:
            steps.stop(helping)
            steps.wait()
        if steps.failures:
            raise steps.failures[0]

    def close(self) -> None:
        """Let the threads end after the copies in progress. Later copies start new ones."""
        with self._lock:
            if self._threads is not None:
                self._threads.shutdown(wait=False)
                self._threads = None

    def _start(self, work: Callable[[object], None], keep: Callable[[], object], helping: list[Future[None]]) -> None:
        helpers = min(len(os.sched_getaffinity(0)) - 1, _MAX_HELPERS)
        if helpers < 1:
            return
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(helpers, thread_name_prefix="dask-shm-copy-along")
            threads = self._threads
        # An executor that can start no thread raises, and may have queued the call all the same.
        with contextlib.suppress(RuntimeError):
            for _ in range(helpers):
                helping.append(threads.submit(work, keep()))


class _Steps:
    """The steps of one copy. Each is taken by one thread: the caller's, or a helper's."""

    def __init__(self, target: Bytes, source: Bytes) -> None:
        self._target, self._source = target, source
        self._left = collections.deque(range(0, len(source), _STEP_BYTES))
        self._lock = threading.Lock()
        self._taken, self._finished = 0, threading.Semaphore(0)
        self.failures: list[BaseException] = []

    def copy_all(self) -> None:
        """Copy, in the caller's thread, as long as steps are left."""
        with contextlib.suppress(IndexError):
            while True:
                self._copy(self._left.popleft())

    def help(self, kept: object) -> None:
        """Copy, in a helper's thread, as long as steps are left; ``kept`` lives as long as this call."""
        while (at := self._take()) is not None:
            try:
                self._copy(at)
            except BaseException as error:
                self.failures.append(error)
            finally:
                self._finished.release()

    def stop(self, helping: list[Future[None]]) -> None:
        """Leave no step, and cancel the helpers that have not begun."""
        with self._lock:
            self._left.clear()
        for future in helping:
            future.cancel()

    def wait(self) -> None:
        """Wait until the helpers have finished the steps that they have taken."""
        for _ in range(self._taken):
            self._finished.acquire()

    def _take(self) -> int | None:
        with self._lock:
            if not self._left:
                return None
            self._taken += 1
            return self._left.popleft()

    def _copy(self, at: int) -> None:
        np.copyto(self._target[at : at + _STEP_BYTES], self._source[at : at + _STEP_BYTES])
