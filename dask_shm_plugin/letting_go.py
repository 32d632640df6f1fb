"""A worker that has closed lets go of its values in the arena, whoever keeps the worker object."""

from __future__ import annotations

import logging
from typing import Any

from distributed import Status
from distributed.spill import SpillBuffer
from distributed.worker_state_machine import FreeKeysEvent

from dask_shm_plugin import reach, seams

logger = logging.getLogger("dask_shm_plugin")


def let_go_when_closed(worker: Any, arena_id: bytes) -> None:
    """Let a worker that is closing drop its values in an arena as soon as nobody can ask it for them any more.

    Dask (2026.8.0) leaves them to whoever keeps the worker object: its process would hold the blocks, and remain a member,
    as long as a list, a fixture or a traceback keeps a closed worker. Private values stay, as with stock Dask.

    Parameters
    ----------
    worker
        Nothing happens where it goes on: what lives on when sharing is switched off stays valid.
    arena_id
        Of the arena.
    """
    if worker.status not in (Status.closing, Status.closed, Status.failed):
        return

    def stop() -> None:
        # `Worker.close` comes here when its listeners are down and its tasks have ended.
        replacement.undo()
        replacement.old()
        _let_go(worker, arena_id)

    replacement = seams.Replacement(worker, "stop", stop)


def _let_go(worker: Any, arena_id: bytes) -> None:
    data, state = worker.data, worker.state
    # Looked at in memory only: what is on disk is a private copy.
    in_memory = data.fast.d if type(data) is SpillBuffer else data if type(data) is dict else {}
    shared = [key for key, value in list(in_memory.items()) if reach.rows_of(value, arena_id)]
    if type(data) is dict:
        # It may be one that the user has given to the worker, and goes on using.
        data = worker.memory_manager.data = state.data = dict(data)
    # The worker has closed: it carries out nothing of what its state machine says, and its plugins are gone.
    try:
        state.handle_stimulus(FreeKeysEvent(keys=[key for key in shared if key in state.tasks], stimulus_id="dask-shm"))
    except Exception:  # closing goes on
        logger.debug("the state of a closed worker keeps keys of shared values", exc_info=True)
    for key in shared:
        if key in data:
            del data[key]
