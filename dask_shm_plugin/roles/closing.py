"""Make a closed worker drop its values in the arena, even if the worker object lives on."""

from __future__ import annotations

import logging
from typing import Any

from distributed import Status
from distributed.spill import SpillBuffer
from distributed.worker_state_machine import FreeKeysEvent

from dask_shm_plugin.seams.replacement import Replacement
from dask_shm_plugin.values import buffers

logger = logging.getLogger("dask_shm_plugin")


def let_go_when_closed(worker: Any, arena_id: bytes) -> None:
    """Make a worker that is closing drop its values in an arena as soon as no process can request them any more.

    Dask (2026.8.0) leaves the values in the worker object. If a list, a fixture or a traceback keeps a closed worker,
    its process would hold the blocks and remain a member of the arena. Private values stay, as with stock Dask.

    Parameters
    ----------
    worker
        The worker. If it is not closing, nothing happens: its values stay valid when sharing is switched off.
    arena_id
        The id of the arena.
    """
    if worker.status not in (Status.closing, Status.closed, Status.failed):
        return

    def stop() -> None:
        # `Worker.close` calls this after its listeners are down and its tasks have ended.
        replacement.undo()
        replacement.old()
        _let_go(worker, arena_id)

    replacement = Replacement(worker, "stop", stop)


def _let_go(worker: Any, arena_id: bytes) -> None:
    data, state = worker.data, worker.state
    # Only values in memory: a value on disk is a private copy.
    in_memory = data.fast.d if type(data) is SpillBuffer else data if type(data) is dict else {}
    shared = [key for key, value in list(in_memory.items()) if buffers.blocks_of(value, arena_id)]
    if type(data) is dict:
        # The worker gets a copy, because the dict may be the user's own (`data=`) and still in use.
        data = worker.memory_manager.data = state.data = dict(data)
    # The worker has closed: it executes no instructions of its state machine any more, and its plugins are gone.
    try:
        state.handle_stimulus(FreeKeysEvent(keys=[key for key in shared if key in state.tasks], stimulus_id="dask-shm"))
    except Exception:  # closing must go on
        logger.debug("the state of a closed worker keeps keys of shared values", exc_info=True)
    for key in shared:
        if key in data:
            del data[key]
