"""What is gone and not given back yet: a list to which anything may be appended wherever that goes, and that somebody works off."""

from __future__ import annotations

import contextlib
import queue

from dask_shm_plugin.references import Note


class Bin:
    """The notes of holds that are gone.

    Attributes
    ----------
    put
        Called with one, it appends that. It may be called at any moment, in any thread, inside any lock:
        ``SimpleQueue.put`` is documented to be reentrant, and no line of Python that could be interrupted.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Note | None] = queue.SimpleQueue()
        self.put = self._queue.put
        self.is_waited_for = False
        """Whether a thread may have an item that it is about to put back: from 3.13 on, Python hands it over while that sleeps."""

    def wake(self) -> None:
        """Let :meth:`wait` return."""
        self.put(None)

    def wait(self, seconds: float) -> None:
        """Wait until something was put here."""
        self.is_waited_for = True
        try:
            with contextlib.suppress(queue.Empty):
                self.put(self._queue.get(timeout=seconds))
        finally:
            self.is_waited_for = False

    def empty(self) -> list[Note]:
        """Take everything out."""
        items: list[Note] = []
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._queue.get_nowait()
                if item is not None:
                    items.append(item)
        return items
