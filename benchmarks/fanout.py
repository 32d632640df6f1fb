"""Many tasks that share one large value: how they are spread over the workers of a node, and how long that takes.

    python benchmarks/fanout.py [--quick] [--pairs 3] [--json PATH]

A task on one worker makes an array. Forty tasks then read it, each of which also sleeps. "cold": nobody else has read the
array before. "published": one other worker has. "ideal" is the time that forty sleeps take on all workers without any
transfer. Stock Dask and the plugin work in turn, each in a fresh cluster, with one thread for each worker.
"""

from __future__ import annotations

import collections
import time
from typing import NamedTuple

import report
from clusters import ARMS, Site, Spec, in_turn, site
from distributed import get_worker, wait
from machine import MIB, make, read_pages
from remote import remote

TASKS, PAIRS = 40, 3


class Case(NamedTuple):
    """What is measured: the workers, the size of the array in bytes, the length of each sleep in seconds, and the state."""

    workers: int
    size: int
    sleep: float
    state: str

    def __str__(self) -> str:
        return f"{self.workers} workers, {self.size // MIB} MiB, {1000 * self.sleep:.0f} ms, {self.state}"


STATES = ("cold", "published")
CASES = [Case(4, 256 * MIB, sleep, state) for state in STATES for sleep in (0.01, 0.05, 0.5)]
CASES += [Case(4, size * MIB, 0.05, state) for state in STATES for size in (64, 1024)]
CASES += [Case(workers, 256 * MIB, 0.05, state) for state in STATES for workers in (2, 16)]
QUICK = [Case(2, 16 * MIB, 0.05, "cold")]


def score(array: object, sleep: float, number: int) -> tuple[str, float]:
    """Read a little of an array, sleep, and return the worker's address and what was read."""
    time.sleep(sleep)
    return get_worker().address, float(array[number])  # type: ignore[index]


def fan_out(cluster: Site, case: Case) -> tuple[float, list[int], list[float]]:
    """Return the time (s) of the forty tasks, how many each worker ran, and their results."""
    client, (first, second, *_) = cluster.client, cluster.workers
    array = client.submit(make, 0, case.size, workers=[first])
    wait(array)
    if case.state == "published":
        client.submit(read_pages, array, workers=[second]).result()
        time.sleep(0.5)
    start = time.perf_counter()
    answers = client.gather([client.submit(score, array, case.sleep, number, pure=False) for number in range(TASKS)])
    seconds = time.perf_counter() - start
    ran = collections.Counter(address for address, _ in answers)
    return seconds, sorted(ran[address] for address in cluster.workers), [value for _, value in answers]


def measure(arm: str, case: Case) -> tuple[float, list[int], list[float]]:
    """Do the same in a fresh cluster."""
    spec = Spec(workers=case.workers, with_plugin=arm == "plugin", has_amm=True)
    with remote(site, spec) as cluster:
        return cluster.ask(fan_out, case)


def main() -> None:
    """Read the arguments, measure, print."""
    asked = report.parser(__doc__, pairs=PAIRS).parse_args()
    cases, pairs = (QUICK, 1) if asked.quick else (CASES, asked.pairs or PAIRS)
    rows, summary = [], {}
    for case in cases:
        done: dict[str, list[tuple[float, list[int], list[float]]]] = {arm: [] for arm in ARMS}
        for number in range(pairs):
            for arm in in_turn(number, ARMS):
                done[arm].append(measure(arm, case))
        assert len({tuple(values) for arm in ARMS for _, _, values in done[arm]}) == 1, "the results differ"
        seconds = {arm: report.spread([one[0] for one in done[arm]]) for arm in ARMS}
        ideal = TASKS * case.sleep / case.workers
        ran = {arm: " ".join(map(str, done[arm][-1][1])) for arm in ARMS}
        summary[str(case)] = {**seconds, "ideal": ideal, "ran": ran}
        times = [f"{seconds[arm]['median']:.2f}" for arm in ARMS]
        rows.append([str(case), f"{ideal:.2f}", *times, *ran.values()])
    report.write(asked.json, report.head(asked, "distributed", tasks=TASKS, pairs=pairs, summary=summary))
    report.table(["medians", "ideal, s", *(f"{arm}, s" for arm in ARMS), *(f"tasks, {arm}" for arm in ARMS)], rows)


if __name__ == "__main__":
    main()
