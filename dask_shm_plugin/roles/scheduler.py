"""The scheduler's role: it places tasks, and keeps replicas, by the place of large values."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from distributed.diagnostics.plugin import SchedulerPlugin

from dask_shm_plugin.notices import warn_once
from dask_shm_plugin.scheduling.costs import Costs
from dask_shm_plugin.scheduling.nodes import TOPIC, Nodes, has_large_input
from dask_shm_plugin.scheduling.occupancy import Occupancy
from dask_shm_plugin.scheduling.placement import Placement
from dask_shm_plugin.scheduling.replicas import Replicas
from dask_shm_plugin.seams.replacement import Replacement
from dask_shm_plugin.seams.scheduler import why_not_in_scheduler

logger = logging.getLogger("dask_shm_plugin")


class SharedMemoryScheduler(SchedulerPlugin):
    """Place tasks by the cost of their inputs on each node, and let replicas stay that take no memory.

    Dask's own answers stand for all tasks without a large input. After an error, everything is put back in place.
    """

    name = "dask-shm-scheduling"

    def __init__(self) -> None:
        self._scheduler: Any = None
        self._endings: list[Callable[[], None]] = []

    @property
    def is_on(self) -> bool:
        """Whether the scheduler's functions are replaced."""
        return self._scheduler is not None

    async def start(self, scheduler: Any) -> None:
        """Replace the scheduler's functions; warn once if a private name has moved, and leave it as it is."""
        reason = why_not_in_scheduler()
        if reason:
            warn_once(f"Tasks are placed as without the plugin: {reason}")
            return
        self._scheduler = scheduler
        self._guarded(self._begin, scheduler)

    def _begin(self, scheduler: Any) -> None:
        self._nodes = Nodes(scheduler)
        costs = Costs(scheduler, self._nodes)
        self._placement = placement = Placement(scheduler, self._nodes, costs)
        self._occupancy = Occupancy(scheduler, costs)
        self._endings.append(self._occupancy.stop)
        self._replicas = Replicas(scheduler, self._nodes, self._guarded)
        self._endings.append(self._replicas.stop)
        self._replace(scheduler, "decide_worker_non_rootish", self._advised(placement.decide_worker))
        self._replace(scheduler, "get_comm_cost", self._advised(placement.comm_cost))
        if "stealing" in scheduler.extensions:
            stealing = scheduler.extensions["stealing"]
            self._replace(stealing, "steal_time_ratio", self._advised(placement.steal_time_ratio))
        self._replace(scheduler, "_add_to_processing", self._without_limit)
        self._replace(scheduler, "remove_worker", self._counted)

    def stop(self) -> None:
        """Put the scheduler's functions back in place; harmless if they are."""
        self._scheduler = None
        while self._endings:
            self._endings.pop()()

    async def close(self) -> None:
        """Do the same when the scheduler closes."""
        self.stop()

    def log_event(self, topic: str, msg: Any) -> None:
        """Note published keys."""
        if topic == TOPIC and self.is_on:
            self._replicas.choose_soon(self._nodes.heard(msg))

    def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
        """Forget a worker; the values that it held get other second holders."""
        if self.is_on:
            self._occupancy.forget(worker)
            self._replicas.choose_all()

    def report(self) -> dict[str, dict[str, int]]:
        """Return the figures that ``stats`` shows for each arena."""
        return self._replicas.report() if self.is_on else {}

    def _replace(self, owner: Any, name: str, around: Callable[[Any], Any]) -> None:
        own = getattr(owner, name)
        self._endings.append(Replacement(owner, name, functools.wraps(own)(around(own))).undo)

    def _guarded(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function; if it fails, warn once, put everything back in place, and return None.

        Nothing is called after that: where other code has replaced our function since, ours cannot be taken out.
        """
        if not self.is_on:
            return None
        try:
            return function(*args)
        except Exception as error:
            logger.debug("tasks are placed as without the plugin", exc_info=True)
            warn_once(f"Tasks are placed as without the plugin, after an error: {type(error).__name__}: {error}")
            self.stop()
            return None

    def _advised(self, advice: Callable[..., Any]) -> Callable[[Any], Any]:
        """Take our answer about a task with a large input instead of Dask's, unless ours is None."""

        def around(own: Any) -> Any:
            def advised(ts: Any, *args: Any) -> Any:
                answer = self._guarded(advice, ts, *args) if has_large_input(ts) else None
                return own(ts, *args) if answer is None else answer

            return advised

        return around

    def _without_limit(self, own: Any) -> Any:
        """Let a task run whose inputs exceed the worker's memory limit only by values that lie in the arena."""

        def add_to_processing(ts: Any, ws: Any, stimulus_id: str) -> Any:
            limit = ws.memory_limit
            if has_large_input(ts) and self._guarded(self._placement.fits, ts, ws):
                ws.memory_limit = 0  # Dask does not check a worker that has no limit
            try:
                return own(ts, ws, stimulus_id)
            finally:
                ws.memory_limit = limit

        return add_to_processing

    def _counted(self, own: Any) -> Any:
        """Count the workers that are lost while others hold the values that they have published."""

        async def remove_worker(address: str, *, expected: bool = False, **options: Any) -> Any:
            if not expected:
                self._guarded(self._will_lose, address)
            return await own(address, expected=expected, **options)

        return remove_worker

    def _will_lose(self, address: str) -> None:
        ws = self._scheduler.workers.get(self._scheduler.coerce_address(address))
        if ws is not None:
            self._replicas.will_lose(ws)
