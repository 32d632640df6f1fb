"""Shards that are not needed any more are not kept: by errors in the log of a worker, or by tasks that wait."""

from __future__ import annotations

import contextlib
from typing import Any

from dask_shm_plugin.exceptions import forget_values
from dask_shm_plugin.seams.replacement import Replacement
from dask_shm_plugin.seams.shuffle import RECEIVING


def forget_tables(run: Any) -> None:
    """Let a run of a DataFrame drop what it has received if that cannot be split into outputs.

    This is done in a thread, and Dask's frames there refer to the received tables as long as the error is kept.
    """

    def repartition(data: list[Any]) -> Any:
        try:
            return replacement.old(data)
        except Exception as error:
            forget_values(error)  # it is new, and all its frames have ended but this one
            data.clear()
            raise

    replacement = Replacement(run, "_repartition_buffers", repartition)


def forget_written(buffer: Any) -> None:
    """Let Dask's buffer drop shards when they are written to a file, or cannot be.

    Dask's task that writes refers to the list until it writes again, and the worker's log keeps an error.
    """

    async def process(name: str, shards: list[Any]) -> None:
        try:
            await replacement.old(name, shards)
        except Exception as error:
            forget_values(error)  # it is new, and all its frames have ended, except those that have the list
            raise
        finally:
            shards.clear()

    replacement = Replacement(buffer, "_process", process)


def forget_shards(error: BaseException | None) -> None:
    """Clear the frames that have received shards, in the tracebacks of an error and of its causes.

    All other frames stay as they are. A run raises one error many times, and its traceback then has frames of coroutines
    that go on later: to clear one of these would end it.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code in RECEIVING:
                with contextlib.suppress(RuntimeError):  # it runs
                    trace.tb_frame.clear()
            trace = trace.tb_next
        error = error.__cause__ or error.__context__
