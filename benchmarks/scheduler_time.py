"""The processor time that the scheduler takes for a tiny task, with and without the plugin.

    python benchmarks/scheduler_time.py [--quick] [--pairs 10] [--json PATH]

The scheduler has a process of its own; its processor time is read there, so other programs hardly spoil the figures. Four
thousand tasks add one to a number on two workers, and are released. Stock Dask and the plugin take turns, each in a fresh
cluster, which does the same once unmeasured. "ratio" is the geometric mean, over all pairs, of the time with the plugin over
the time without it, and "at most" its upper confidence bound, as in `tax.py`. An idle scheduler takes time, too: for the
heartbeats of the workers, and with the plugin for one look at them each second.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import report
from clusters import ARMS, in_turn
from distributed import Client, wait
from distributed.deploy.subprocess import SubprocessCluster
from tax import geometric_mean, inc, upper_bound

TASKS, QUICK_TASKS = 4_000, 200
WORKERS = 2
TARGET = 1.02
SETTLE_S = 0.5


def busy(client: Client) -> float:
    """Return the processor time (s) that the scheduler's process has taken so far."""
    return float(client.run_on_scheduler(time.process_time))


def work(client: Client, count: int) -> float:
    """Return the scheduler's processor time (s) for each of some tiny tasks."""
    before = busy(client)
    futures = client.map(inc, range(count), pure=False)
    wait(futures)
    del futures
    time.sleep(SETTLE_S)  # the tasks are forgotten meanwhile
    return (busy(client) - before) / count


def measure(arm: str, count: int) -> float:
    """Do the work in a fresh cluster, once unmeasured, and return the scheduler's time (s) per task."""
    with (
        SubprocessCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        if arm == "plugin":
            from dask_shm_plugin import SharedMemoryPlugin

            client.register_plugin(SharedMemoryPlugin())
        work(client, count)
        return work(client, count)


def main() -> None:
    """Read the arguments, measure, print."""
    asked = report.parser(__doc__, pairs=10).parse_args()
    count, pairs = (QUICK_TASKS, 1) if asked.quick else (TASKS, asked.pairs or 10)
    result = report.head(asked, "distributed", pairs=pairs, tasks=count)
    done: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(pairs):
        for arm in in_turn(number, ARMS):
            done[arm].append(measure(arm, count))
    ratios = np.array(done["plugin"]) / np.array(done["stock"])
    figures: list[dict[str, Any]] = [
        *(report.figure(f"scheduler's time per task, {arm}", done[arm], "µs", factor=1e6) for arm in ARMS),
        report.figure("ratio", float(geometric_mean(ratios)), "×", TARGET),
        report.figure("ratio, at most", upper_bound(ratios), "×"),
    ]
    report.write(asked.json, {**result, "summary": figures})
    report.show_figures(figures)


if __name__ == "__main__":
    main()
