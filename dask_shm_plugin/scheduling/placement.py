"""Place tasks: all workers of a node on which a large input lies may run a task, if its cost there is worth it."""

from __future__ import annotations

from functools import partial
from math import log2
from typing import Any

from distributed.stealing import LATENCY, fast_tasks

from dask_shm_plugin.scheduling.costs import Costs
from dask_shm_plugin.scheduling.nodes import Nodes, arena_of, is_large

_NEVER_S = 1e6
"""Added to the cost (s) of a worker that has no room for the inputs. It is finite, because Dask subtracts costs again."""


class Placement:
    """Advises a scheduler on tasks with large inputs; a method returns None where Dask's own answer stands.

    Parameters
    ----------
    scheduler
        A running scheduler.
    nodes, costs
        The arenas and published values that are known, and the costs of inputs there.
    """

    def __init__(self, scheduler: Any, nodes: Nodes, costs: Costs) -> None:
        self._scheduler, self._nodes, self._costs = scheduler, nodes, costs

    def decide_worker(self, ts: Any) -> Any:
        """Return the worker that would start a task soonest, among the holders of its inputs and their neighbours."""
        if ts.actor:
            return None
        neighbours = self._neighbours(ts)
        if not neighbours:
            return None
        holders = {ws for dts in ts.dependencies for ws in dts.who_has or ()}
        candidates = (holders | neighbours) & self._scheduler.running
        valid = self._scheduler.valid_workers(ts)
        if valid is not None:
            candidates &= valid
        candidates = {ws for ws in candidates if self.fits(ts, ws)} or candidates
        return min(candidates, key=partial(self._scheduler.worker_objective, ts), default=None)

    def _neighbours(self, ts: Any) -> set[Any]:
        """Return the workers that could map a large input of a task from their arena, with or without it now."""
        near = {
            arena_id
            for dts in ts.dependencies
            if is_large(dts)
            for arena_id in {arena_of(ws) for ws in dts.who_has or ()}
            if self._costs.near(dts, arena_id) is not None
        }
        if not near:
            return set()
        workers = self._nodes.workers()
        return {ws for arena_id in near for ws in workers[arena_id]}

    def comm_cost(self, ts: Any, ws: Any) -> float:
        """Return the time (s) until a worker has the inputs of a task that it does not hold."""
        missing = [dts for dts in ts.dependencies if ws not in (dts.who_has or ())]
        cost = sum(self._costs.transfer(dts, ws) for dts in missing)
        # Dask does not check the memory limit of a worker that steals a task.
        return cost if not missing or self.fits(ts, ws) else cost + _NEVER_S

    def steal_time_ratio(self, ts: Any) -> tuple[float, int] | tuple[None, None] | None:
        """Return how much longer a task takes if its node's other workers steal it, and its level among the stealable.

        The same as in ``WorkStealing``, apart from the costs.
        """
        if ts.prefix.name in fast_tasks:
            return None
        compute = self._scheduler._get_prefix_duration(ts.prefix)
        if not compute:
            return None
        transfer = sum(self._costs.transfer(dts, ts.processing_on) for dts in ts.dependencies)
        ratio = (transfer + LATENCY) / compute
        stealing = self._scheduler.extensions["stealing"]
        level = max(1, round(log2(ratio) + 6))
        return (ratio, level) if level < len(stealing.cost_multipliers) else (None, None)

    def fits(self, ts: Any, ws: Any) -> bool:
        """Return whether a task's inputs fit into a worker's memory if those that lie in its arena take none there."""
        if not ws.memory_limit or sum(dts.nbytes for dts in ts.dependencies) <= ws.memory_limit:
            return True
        arena_id = arena_of(ws)
        private = sum(dts.nbytes for dts in ts.dependencies if not self._nodes.is_published(dts, arena_id))
        return bool(private <= ws.memory_limit)
