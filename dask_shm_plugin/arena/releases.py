"""The queue of references that have lost their hold but are still claimed in the table.

Holds may be collected at any moment, so appending to the queue is possible at any moment. The housekeeping thread works
it off.
"""

from __future__ import annotations

import contextlib
import queue

from dask_shm_plugin.arena.references import Note


class ReleaseQueue:
    """A queue of the notes of holds that are gone.

    Attributes
    ----------
    put
        Appends a note. It may be called at any moment, in any thread, inside any lock: ``SimpleQueue.put`` is
        documented to be reentrant, and it is written in C, so that no exception can interrupt it.
    is_waited_for
        Whether a thread in :meth:`wait` may have taken a note out of the queue that it has not put back yet.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Note | None] = queue.SimpleQueue()
        self.put = self._queue.put
        # From Python 3.13 on, an item is handed to the thread that waits for it while that thread still sleeps.
        self.is_waited_for = False

    def wake(self) -> None:
        """Let :meth:`wait` return."""
        self.put(None)

    def wait(self, seconds: float) -> None:
        """Wait until the queue has an item, for so many seconds at most."""
        self.is_waited_for = True
        try:
            with contextlib.suppress(queue.Empty):
                self.put(self._queue.get(timeout=seconds))
        finally:
            self.is_waited_for = False

    def empty(self) -> list[Note]:
        """Take all notes out of the queue and return them."""
        items: list[Note] = []
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._queue.get_nowait()
                if item is not None:
                    items.append(item)
        return items
