"""List the private names of ``distributed`` by which tasks get an allocator of their own.

If one of them has changed, arrays are allocated as with stock Dask.
"""

from __future__ import annotations

import functools
import inspect

import distributed.utils
import distributed.worker
import distributed.worker_state_machine

from dask_shm_plugin.seams.checks import Seam, moved, names, takes

SEAMS = (
    Seam(
        "Worker.execute",
        "runs each task in a copy of its own context, which is that of one task of the event loop",
        lambda: (
            inspect.iscoroutinefunction(distributed.worker.Worker.execute)
            and takes(distributed.worker.Worker.execute, "key", "stimulus_id")
            and names(distributed.worker.Worker.execute, "run_in_executor_with_context")
            and names(distributed.utils.run_in_executor_with_context, "copy_context", "run")
            and names(distributed.worker_state_machine.BaseWorker._start_async_instruction, "create_task")
            and names(
                distributed.worker_state_machine.BaseWorker.handle_stimulus, "_start_async_instruction", "execute"
            )
        ),
    ),
)


@functools.cache
def why_not() -> str | None:
    """Return the reason why tasks cannot get an allocator of their own, or None."""
    return moved(SEAMS)
