"""Calls in other threads, which keep an event loop from waiting.

A thread of a pool lets go of its last task some time after the task's result is known. Who counts the references to a
value cannot wait for that: `call_in` leaves none behind.

When a script ends, Python first ends its executors, and only then lets Dask close what is still open, on event loops that
go on running (`concurrent.futures` registers with `threading`, which comes before `atexit`). To clean up must not fail then:
`in_thread` does without a thread.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, ParamSpec, TypeVar

from distributed.utils import offload, run_in_executor_with_context

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def call_in(executor: Executor | None, function: Callable[..., _T], *args: Any) -> _T:
    """Call a function in a thread, with the context variables of the caller, and return its result.

    Parameters
    ----------
    executor
        Which threads, or None for the one in which Dask serializes what is large; where that cannot be started, the caller
        does it.
    function, args
        What to call.
    """
    # An executor that cannot start a thread may have kept the call all the same: it must not be made twice.
    calls: list[Callable[[], _T]] = [functools.partial(function, *args)]
    results: list[_T] = []
    del function, args
    if executor is not None:
        await run_in_executor_with_context(executor, _call, calls, results)
        return results.pop()
    try:
        await offload(_call, calls, results)
    except RuntimeError:
        if not calls:  # the function has raised it
            raise
        _call(calls, results)
    return results.pop()


def _call(calls: list[Callable[[], _T]], results: list[_T]) -> None:
    results.append(calls.pop()())


async def in_thread(function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Return what a function returns, like `asyncio.to_thread`, and fail only where the function does.

    For what must be done in any case. What might as well be left rather fails where there are no threads.
    """
    call = functools.partial(contextvars.copy_context().run, function, *args, **kwargs)
    calls = [call]
    try:
        done = asyncio.get_running_loop().run_in_executor(None, lambda: calls.pop()())
    except RuntimeError:  # so the loop, the executor and the interpreter say that they are about to end
        return calls.pop()()
    return await done
