"""Keep mapped values out of the bandwidth that a worker measures: it is the scheduler's measure of the network."""

from __future__ import annotations

from typing import Any

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.seams.replacement import Replacement
from dask_shm_plugin.transfer.landing import IS_CARRIED
from dask_shm_plugin.values import buffers

_COUNTED_BYTES = 1_000_000
"""Dask's own bound: smaller transfers do not change the bandwidth."""


class Transfers:
    """Takes the place of one worker's account of received data, from its creation to :meth:`stop`.

    Parameters
    ----------
    worker
        A running worker.
    arena
        The arena of its process.

    Notes
    -----
    To be used on the worker's event loop.
    """

    def __init__(self, worker: Any, arena: Arena) -> None:
        self._worker, self._arena = worker, arena
        self._before = Replacement(worker, "_update_metrics_received_data", self._received)

    def stop(self) -> None:
        """Put Dask's own account back in place."""
        self._before.undo()

    def _received(self, start: float, stop: float, data: dict[Any, Any], cause: Any, worker: str) -> None:
        if IS_CARRIED.get() or not self._has_mapped(data):
            self._before.old(start=start, stop=stop, data=data, cause=cause, worker=worker)
            return
        measured = self._worker.bandwidth, self._worker.bandwidth_workers.copy(), self._worker.bandwidth_types.copy()
        try:
            self._before.old(start=start, stop=stop, data=data, cause=cause, worker=worker)
        finally:
            self._worker.bandwidth, self._worker.bandwidth_workers, self._worker.bandwidth_types = measured

    def _has_mapped(self, data: dict[Any, Any]) -> bool:
        sizes = [self._worker.state.tasks[key].get_nbytes() for key in data]
        return sum(sizes) > _COUNTED_BYTES and any(
            buffers.blocks_of(value, self._arena.arena_id) for value in data.values()
        )
