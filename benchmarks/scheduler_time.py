"""The processor time that the scheduler takes for a tiny task, with and without the plugin.

    python benchmarks/scheduler_time.py [--quick] [--pairs 10] [--json PATH]

The scheduler has a process of its own; its processor time is read there, so other programs hardly spoil the figures. Four
thousand tasks add one to a number on two workers, and are released. A pair is two fresh clusters, stock and with the plugin,
which do this once unmeasured and then five times in turn; the quickest round of each counts. "ratio" is the geometric mean,
over all pairs, of the time with the plugin over the time without it, and "at most" its upper confidence bound, as in
`tax.py`. An idle scheduler takes time, too: for the heartbeats of the workers, and with the plugin for one look at them each
second.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
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
ROUNDS = 5
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


@contextlib.contextmanager
def cluster(arm: str) -> Iterator[Client]:
    """Run a fresh cluster."""
    with (
        SubprocessCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=":0") as processes,
        Client(processes) as client,
    ):
        if arm == "plugin":
            from dask_shm_plugin import SharedMemoryPlugin

            client.register_plugin(SharedMemoryPlugin())
        yield client


def measure(count: int, rounds: int) -> dict[str, float]:
    """Do the work in two fresh clusters in turn, and return the scheduler's least time (s) per task by arm."""
    with contextlib.ExitStack() as stack:
        clients = {arm: stack.enter_context(cluster(arm)) for arm in ARMS}
        seconds: dict[str, list[float]] = {arm: [work(client, count)] for arm, client in clients.items()}
        for number in range(rounds):
            for arm in in_turn(number, ARMS):
                seconds[arm].append(work(clients[arm], count))
        return {arm: min(measured[1:]) for arm, measured in seconds.items()}


def main() -> None:
    """Read the arguments, measure, print."""
    asked = report.parser(__doc__, pairs=10).parse_args()
    count, pairs, rounds = (QUICK_TASKS, 1, 1) if asked.quick else (TASKS, asked.pairs or 10, ROUNDS)
    result = report.head(asked, "distributed", pairs=pairs, tasks=count)
    done: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(pairs):
        for arm, seconds in measure(count, rounds).items():
            done[arm].append(seconds)
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
