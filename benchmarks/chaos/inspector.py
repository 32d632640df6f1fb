"""A fresh member of a running cluster's arena: checks the table, and perhaps waits until nothing is left in it.

    python inspector.py <address of the scheduler> <seconds to wait until the arena is empty, or 0 to look while it is used>

Prints what it found as JSON.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from typing import Any

import tasks
from distributed import Client

from dask_shm_plugin import membership

_LOOKS = 20


def collect(address: str) -> None:
    """Let all workers collect garbage: a failed message lives in a cycle of exceptions and frames, with stock Dask, too."""
    with Client(address, timeout=60, set_as_default=False) as client:
        client.run(gc.collect)


def who_holds(address: str) -> dict[str, Any]:
    """Return what scheduler and workers know of: whatever keeps a block is among it, or lost."""

    def of_scheduler(dask_scheduler: Any) -> Any:
        return [f"{task!r} {task.who_wants} {task.who_has}" for task in dask_scheduler.tasks.values()]

    def of_worker(dask_worker: Any) -> Any:
        import gc

        from dask_shm_plugin import membership
        from dask_shm_plugin.block import Block, Draft
        from dask_shm_plugin.codec import Published
        from dask_shm_plugin.publisher import Publisher
        from dask_shm_plugin.views import ATLAS

        def owners(thing: object) -> list[str]:
            return [
                f"{type(one).__name__}: {one!r}"[:300]
                for one in gc.get_referrers(thing)
                if type(one).__name__ != "list_iterator"
            ]

        living = [one for one in gc.get_objects() if isinstance(one, (Block, Draft, Published, Publisher))]
        return {
            "data": list(dask_worker.data),
            "tasks": [repr(task) for task in dask_worker.state.tasks.values()],
            "arenas": repr(membership.all_arenas()),
            "views": len(ATLAS),
            "references": [repr(arena.holdings._references._notes) for arena in membership.all_arenas()],
            "pins": [repr(list(arena.holdings._references._pins)) for arena in membership.all_arenas()],
            "living": [[repr(one), owners(one)] for one in living[:12]],
        }

    with Client(address, timeout=60, set_as_default=False) as client:
        return {"scheduler": client.run_on_scheduler(of_scheduler), "workers": client.run(of_worker)}


def main() -> None:
    """Join, look, leave."""
    address, patience = sys.argv[1], float(sys.argv[2])
    tasks.stacks_on_signal()
    with Client(address, timeout=60, set_as_default=False) as client:
        cluster = client.scheduler_info(n_workers=0)["id"]
    arena = membership.join(cluster, "client", "inspector")
    if arena is None:
        print(json.dumps({"members": 0, "used": 0, "blocks": 0}))
        return
    if patience:
        collect(address)
    try:
        for _ in range(_LOOKS):
            arena.validate()
            time.sleep(0.01)
        until = time.monotonic() + patience
        while patience and arena.stats().used and time.monotonic() < until:
            time.sleep(0.1)
        arena.validate()
        stats = arena.stats()
        found: dict[str, Any] = {"members": stats.members, "used": stats.used, "blocks": stats.blocks}
        if patience and stats.used:
            found["held"] = who_holds(address)
        print(json.dumps(found))
    finally:
        membership.leave(cluster, "client", "inspector")


if __name__ == "__main__":
    main()
