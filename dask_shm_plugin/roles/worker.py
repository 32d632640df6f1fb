"""The worker's role: it publishes results in the arena, and answers requests of members with handles."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from typing import Any

from distributed import Status
from distributed.diagnostics.plugin import WorkerPlugin
from tornado.ioloop import PeriodicCallback

from dask_shm_plugin import __version__, config, metrics
from dask_shm_plugin.accounting.meters import WorkerMeter
from dask_shm_plugin.accounting.transfers import Transfers
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.monitor import prometheus
from dask_shm_plugin.monitor.heartbeat import Heartbeat
from dask_shm_plugin.roles.births import Births
from dask_shm_plugin.roles.closing import let_go_when_closed
from dask_shm_plugin.roles.cycles import CycleCollector
from dask_shm_plugin.roles.role import Joining, Role
from dask_shm_plugin.roles.switch import switch_off, switch_on
from dask_shm_plugin.scheduling.telling import Telling
from dask_shm_plugin.seams.worker_data import WorkerData
from dask_shm_plugin.shuffling import switch as shuffling
from dask_shm_plugin.transfer import fetch
from dask_shm_plugin.transfer.answers import Answers
from dask_shm_plugin.transfer.explaining import Explanation, explain
from dask_shm_plugin.transfer.landing import Landing
from dask_shm_plugin.transfer.publisher import Publisher
from dask_shm_plugin.transfer.receiving import Receiving
from dask_shm_plugin.transfer.scatter_guard import ScatterGuard
from dask_shm_plugin.values import buffers
from dask_shm_plugin.values.kept import KeptValues

_PRUNE_INTERVAL_S = 5.0
_HEARTBEAT_TIMEOUT_S = 1.0
"""Longest time (s) for which a start waits until the scheduler knows the worker's arena."""
_LISTING_TIMEOUT_S = 0.1
"""Longest time (s) for which a scatter waits until its values are listed."""

logger = logging.getLogger("dask_shm_plugin")


class SharedMemoryWorker(WorkerPlugin):
    """Publish this worker's large values in the node's arena, and map those of other processes on the node from it.

    Parameters
    ----------
    capacity, threshold, publish, views, warm, shuffle
        See :class:`SharedMemoryPlugin`. Settings that are not given come from Dask's configuration, namespace ``shm``.
    """

    name = "dask-shm"

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._joining: Joining | None = None
        self._outsider: fetch.Outsider | None = None
        self._running: _ActiveWorker | None = None

    async def setup(self, worker: Any) -> None:
        """Switch sharing on in a worker; never raises."""
        await switch_on(worker, self)

    async def teardown(self, worker: Any) -> None:
        """Switch sharing off in a worker; values that are still in use stay valid."""
        await switch_off(worker, self)

    async def start(self, worker: Any) -> None:
        """Join the arena and replace the worker's handlers, now or as soon as that is possible."""
        options = config.options(self._options)
        role = Role("worker", worker.scheduler, worker.contact_address or worker.address, options)
        self._joining = Joining(role, lambda arena: self._joined(worker, role, arena))
        await self._joining.start()
        if self._running is not None and worker.status is Status.running:
            # The scheduler shall know at once which arena the worker uses. If it does not know the worker any more, the
            # heartbeat closes the worker, which waits for the end of this function.
            telling = asyncio.create_task(worker.heartbeat())
            await asyncio.wait([telling], timeout=_HEARTBEAT_TIMEOUT_S)
        if self._running is None and role.kept_out_by is not None:
            self._outsider = fetch.Outsider(lambda: role.kept_out_by)

    def _joined(self, worker: Any, role: Role, arena: Arena) -> None:
        self._running = _ActiveWorker(worker, role, arena)
        self._end_outsider()

    def _end_outsider(self) -> None:
        outsider, self._outsider = self._outsider, None
        if outsider is not None:
            outsider.end()

    async def stop(self) -> None:
        """Put the worker's handlers back in place, and leave the arena."""
        joining, self._joining = self._joining, None
        if joining is not None:
            joining.stop()
        self._end_outsider()
        running, self._running = self._running, None
        if running is not None:
            await running.stop()

    def transition(self, key: Any, start: str, finish: str, **kwargs: Any) -> None:
        """Note that a value came or went, or that a task may have failed; the stub leaves out the others."""
        if self._running is None:
            return
        if finish == "memory":
            self._running.arrived(key, start)
        elif start == "memory":
            self._running.left(key)
        elif finish in ("error", "rescheduled") or start in ("error", "cancelled", "resumed"):
            self._running.cycles.note_failure()

    def explain(self, key: Any) -> dict[str, str]:
        """Return the state of the value of a key, and the reason, see :func:`dask_shm_plugin.explain`."""
        if self._running is None:
            return Explanation("off", "sharing is off in this worker; one warning in its log says why")._asdict()
        return self._running.explain(key)._asdict()

    def report(self) -> dict[str, Any] | None:
        """Return the state of the arena and the counters of this process, or None if sharing is off."""
        return self._running.report() if self._running else None


class _ActiveWorker:
    """The worker's role while the worker is a member of an arena.

    After :meth:`stop`, no part refers to this object: a cycle would keep the values of a closed worker until Python looks
    for cycles.
    """

    def __init__(self, worker: Any, role: Role, arena: Arena) -> None:
        self._worker, self._role, self._arena = worker, role, arena
        self._data = WorkerData.of(worker)
        self._kept = KeptValues(arena)
        arena.labels.add(self._kept.labels)
        self._telling = Telling(worker, arena.arena_id.hex())
        self.publisher = Publisher(arena, role.options.threshold, self._data, role.address, self._kept, self._telling)
        self._answers = Answers(worker, arena, self.publisher, role.options.threshold)
        self._landing = Landing(arena, worker.address, functools.partial(_may_be_large, worker, self._answers))
        self._receiving = Receiving(arena)
        self._meter = WorkerMeter(worker, arena)
        self._kept.placed = self._meter.placed
        self._transfers = Transfers(worker, arena)
        self._scatter_guard = ScatterGuard.around(worker.handlers, self._received)
        self.cycles = CycleCollector(worker.loop, lambda: len(arena.holdings) > 0)
        self._pruning = PeriodicCallback(self.publisher.prune, _PRUNE_INTERVAL_S * 1000)
        self._pruning.start()
        before = COUNTERS.snapshot()
        self._counted = lambda: metrics.since(before)
        self._heartbeat = worker.metrics["shm"] = Heartbeat(arena, self._kept, self._counted)
        prometheus.register(worker, self._heartbeat.metrics)
        fetch.REQUESTS.begin()
        self._shuffles = shuffling.switch_on(worker, arena) if role.options.shuffle == "auto" else None
        self._births = Births(worker, arena, role.options)

    async def stop(self) -> None:
        self._births.stop()
        self._answers.stop()
        self._landing.stop()
        self._receiving.stop()
        if self._shuffles is not None:
            self._shuffles.stop()
        self._scatter_guard.retire()
        self._pruning.stop()
        self.cycles.stop()
        self._telling.stop()
        self.publisher.close()
        self._arena.labels.remove(self._kept.labels)
        let_go_when_closed(self._worker, self._arena.arena_id)
        try:
            # In this order: first, other processes stop sending handles to this worker. Then it stops resolving them.
            await self._role.withdraw()
        finally:
            if not self._has_clients():
                self._scatter_guard.undo()
            fetch.REQUESTS.end()
            self._worker.metrics.pop("shm", None)
            self._transfers.stop()
            prometheus.unregister(self._worker)
            self._meter.stop()
            await self._role.leave()

    def _has_clients(self) -> bool:
        with contextlib.suppress(SharedMemoryError):
            return any(role.kind == "client" for role in self._arena.roster.roles())
        return False

    def arrived(self, key: Any, start: str) -> None:
        """Note that the value of a key came into memory, from the state ``start`` of its task."""
        if self._shuffles is not None:
            self._shuffles.finished(key)
        # A value that is not known to be large is published only on request: it may not even be serializable.
        if not self._answers.is_large(key):
            return
        value = self._data.in_memory(key)
        self._kept.note(key, value)
        handle = self._landing.handle_of(key, value)
        if handle is not None:
            self.publisher.stored(key, handle)
        is_eager = self._role.options.publish == "on-completion" and start in ("executing", "long-running")
        if is_eager and not self._answers.is_of_small_items(key, value):
            self.publisher.offer(key)

    def left(self, key: Any) -> None:
        """Note that the value of a key has left memory."""
        self._kept.forget(key)
        self._landing.forget(key)

    async def _received(self, data: dict[Any, Any]) -> None:
        """List scattered values, so that other processes find them without a request; bytes from afar are published first."""
        large = [key for key in data if self._answers.is_large(key)]
        shared = [key for key in large if buffers.blocks_of(data[key], self._arena.arena_id)]
        # A client of this node has tried that.
        if self._landing.has_neighbours and not self._has_clients():
            for key in large:
                if key not in shared and not self._answers.is_of_small_items(key, data[key]):
                    self.publisher.offer(key)
        # The scatter waits for this: after it, all other workers may look for the values at once.
        if shared:
            # The known reference is that of the scatter's message.
            offers = [self.publisher.offer(key, known=1) for key in shared]
            for offer in offers:
                offer.add_done_callback(functools.partial(_keep, data))  # keeps the message until the offer is done
            await asyncio.wait(offers, timeout=_LISTING_TIMEOUT_S)

    def explain(self, key: Any) -> Explanation:
        """Return the state of the value of a key, and the reason."""
        return explain(self._worker, key, self._answers, self.publisher, self._role.options.threshold)

    def report(self) -> dict[str, Any]:
        """Return the state of the arena and the counters of this process."""
        said = self._role.report(self._arena, self._counted())
        return {"worker": self._worker.address, "host": self._worker.ip, "version": __version__, **said}


def _may_be_large(worker: Any, answers: Answers, key: Any) -> bool:
    """Return whether the value of a key may be large: its size is not known, or large."""
    task = worker.state.tasks.get(key)
    return task is None or not task.nbytes or answers.is_large(key)


def _keep(message: dict[Any, Any], done: object) -> None:
    """Do nothing: as a callback of a task, this keeps a message alive until the task is done."""
