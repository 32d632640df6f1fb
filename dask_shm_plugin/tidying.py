"""The thread that cleans up, behind finalizers and behind the dead.

It gives back what finalizers have dropped, looks after dead members once a second, returns what nobody needs to the
operating system, and makes small pages large.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from dask_shm_plugin.holdings import Holdings
from dask_shm_plugin.pages import Pages
from dask_shm_plugin.roster import Roster
from dask_shm_plugin.trimming import Trimmer
from dask_shm_plugin.weights import Weights

logger = logging.getLogger(__name__)

_EVERY, _SOON = 1.0, 0.1


class Tidied(Protocol):
    """What an arena can do about it."""

    holdings: Holdings
    roster: Roster
    weights: Weights
    trimmer: Trimmer
    pages: Pages
    in_use: threading.RLock
    upkeep: Callable[[], None]

    @property
    def has_left(self) -> bool:
        """Whether there is nothing to tidy any more."""

    @property
    def is_damaged(self) -> bool:
        """Whether nothing there may be touched."""

    def inspect(self) -> None:
        """Look whether somebody has written there who must not."""

    def finish_leaving(self) -> None:
        """Leave, if that is wanted and possible."""


def start(arena: Tidied) -> None:
    """Start the thread; it ends when the arena has been left."""
    threading.Thread(target=_tidy, args=(arena,), name="dask-shm-tidy", daemon=True).start()


def _tidy(arena: Tidied) -> None:
    last = last_made = time.monotonic()
    while not arena.has_left:
        arena.holdings.wait(_SOON if arena.pages.are_behind else _EVERY)
        try:
            arena.holdings.tidy()
            if time.monotonic() - last_made >= _SOON and not arena.is_damaged:
                last_made = time.monotonic()
                with arena.in_use:
                    arena.pages.make_up()
            if time.monotonic() - last >= _EVERY:
                last = time.monotonic()
                arena.holdings.unpin()
                if not arena.is_damaged:
                    _look_around(arena)
            arena.finish_leaving()
        except Exception:
            # Whatever it is, it must not end the tidying.
            logger.debug("tidying %r was put off", arena, exc_info=True)


def _look_around(arena: Tidied) -> None:
    arena.inspect()
    arena.roster.reclaim_dead()
    with arena.in_use:
        arena.trimmer.trim()
    arena.weights.note_other_shared()
    arena.upkeep()
