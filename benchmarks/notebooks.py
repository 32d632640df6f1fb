"""Three idle notebooks and a busy one: the memory that all of them take, and the room that the busy one has.

    python benchmarks/notebooks.py [--quick] [--pairs 3] [--json PATH]

Three clusters of two workers broadcast an array, read it, release it, and stay idle for ten seconds. Then a fourth cluster of
four workers broadcasts an array, and forty tasks read it. Memory is ``Shmem`` of the machine and the private memory of all
processes of the four clusters, less what they took before the first broadcast, read every 20 ms while the fourth works.
"""

from __future__ import annotations

import contextlib
import os
import time

import machine
import numpy as np
import pairs
import report
from clusters import ARMS, Site, Spec, in_turn, site
from machine import MIB, make, read_pages
from remote import remote

NOTEBOOKS, IDLE, TASKS = 3, 10.0, 40


def broadcast(cluster: Site, size: int, tasks: int) -> int:
    """Broadcast an array, let tasks read it, and return how many different results they had."""
    array = cluster.client.scatter(make(0, size), broadcast=True, hash=False)
    results = cluster.client.gather([cluster.client.submit(read_pages, array, pure=False) for _ in range(tasks)])
    del array
    cluster.settle(blocks_too=True)
    return len(set(results))


def pids(cluster: Site) -> list[int]:
    """Return the processes of a cluster: client and scheduler, nannies and workers."""
    return machine.family(os.getpid())


def sharing(cluster: Site) -> tuple[int, int]:
    """Return the room in the cluster's arena, and how many values were sent that could be shared; zeros for stock Dask."""
    if not cluster.with_plugin:
        return 0, 0
    arena = cluster.shared()
    return arena["room"], sum(sent["count"] for sent in arena["sent"].values())


def measure(arm: str, scale: int) -> dict[str, float]:
    """Return the time and the memory of the busy cluster beside the idle ones."""
    small, large = (Spec(workers=n, with_plugin=arm == "plugin") for n in (2, 4))
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(remote(site, small)) for _ in range(NOTEBOOKS)]
        busy = stack.enter_context(remote(site, large))
        processes = [pid for cluster in (*idle, busy) for pid in cluster.ask(pids)]

        def memory() -> int:
            return machine.shared() + machine.private(processes)

        before = memory()
        for cluster in idle:
            assert cluster.ask(broadcast, 64 * MIB // scale, 2) == 1
        time.sleep(IDLE / scale)
        at_rest = memory() - before
        watch = machine.Watch(lambda: (memory(),), pairs.EVERY)
        start = time.perf_counter()
        assert busy.ask(broadcast, 512 * MIB // scale, TASKS) == 1
        seconds = time.perf_counter() - start
        room, sent = busy.ask(sharing)
        peak = float(np.max(watch.stop()[:, 1])) - before
        return {"idle": at_rest, "peak": peak, "seconds": seconds, "room": room, "sent": sent}


def main() -> None:
    """Read the arguments, measure, print."""
    asked = report.parser(__doc__, pairs=3).parse_args()
    done: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for number in range(1 if asked.quick else asked.pairs):
        for arm in in_turn(number, ARMS):
            done[arm].append(measure(arm, 8 if asked.quick else 1))
    spreads = {arm: {name: report.spread([one[name] for one in done[arm]]) for name in done[arm][0]} for arm in ARMS}
    report.write(asked.json, report.head(asked, summary=spreads))
    medians = {arm: {name: one["median"] for name, one in spreads[arm].items()} for arm in ARMS}
    rows = [
        [
            arm,
            *(report.mib(one[name]) for name in ("idle", "peak", "room")),
            f"{one['sent']:.0f}",
            f"{one['seconds']:.2f}",
        ]
        for arm, one in medians.items()
    ]
    report.table(["medians", "idle, MiB", "peak, MiB", "room, MiB", "sent", "seconds"], rows)


if __name__ == "__main__":
    main()
