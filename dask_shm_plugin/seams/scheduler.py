"""List every private name of the scheduler that placement relies on; they need not be there for values to be shared."""

from __future__ import annotations

import functools

import distributed.active_memory_manager
import distributed.scheduler
import distributed.stealing
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import Scheduler, WorkerState
from distributed.stealing import WorkStealing

from dask_shm_plugin.seams.checks import Seam, moved, names, takes

SCHEDULER_SEAMS = (
    Seam(
        "Scheduler.decide_worker_non_rootish",
        "tasks with a large input may run on any worker of a node that has it",
        lambda: (
            takes(Scheduler.decide_worker_non_rootish, "ts")
            and names(Scheduler._transition_waiting_processing, "decide_worker_non_rootish")
            and takes(Scheduler.valid_workers, "ts")
            and takes(Scheduler.worker_objective, "ts", "ws")
        ),
    ),
    Seam(
        "Scheduler.get_comm_cost",
        "an input that lies on the node costs a mapping",
        lambda: (
            takes(Scheduler.get_comm_cost, "ts", "ws")
            and names(Scheduler.worker_objective, "get_comm_cost")
            and names(WorkStealing.balance, "get_comm_cost")
        ),
    ),
    Seam(
        "Scheduler._add_to_processing",
        "inputs that lie in the arena take none of a worker's memory limit",
        lambda: (
            takes(Scheduler._add_to_processing, "ts", "ws", "stimulus_id")
            and names(Scheduler._add_to_processing, "memory_limit")
            and names(Scheduler._transition_waiting_processing, "_add_to_processing")
        ),
    ),
    Seam(
        "WorkStealing.steal_time_ratio, .cost_multipliers, LATENCY, fast_tasks, Scheduler._get_prefix_duration",
        "tasks are stolen at the cost of their inputs on the node",
        lambda: (
            takes(WorkStealing.steal_time_ratio, "ts")
            and names(WorkStealing.put_key_in_stealable, "steal_time_ratio")
            and names(
                WorkStealing.steal_time_ratio, "cost_multipliers", "LATENCY", "fast_tasks", "_get_prefix_duration"
            )
        ),
    ),
    Seam(
        "WorkerState._inc_needs_replica, ._dec_needs_replica, .add_replica, .needs_what, ._network_occ",
        "inputs that lie on the node are no network traffic",
        lambda: (
            names(WorkerState._inc_needs_replica, "needs_what", "_network_occ", "_network_occ_global")
            and names(WorkerState._dec_needs_replica, "needs_what", "_network_occ", "_network_occ_global")
            and names(WorkerState.add_replica, "needs_what", "_network_occ", "_network_occ_global")
            and names(WorkerState.add_to_processing, "_inc_needs_replica")
            and names(WorkerState.remove_from_processing, "_dec_needs_replica")
        ),
    ),
    Seam(
        "Scheduler.remove_worker",
        "counts the deaths that lost nothing",
        lambda: takes(Scheduler.remove_worker, "address", "stimulus_id", "expected"),
    ),
    Seam(
        "ActiveMemoryManagerExtension(policies=, register=), ReduceReplicas, .pending",
        "replicas that share memory are one copy",
        lambda: (
            takes(
                distributed.active_memory_manager.ActiveMemoryManagerExtension.__init__, "policies", "register", "start"
            )
            and names(distributed.active_memory_manager.ReduceReplicas.run, "replicated_tasks", "pending")
        ),
    ),
    Seam(
        "TaskState.run_id, WorkerState.metrics, SchedulerPlugin.log_event",
        "workers tell about their arenas and values",
        lambda: (
            "__weakref__" in distributed.scheduler.TaskState.__annotations__
            and "run_id" in distributed.scheduler.TaskState.__annotations__
            and names(Scheduler.heartbeat_worker, "metrics")
            and takes(SchedulerPlugin.log_event, "topic", "msg")
        ),
    ),
)


@functools.cache
def why_not_in_scheduler() -> str | None:
    """Return the reason why tasks are placed as by stock Dask, or None."""
    return moved(SCHEDULER_SEAMS)
