"""Free the shared inputs of failed tasks: the error of a task refers to itself, and to the task's inputs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from time import thread_time
from typing import Any

_DELAY_S = 1.0
"""Shortest time (s) from a failure to the search; the thread of the task has ended by then."""
_MAX_FRACTION = 0.05
"""Part of the event loop's time that searches may take when tasks fail all the time."""


class CycleCollector:
    """Searches for reference cycles some time after a task has failed, if this process holds shared values.

    Parameters
    ----------
    loop
        The worker's event loop. All methods are to be called on it.
    holds_blocks
        Returns whether this process has views of the arena.

    Notes
    -----
    Dask (2026.8.0) keeps the exception of a failed task in a variable of a function that is part of the exception's own
    traceback (``apply_function_simple``). The traceback refers to the frames of the task, and these to its inputs. They
    go when Python next looks for cycles among old objects, which a worker that is idle never does. The worker also keeps
    the exception until the scheduler releases the task.
    """

    def __init__(self, loop: Any, holds_blocks: Callable[[], bool]) -> None:
        self._loop, self._holds_blocks = loop, holds_blocks
        self._duration = 0.0
        self._timeout: object | None = None
        self._is_late = False

    def note_failure(self) -> None:
        """Plan a search; if one is planned, which may come too early for this failure, plan another one after it."""
        self._is_late = self._timeout is not None
        if self._timeout is None:
            self._timeout = self._loop.call_later(max(_DELAY_S, self._duration / _MAX_FRACTION), self._search)

    def stop(self) -> None:
        """Cancel the planned search."""
        if self._timeout is not None:
            self._loop.remove_timeout(self._timeout)
            self._timeout = None

    def _search(self) -> None:
        self._timeout = None
        if self._holds_blocks():
            start = thread_time()
            gc.collect()
            self._duration = thread_time() - start
        if self._is_late:
            self.note_failure()
