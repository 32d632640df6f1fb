"""What Dask is told about memory, and what it acts on.

Told to the scheduler: private memory, and this process's share of each block. Acted on: pause and spill look at private
memory and at what spilling would free; terminate looks at private memory. What neighbours do pauses and kills nobody, as long
as the node is within bounds. Where all workers together use as much of the sum of their limits as lets a single one pause, or be
terminated, each answers for its share, too.
"""

from __future__ import annotations

import contextlib
import contextvars
from typing import Any

from distributed import Status

from dask_shm_plugin import seams
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.spilling import Spilling

_IS_ACTING: contextvars.ContextVar[bool] = contextvars.ContextVar("is_acting", default=False)


class WorkerMeter:
    """The memory of one worker, from its making to :meth:`stop`.

    Parameters
    ----------
    worker
        A running worker.
    arena
        The arena of its process.

    Notes
    -----
    Lives on the worker's event loop. A reading costs some tens of microseconds: the kernel's own sums and the table.
    """

    def __init__(self, worker: Any, arena: Arena) -> None:
        self._worker, self._arena = worker, arena
        self._spilling = Spilling(worker.data, arena, _largest(worker.memory_manager))
        with contextlib.suppress(SharedMemoryError, OSError):  # it is measured again and again
            arena.budget.set_limit(self, worker.memory_manager.memory_limit)
        self._read_before = seams.Replacement(worker.monitor, "get_process_memory", self.read)
        callback = worker.periodic_callbacks.get("memory_monitor")
        self._watch_before = callback and seams.Replacement(callback, "callback", self._watch)

    def stop(self) -> None:
        """Put everything back."""
        if self._watch_before:
            self._watch_before.undo()
        self._read_before.undo()
        self._spilling.stop()
        with contextlib.suppress(SharedMemoryError, OSError):
            self._arena.budget.forget(self)

    def read(self) -> int:
        """Return bytes of memory: what is acted on while Dask decides whether to act, what is reported otherwise."""
        try:
            private = self._arena.budget.measure()
            counts_alone = _IS_ACTING.get() and not self._is_short()
            return private + (self._spilling.alone() if counts_alone else self._arena.weights.weigh().share)
        except (SharedMemoryError, OSError):
            return int(self._read_before.old())

    def _is_short(self) -> bool:
        """Tell whether the workers of this node use, altogether, as much as lets one of them pause."""
        with contextlib.suppress(SharedMemoryError, OSError):
            return self._arena.budget.use() > (self._worker.memory_manager.memory_pause_fraction or 1)
        return False

    async def _watch(self) -> None:
        """Stand in for ``WorkerMemoryManager.memory_monitor``.

        Pauses for private memory first, then spills, and pauses for the rest only when spilling did not help.
        """
        manager = self._worker.memory_manager
        is_short = self._spilling.counts_shares = self._is_short()
        self._spilling.reweigh()
        with _acting():
            if is_short or not self._spilling.alone():  # as with stock Dask, or all that counts is private
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
    """The memory for which a nanny terminates its worker, from its making to :meth:`stop`.

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
        self._watch_before = callback and seams.Replacement(callback, "callback", self._watch)

    def stop(self) -> None:
        """Put everything back."""
        if self._watch_before:
            self._watch_before.undo()

    def _watch(self) -> None:
        """Stand in for ``NannyMemoryManager.memory_monitor``: it need not look while private memory is within bounds.

        Otherwise it finds for itself that the worker has too much, for it counts all memory.
        """
        manager = self._nanny.memory_manager
        with contextlib.suppress(SharedMemoryError, OSError, AttributeError):
            bound, pid = manager.memory_terminate_fraction, self._nanny.process.process.pid
            used = self._arena.budget.private_memory(pid)
            if self._arena.budget.use() > bound:
                used += self._arena.budget.share(pid)
            if used <= manager.memory_limit * bound:
                return
        self._watch_before.old()
