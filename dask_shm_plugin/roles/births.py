"""Let NumPy allocate the arrays of one worker's tasks in the arena."""

from __future__ import annotations

from typing import Any

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.births import switch as births
from dask_shm_plugin.config import Options
from dask_shm_plugin.notices import warn_once
from dask_shm_plugin.seams import tasks
from dask_shm_plugin.seams.replacement import Replacement


class Births:
    """Switches the allocator of one worker's tasks, from its creation to :meth:`stop`.

    Parameters
    ----------
    worker
        A running worker.
    arena
        The arena of its process.
    options
        The settings.

    Notes
    -----
    NumPy's allocator is part of the context. Dask runs each task in a copy of the context of ``Worker.execute``, which
    is a task of the event loop with a context of its own. So no other code is affected.
    """

    def __init__(self, worker: Any, arena: Arena, options: Options) -> None:
        self._arena = arena
        self._replaced: Replacement | None = None
        if options.born == "off":
            return
        reason = tasks.why_not() or births.switch_on(arena, worker.memory_manager.memory_limit, options.warm)
        if reason is None:
            self._replaced = Replacement(worker, "execute", _allocating(worker.execute))
        elif options.born == "on":
            warn_once(f"Arrays are not allocated in shared memory: {reason}")

    def stop(self) -> None:
        """Let new tasks allocate as with stock Dask; arrays in use stay where they are."""
        replaced, self._replaced = self._replaced, None
        if replaced is not None:
            replaced.undo()
            births.switch_off(self._arena)


def _allocating(execute: Any) -> Any:
    async def allocating(key: Any, *, stimulus_id: str) -> Any:
        births.allocate_here()
        return await execute(key, stimulus_id=stimulus_id)

    return allocating
