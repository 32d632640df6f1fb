"""Calls in other threads after which no thread refers to what the call was given, or has returned.

A thread of a pool lets go of its last task some time after the task's result is known. Who counts the references to a
value cannot wait for that.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

from distributed.utils import offload, run_in_executor_with_context

_T = TypeVar("_T")


async def call_in(executor: Executor | None, function: Callable[..., _T], *args: Any) -> _T:
    """Call a function in a thread, with the context variables of the caller, and return its result.

    Parameters
    ----------
    executor
        Which threads, or None for the one in which Dask serializes what is large.
    function, args
        What to call.
    """
    box: list[Any] = [function, *args]
    del function, args
    await (offload(_call, box) if executor is None else run_in_executor_with_context(executor, _call, box))
    result: _T = box.pop()
    return result


def _call(box: list[Any]) -> None:
    function, *args = box
    box.clear()
    box.append(function(*args))
