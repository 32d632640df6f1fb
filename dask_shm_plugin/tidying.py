"""What is cleaned up behind finalizers and behind the dead: a list, and a thread that works it off.

A finalizer may run inside any lock, so it only puts something on the list. The thread gives it back, looks after dead
members once a second, and returns what nobody needs to the operating system.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from dask_shm_plugin.mappings import Dropped
from dask_shm_plugin.pages import Pages
from dask_shm_plugin.roster import Roster
from dask_shm_plugin.trimming import Trimmer
from dask_shm_plugin.weights import Weights

logger = logging.getLogger(__name__)

_EVERY = 1.0


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


class Tidied(Protocol):
    """What an arena can do about it."""

    roster: Roster
    weights: Weights
    trimmer: Trimmer
    pages: Pages
    upkeep: Callable[[], None]

    @property
    def has_left(self) -> bool:
        """Whether there is nothing to tidy any more."""

    @property
    def is_damaged(self) -> bool:
        """Whether nothing there may be touched."""

    def inspect(self) -> None:
        """Look whether somebody has written there who must not."""

    def tidy(self) -> bool:
        """Give back what was dropped."""

    def unpin(self) -> None:
        """Drop what was kept for forked children."""

    def finish_leaving(self) -> None:
        """Leave, if that is wanted and possible."""


def start(arena: Tidied, dropped: Bin) -> None:
    """Start the thread; it ends when the arena has been left."""
    threading.Thread(target=_tidy, args=(arena, dropped), name="dask-shm-tidy", daemon=True).start()


def _tidy(arena: Tidied, dropped: Bin) -> None:
    last = time.monotonic()
    while not arena.has_left:
        dropped.wait(_EVERY)
        try:
            arena.tidy()
            if time.monotonic() - last >= _EVERY:
                last = time.monotonic()
                arena.unpin()
                if not arena.is_damaged:
                    arena.inspect()
                    arena.roster.reclaim_dead()
                    arena.trimmer.trim()
                    arena.pages.make_up()
                    arena.weights.note_other_shared()
                    arena.upkeep()
            arena.finish_leaving()
        except Exception:
            # Whatever it is, it must not end the tidying.
            logger.debug("tidying %r was put off", arena, exc_info=True)
