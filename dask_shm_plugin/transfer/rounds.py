"""Replicate values in rounds: first to one worker of each node, in a tree of nodes, then to the others, which map them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from dask_shm_plugin import __version__
from dask_shm_plugin.scheduling.nodes import arena_in

_BRANCHING = 2


async def arenas_of(scheduler: Any, workers: Iterable[str]) -> dict[str, str | None]:
    """Ask the scheduler for the arena of each worker: its id in hexadecimal digits, or None.

    It is None for a worker that has none, and for one with another version of the package, which gets no parcels.
    """
    known = (await scheduler.identity(n_workers=-1))["workers"]
    return {worker: _arena_in(known[worker]["metrics"]) if worker in known else None for worker in workers}


def _arena_in(metrics: dict[str, Any]) -> str | None:
    arena_id = arena_in(metrics)
    return arena_id if arena_id is not None and metrics["shm"].get("version") == __version__ else None


async def replicate(scheduler: Any, keys: list[Any], arenas: dict[str, str | None], served: Collection[str]) -> None:
    """Let workers have values, and send the bytes to each node once.

    Parameters
    ----------
    scheduler
        The rpc to the scheduler.
    keys
        The keys of the values. One worker at least has them.
    arenas
        The workers, and the arena of each.
    served
        The arenas that have the values.
    """
    firsts: dict[str | None, str] = {}
    alone = [worker for worker, arena_id in arenas.items() if arena_id is None]
    for worker, arena_id in arenas.items():
        if arena_id is not None and arena_id not in served:
            firsts.setdefault(arena_id, worker)
    receivers = [*firsts.values(), *alone]
    if receivers:
        await scheduler.replicate(keys=keys, n=len(receivers), workers=receivers, branching_factor=_BRANCHING)
    # No bytes are sent any more, so one round is the quickest.
    await scheduler.replicate(keys=keys, n=len(arenas), workers=list(arenas), branching_factor=len(arenas))
