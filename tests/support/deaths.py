"""Simulated deaths of this process, for tests that need no other process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from other_processes import watcher


class SimulatedDeath(BaseException):
    """Simulates SIGKILL."""


def dies(action: Callable[[], Any], before: int) -> bool:
    """Run an action until just before its store number ``before``; return whether there was such a store.

    Stores into the table are counted from 0.
    """

    def die() -> None:
        raise SimulatedDeath

    others = sys.gettrace()
    sys.settrace(watcher(die, before))
    try:
        action()
    except SimulatedDeath:
        return True
    finally:
        sys.settrace(others)
    return False
