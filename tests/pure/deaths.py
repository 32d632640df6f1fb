"""Deaths in this process, for what can be tested without another one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from other_processes import watcher


class Death(BaseException):
    """Stands for SIGKILL."""


def dies(action: Callable[[], Any], before: int) -> bool:
    """Run an action up to, and without, a store into the table; return whether there was such a store."""

    def die() -> None:
        raise Death

    others = sys.gettrace()
    sys.settrace(watcher(die, before))
    try:
        action()
    except Death:
        return True
    finally:
        sys.settrace(others)
    return False
