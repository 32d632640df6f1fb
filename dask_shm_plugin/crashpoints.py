"""Named steps of the protocol: a test can kill or stop a process right before or right after each of them.

If ``DASK_SHM_CRASHPOINTS`` is not in the environment when the package is imported, a step is the bare function and
costs nothing.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
Fate = Callable[[], None]

STEPS: dict[str, str] = {}
"""Maps the name of every imported step to the module and qualified name of its function."""

_IS_ON = "DASK_SHM_CRASHPOINTS" in os.environ
_fates: dict[str, Fate] = {}


def step(name: str) -> Callable[[F], F]:
    """Return a decorator that marks a function as the step ``name`` of the protocol."""

    def mark(function: F) -> F:
        STEPS[name] = f"{function.__module__}.{function.__qualname__}"
        return _watched(name, function) if _IS_ON else function

    return mark


def arm(moment: str, fate: Fate, *, skip: int = 0) -> None:
    """Call ``fate`` once at a moment ("before seal", "after seal"), after the moment was passed ``skip`` times.

    Raises
    ------
    RuntimeError
        This process was started without ``DASK_SHM_CRASHPOINTS``.
    """
    if not _IS_ON:
        raise RuntimeError("set DASK_SHM_CRASHPOINTS in the environment before dask_shm_plugin is imported")
    left = [skip]

    def happen() -> None:
        left[0] -= 1
        # Two threads may pass at the same time; only the one that takes the fate out of the dict calls it.
        if left[0] < 0 and _fates.pop(moment, None) is not None:
            fate()

    _fates[moment] = happen


def disarm() -> None:
    """Remove all fates that are armed."""
    _fates.clear()


def _pass(moment: str) -> None:
    fate = _fates.get(moment)
    if fate is not None:
        fate()


def _watched(name: str, function: Any) -> Any:
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            _pass(f"before {name}")
            result = await function(*args, **kwargs)
            _pass(f"after {name}")
            return result

    else:

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            _pass(f"before {name}")
            result = function(*args, **kwargs)
            _pass(f"after {name}")
            return result

    return wrapper
