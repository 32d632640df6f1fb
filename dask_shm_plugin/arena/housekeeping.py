"""The housekeeping thread of an arena.

It releases the references that have lost their hold, and replaces small pages by large ones. Once a second, it
reclaims the blocks that dead members held, and returns idle memory to the operating system.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

logger = logging.getLogger(__name__)

_INTERVAL_S, _SHORT_INTERVAL_S = 1.0, 0.1


class Chores(NamedTuple):
    """The work of the housekeeping thread, as functions.

    Attributes
    ----------
    wait
        Waits until there are references to release, for so many seconds at most.
    is_behind
        Tells whether there is work for ``catch_up``.
    release
        Releases the references that have lost their hold; called in each turn.
    catch_up
        Makes some pages large, and trims if that is due; called at most ten times a second.
    look_around
        Does the work that is due once a second.
    leave
        Leaves the arena if this process wants to and can; called at the end of each turn.
    """

    wait: Callable[[float], None]
    is_behind: Callable[[], bool]
    release: Callable[[], object]
    catch_up: Callable[[], None]
    look_around: Callable[[], None]
    leave: Callable[[], None]


def start(chores: Chores, is_over: Callable[[], bool]) -> None:
    """Start the thread, a daemon; it ends when ``is_over`` returns True."""
    threading.Thread(target=_run, args=(chores, is_over), name="dask-shm-tidy", daemon=True).start()


def _run(chores: Chores, is_over: Callable[[], bool]) -> None:
    last = last_made = time.monotonic()
    while not is_over():
        chores.wait(_SHORT_INTERVAL_S if chores.is_behind() else _INTERVAL_S)
        try:
            chores.release()
            if time.monotonic() - last_made >= _SHORT_INTERVAL_S:
                last_made = time.monotonic()
                chores.catch_up()
            if time.monotonic() - last >= _INTERVAL_S:
                last = time.monotonic()
                chores.look_around()
            chores.leave()
        except Exception:
            # No error may end the thread.
            logger.debug("a chore was put off", exc_info=True)
