"""What finalizers leave behind: a list that they may append to wherever they run, and that somebody works off."""

from __future__ import annotations

import collections
import contextlib
import queue
from typing import NamedTuple

from dask_shm_plugin.layout import Row
from dask_shm_plugin.mappings import Mapping


class Dropped(NamedTuple):
    """A reference that nobody needs any more, with its mapping if it had one."""

    row: Row
    mapping: Mapping | None = None


class Bin:
    """What was dropped and is not given back yet.

    Notes
    -----
    :meth:`put` is for finalizers: it may be called at any moment, in any thread, inside any lock. Appending to a
    ``deque`` is atomic, and ``SimpleQueue.put`` is documented to be reentrant.
    """

    def __init__(self) -> None:
        self._dropped: collections.deque[Dropped] = collections.deque()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def put(self, dropped: Dropped) -> None:
        """Drop something."""
        self._dropped.append(dropped)
        self._wake.put(None)

    def wake(self) -> None:
        """Let :meth:`wait` return."""
        self._wake.put(None)

    def wait(self, seconds: float) -> None:
        """Wait until something was dropped."""
        with contextlib.suppress(queue.Empty):
            self._wake.get(timeout=seconds)

    def empty(self) -> list[Dropped]:
        """Take everything out."""
        items: list[Dropped] = []
        with contextlib.suppress(IndexError):
            while True:
                items.append(self._dropped.popleft())
        return items
