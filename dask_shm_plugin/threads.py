"""Calls in other threads, so that an event loop does not wait for them.

A thread of a pool drops its references to its last task some time after the result of the task is known. Code that
counts the references to a value cannot wait for that, so `call_in` leaves no reference in the thread.

When a script ends, Python ends its executors first. Only then does Dask close the clusters and clients that are still
open, on event loops that go on running (`concurrent.futures` registers with `threading`, which comes before `atexit`).
The clean-up must not fail then, so `in_thread` runs the function in the calling thread if no other one can be had.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

from distributed.utils import offload, run_in_executor_with_context

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def call_in(executor: Executor | None, function: Callable[..., _T], *args: Any) -> _T:
    """Call a function in a thread, with the context variables of the caller, and return its result.

    Parameters
    ----------
    executor
        The threads to use, or None for the thread in which Dask serializes large messages. If Dask's thread cannot be
        started, the function runs in the calling thread.
    function, args
        The function and its positional arguments.
    """
    # An executor that fails to start a thread may still have queued the call. Taking it out of this list makes sure
    # that it runs once only.
    calls: list[Callable[[], _T]] = [functools.partial(function, *args)]
    results: list[_T] = []
    del function, args
    if executor is not None:
        await run_in_executor_with_context(executor, _call, calls, results)
        return results.pop()
    try:
        await offload(_call, calls, results)
    except RuntimeError:
        if not calls:  # the function was called and has raised the error itself
            raise
        _call(calls, results)
    return results.pop()


def _call(calls: list[Callable[[], _T]], results: list[_T]) -> None:
    results.append(calls.pop()())


async def in_thread(function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call a function in a thread, like `asyncio.to_thread`, and return its result; without threads, call it here.

    It is meant for calls that must be made in any case, such as leaving an arena. Optional work, such as a copy into
    the arena, should fail where no thread can be had.
    """
    calls = [functools.partial(contextvars.copy_context().run, function, *args, **kwargs)]
    outcome: Future[_T] = Future()
    # From now on it cannot be cancelled: the call is made, and its result recorded, even if no caller waits any more.
    outcome.set_running_or_notify_cancel()

    def call_once() -> None:
        # An executor that cannot start a thread may have queued the call all the same.
        with contextlib.suppress(IndexError):
            call = calls.pop()
            try:
                outcome.set_result(call())
            except BaseException as error:
                outcome.set_exception(error)

    try:
        asyncio.get_running_loop().run_in_executor(None, call_once)
    except RuntimeError:  # raised by a loop, an executor or an interpreter that is about to end
        call_once()
    return await asyncio.wrap_future(outcome)
