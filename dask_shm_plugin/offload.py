"""What would keep an event loop waiting is done in a thread, and right here where no thread is to be had any more.

When a script ends, Python first ends its executors, and only then lets Dask close what is still open, on event loops that
go on running (`concurrent.futures` registers with `threading`, which comes before `atexit`). To clean up must not fail then.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what a function returns, like `asyncio.to_thread`, and fail only where the function does.

    For what must be done in any case. What might as well be left rather fails where there are no threads.
    """
    call = functools.partial(contextvars.copy_context().run, function, *args, **kwargs)
    # An executor that cannot start a thread may have kept the call all the same: it must not be made twice.
    calls = [call]
    try:
        done = asyncio.get_running_loop().run_in_executor(None, lambda: calls.pop()())
    except RuntimeError:  # so the loop, the executor and the interpreter say that they are about to end
        return calls.pop()()
    return await done
