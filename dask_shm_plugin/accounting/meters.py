"""Measure the memory that is reported to the scheduler, and the memory for which Dask pauses, spills and terminates.

The scheduler gets own memory plus this process's share of each block. Drafts that contain arrays of the process are its
own memory, as private memory is. Pausing and spilling go by private memory
plus the bytes that spilling would free. Terminating goes by private memory. So no worker is paused or terminated for
values of its neighbours while the node is within its limits.

The node is beyond its limits if its workers together use more of the sum of their limits than the fraction at which a
single worker pauses, or is terminated. Then the share of each worker counts, too.

The scheduler computes managed memory: the size of all keys of a worker, less the size of those that the worker reports
as spilled. What does not count as this worker's share is added to that figure, so that it is not managed memory either.
"""

from __future__ import annotations

import contextlib
import contextvars
from typing import Any

from distributed import Status

from dask_shm_plugin.accounting.spilling import Spilling
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.seams.replacement import Replacement

_IS_ACTING: contextvars.ContextVar[bool] = contextvars.ContextVar("is_acting", default=False)


class WorkerMeter:
    """Measures the memory of one worker, in place of Dask's own functions, from its creation to :meth:`stop`.

    Parameters
    ----------
    worker
        A running worker.
    arena
        The arena of its process.

    Notes
    -----
    To be used on the worker's event loop. A reading takes some tens of microseconds: it reads the kernel's own totals
    and the table.
    """

    def __init__(self, worker: Any, arena: Arena) -> None:
        self._worker, self._arena = worker, arena
        self._spilling = Spilling(worker.data, arena, _largest(worker.memory_manager))
        with contextlib.suppress(SharedMemoryError, OSError):  # every later reading measures again
            arena.budget.set_limit(self, worker.memory_manager.memory_limit)
        self._read_before = Replacement(worker.monitor, "get_process_memory", self.read)
        self._report_before = Replacement(worker, "get_metrics", self._report)
        callback = worker.periodic_callbacks.get("memory_monitor")
        self._watch_before = callback and Replacement(callback, "callback", self._watch)

    def stop(self) -> None:
        """Put Dask's functions back in place."""
        if self._watch_before:
            self._watch_before.undo()
        self._report_before.undo()
        self._read_before.undo()
        self._spilling.stop()
        with contextlib.suppress(SharedMemoryError, OSError):
            self._arena.budget.forget(self)

    def placed(self, key: Any, value: object) -> None:
        """Note that the value of a key may lie in blocks now."""
        self._spilling.placed(key, value)

    def read(self) -> int:
        """Return the memory (bytes) to act on while Dask decides whether to pause or spill, else that to report."""
        try:
            private = self._arena.budget.measure()
            counts_alone = _IS_ACTING.get() and not self._is_short()
            return private + (self._spilling.spillable_bytes() if counts_alone else self._arena.shares.share())
        except (SharedMemoryError, OSError):
            return int(self._read_before.old())

    async def _report(self) -> dict[str, Any]:
        """Return the metrics of a heartbeat in place of ``Worker.get_metrics``.

        ``spilled_bytes.memory`` serves only to compute managed memory. Dask shows ``spilled_bytes.disk`` as spilled.
        """
        metrics: dict[str, Any] = await self._report_before.old()
        metrics["spilled_bytes"]["memory"] += self._spilling.surplus_bytes()
        return metrics

    def _is_short(self) -> bool:
        """Return whether this node's workers use a larger part of their summed limits than lets one worker pause."""
        with contextlib.suppress(SharedMemoryError, OSError):
            return self._arena.budget.use() > (self._worker.memory_manager.memory_pause_fraction or 1)
        return False

    async def _watch(self) -> None:
        """Run in place of ``WorkerMemoryManager.memory_monitor``.

        Pause for private memory first, then spill. Pause for private memory plus spillable bytes only if these are too
        many after spilling.
        """
        manager = self._worker.memory_manager
        is_short = self._spilling.counts_shares = self._is_short()
        self._spilling.reweigh()
        with _acting():
            # Dask's own monitor is right in both cases: if shares count, as with stock Dask, or only private memory.
            if is_short or not self._spilling.spillable_bytes():
                await self._watch_before.old()
                return
            if self._worker.status == Status.running:
                with contextlib.suppress(SharedMemoryError, OSError):
                    manager._maybe_pause_or_unpause(self._worker, self._arena.budget.measure())
            await manager._maybe_spill(self._worker, self.read())
            manager._maybe_pause_or_unpause(self._worker, self.read())


def _largest(manager: Any) -> int:
    fraction = manager.memory_target_fraction or manager.memory_spill_fraction
    return int(manager.memory_limit * fraction) if manager.memory_limit and fraction else 1 << 62


@contextlib.contextmanager
def _acting() -> Any:
    token = _IS_ACTING.set(True)
    try:
        yield
    finally:
        _IS_ACTING.reset(token)


class NannyMeter:
    """Measures the memory for which a nanny terminates its worker, from its creation to :meth:`stop`.

    Parameters
    ----------
    nanny
        A running nanny.
    arena
        The arena of this node.
    """

    def __init__(self, nanny: Any, arena: Arena) -> None:
        self._nanny, self._arena = nanny, arena
        callback = nanny.periodic_callbacks.get("memory_monitor")
        self._watch_before = callback and Replacement(callback, "callback", self._watch)

    def stop(self) -> None:
        """Put Dask's function back in place."""
        if self._watch_before:
            self._watch_before.undo()

    def _watch(self) -> None:
        """Run in place of ``NannyMemoryManager.memory_monitor``, and skip it while private memory is within bounds.

        The worker's share of blocks counts, too, if the node is short of memory. Beyond the bounds, Dask's monitor
        runs and decides for itself, by all resident memory of the worker.
        """
        manager = self._nanny.memory_manager
        with contextlib.suppress(SharedMemoryError, OSError, AttributeError):
            bound, pid = manager.memory_terminate_fraction, self._nanny.process.process.pid
            used = self._arena.budget.own_memory(pid)
            if self._arena.budget.use() > bound:
                used += self._arena.budget.share(pid)
            if used <= manager.memory_limit * bound:
                return
        self._watch_before.old()
