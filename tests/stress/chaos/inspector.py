"""A new member of a running cluster's arena: it validates the table, and can wait until the arena is empty.

    python inspector.py <address of the scheduler> <seconds to wait until the arena is empty, or 0: only validate>

Prints its findings as JSON.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from typing import Any

import tasks
from distributed import Client

from dask_shm_plugin.node import membership

_VALIDATIONS = 20


def collect(address: str) -> None:
    """Let all workers collect garbage: even in stock Dask, a cycle of exceptions and frames keeps a failed message."""
    with Client(address, timeout=60, set_as_default=False) as client:
        client.run(gc.collect)


def describe_holders(address: str) -> dict[str, Any]:
    """Return the tasks and objects of scheduler and workers. A block that is not referred to from there has leaked."""

    def of_scheduler(dask_scheduler: Any) -> Any:
        return [f"{task!r} {task.who_wants} {task.who_has}" for task in dask_scheduler.tasks.values()]

    def of_worker(dask_worker: Any) -> Any:
        import gc

        from dask_shm_plugin.arena.block import Block, Draft
        from dask_shm_plugin.mapping.atlas import ATLAS
        from dask_shm_plugin.node import membership
        from dask_shm_plugin.transfer.publisher import Publisher
        from dask_shm_plugin.values.codec import Published

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
            "references": [repr(arena.holdings.references._notes) for arena in membership.all_arenas()],
            "pins": [repr(list(arena.holdings.references._fork_holds)) for arena in membership.all_arenas()],
            "living": [[repr(one), owners(one)] for one in living[:12]],
        }

    with Client(address, timeout=60, set_as_default=False) as client:
        return {"scheduler": client.run_on_scheduler(of_scheduler), "workers": client.run(of_worker)}


def main() -> None:
    """Join the arena, validate it, print the findings and leave."""
    address, patience = sys.argv[1], float(sys.argv[2])
    tasks.print_stacks_on_signal()
    with Client(address, timeout=60, set_as_default=False) as client:
        cluster = client.scheduler_info(n_workers=0)["id"]
    arena = membership.join(cluster, "client", "inspector")
    if arena is None:
        print(json.dumps({"members": 0, "used": 0, "blocks": 0}))
        return
    if patience:
        collect(address)
    try:
        for _ in range(_VALIDATIONS):
            arena.validate()
            time.sleep(0.01)
        until = time.monotonic() + patience
        while patience and arena.stats().used and time.monotonic() < until:
            time.sleep(0.1)
        arena.validate()
        stats = arena.stats()
        found: dict[str, Any] = {"members": stats.members, "used": stats.used, "blocks": stats.blocks}
        if patience and stats.used:
            found["held"] = describe_holders(address)
        print(json.dumps(found))
    finally:
        membership.leave(cluster, "client", "inspector")


if __name__ == "__main__":
    main()
