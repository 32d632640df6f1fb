"""Copies within memory, by several threads where there is much: one alone does not use all that memory can do."""

from __future__ import annotations

import collections
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_STEP = 2 << 20
_SMALLEST = 4 * _STEP
_MOST_HELPERS = 3


class Copier:
    """Copies with the help of threads that it starts when they are first of use.

    Notes
    -----
    Thread-safe. Holds no GIL while it copies. Who calls copies along, and waits for nobody who has not begun: where all
    processors are busy it is done as if there were no helpers. There must never be a moment when a helper copies and the
    call is over, even by ``KeyboardInterrupt``. Not for forked children of a process that has used it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def copy(self, target: Bytes, source: Bytes, keep: Callable[[], object] = lambda: None) -> None:
        """Copy flat bytes to a place of the same length.

        Parameters
        ----------
        target, source
            The place, and the bytes.
        keep
            Returns what each helper keeps until it is done: where the wait for them is interrupted, too, the place must not
            become somebody else's meanwhile.
        """
        if len(source) < _SMALLEST:
            np.copyto(target, source)
            return
        steps = collections.deque(range(0, len(source), _STEP))

        def copy_along(kept: object = None) -> None:
            with contextlib.suppress(IndexError):
                while True:
                    at = steps.popleft()
                    np.copyto(target[at : at + _STEP], source[at : at + _STEP])

        helping = self._start(copy_along, keep)
        try:
            copy_along()
        finally:
            steps.clear()
            begun = [future for future in helping if not future.cancel()]
            wait(begun)
        for future in begun:
            future.result()

    def close(self) -> None:
        """Let the threads end, as soon as nobody copies."""
        with self._lock:
            if self._threads is not None:
                self._threads.shutdown(wait=False)
                self._threads = None

    def _start(self, work: Callable[[object], None], keep: Callable[[], object]) -> list[Future[None]]:
        helpers = min(len(os.sched_getaffinity(0)) - 1, _MOST_HELPERS)
        if helpers < 1:
            return []
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(helpers, thread_name_prefix="dask-shm-copy-along")
            try:
                return [self._threads.submit(work, keep()) for _ in range(helpers)]
            except RuntimeError:  # the interpreter is about to end
                return []
