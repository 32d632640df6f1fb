"""The memory that workers report, and the memory that they really use, while a real workload runs.

    python benchmarks/memory.py [--quick] [--json benchmarks/results/memory.json] [--plot docs/images/reported-memory.svg]
    python benchmarks/memory.py --plot docs/images/reported-memory.svg --from benchmarks/results/memory.json

Four workers with memory limits get an array, read it, write to a quarter of it, join the flights out of New York in 2013
with their planes and the weather, make results that exceed the workers' limits, and release everything. The Active Memory
Manager is off, so all workers keep broadcast values. Five times a second three sums over the workers are taken, each less
its value in the idle cluster:

reported
    The memory that each worker reports to the scheduler.
rss
    Its RSS, which it would report without the plugin.
real
    ``RssAnon`` and ``RssFile`` of the workers, and ``Shmem`` of /proc/meminfo: each page counts once.

Shared memory of other programs that comes or goes meanwhile spoils "real". ``others_at_most_mib`` says how far ``Shmem`` and
the arena have moved apart at most. The first form measures, the second only draws (with matplotlib,
``pip install -e '.[benchmark]'``).
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flights
import machine
import numpy as np
import pandas as pd
import report
from clusters import Site, Spec, site
from distributed import wait
from machine import MIB, Watch, field, make, read_pages

SPEC = Spec(memory_limit="700 MiB", capacity="1536 MiB")
EVERY = 0.2


# ----------------------------------------------------------------------------------------------------------- sampling


def watch(dask_worker: Any) -> None:
    """Begin to watch this worker's reported memory, RSS, and private memory."""

    def look() -> tuple[float, ...]:
        told = dask_worker.monitor.get_process_memory()
        return told, field("/proc/self/status", "VmRSS"), field("/proc/self/status", "RssAnon", "RssFile")

    dask_worker.watch = Watch(look, EVERY)


def stop(dask_worker: Any) -> np.ndarray:
    """End watching."""
    return dask_worker.watch.stop()


class Sampler:
    """Watches all workers and the machine from its creation until :meth:`stop`."""

    def __init__(self, cluster: Site) -> None:
        self._client, pages = cluster.client, pages_of(cluster)
        self._client.run(watch)
        self._watch = Watch(lambda: (machine.shared(), pages()), EVERY)
        time.sleep(2)
        self._idle_until = time.monotonic()
        time.sleep(1)
        self.phases: list[tuple[float, str]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note when a part of the workload begins, and leave time to see its end."""
        self.phases.append((round(time.monotonic() - self._idle_until, 1), name))
        print(*self.phases[-1], file=sys.stderr)
        yield
        time.sleep(2)

    def stop(self) -> dict[str, np.ndarray]:
        """End, and return all curves over time, in seconds and MiB, less their values in the idle cluster."""
        times, shmem, arena = self._watch.stop().T
        curves = np.zeros((3, len(times)))
        for looks in self._client.run(stop).values():
            curves += [np.interp(times, looks[:, 0], looks[:, column]) for column in (1, 2, 3)]
        reported, rss, private = curves
        found = {"reported": reported, "rss": rss, "real": private + shmem, "others": shmem - arena}
        idle = times < self._idle_until
        less = {name: ((curve - curve[idle].mean()) / MIB).round(1)[~idle] for name, curve in found.items()}
        return {"seconds": (times - self._idle_until).round(2)[~idle], **less}


def pages_of(cluster: Site) -> Callable[[], int]:
    """Return a function that returns the bytes of the arena's pages, as the kernel counts them."""
    for number in Path(f"/proc/{cluster.processes[1]}/fd").iterdir():
        target = os.readlink(number)
        if "dask-shm" in target and "-segment" in target:
            return lambda: os.stat(number).st_blocks * 512
    raise SystemExit("the workers share nothing")


# ----------------------------------------------------------------------------------------------------------- workload


def write(x: np.ndarray) -> float:
    """Write to a quarter of an array: the written pages are private to this worker while the task runs."""
    x[: len(x) // 4] += 1
    time.sleep(3)
    return float(x[0])


def join(flights: pd.DataFrame, planes: pd.DataFrame, weather: pd.DataFrame, month: int) -> int:
    """Return how many seats flew in a month in rain."""
    chosen = flights[flights["month"] == month].merge(planes[["tailnum", "seats"]], on="tailnum")
    joined = chosen.merge(weather, on=["origin", "month", "day", "hour"])
    return int(joined.loc[joined["precip"] > 0, "seats"].sum())


def work(cluster: Site, sampler: Sampler, scale: int) -> None:
    """Run the workload, phase by phase; a scale of 1 is the full size."""
    client = cluster.client
    flown, planes, weather = flights.read()
    tables = [pd.concat([flown] * 2, ignore_index=True), planes, weather]
    with sampler.phase("broadcast"):
        large = client.scatter(make(0, 320 * MIB // scale), broadcast=True, hash=False)
    with sampler.phase("read on all"):
        assert len(set(cluster.read_on_all(large, read_pages))) == 1
    with sampler.phase("write to a quarter"):
        cluster.read_on_all(large, write)
    with sampler.phase("join flights"):
        frames = client.scatter(tables, broadcast=True, hash=False)
        months = [client.submit(join, *frames, month, pure=False) for month in range(1, 13)]
        assert sum(client.gather(months)) > 0
        del months
    with sampler.phase("results, spilled"):
        results = [client.submit(make, seed, 32 * MIB, pure=False) for seed in range(80 // scale)]
        wait(results)
    with sampler.phase("read by others"):
        turned = [client.submit(read_pages, a, pure=False) for a in results[::4]]
        wait(turned)
    with sampler.phase("release"):
        del results, turned, large, frames
        time.sleep(4)


def measure(*, is_quick: bool) -> dict[str, Any]:
    """Run the workload and return the samples."""
    with site(SPEC) as cluster:
        # Imports and connections are not measured.
        for small, read in ((pd.DataFrame({"x": np.arange(9)}), len), (make(0, 2 * MIB), read_pages)):
            cluster.read_on_all(cluster.client.scatter(small, broadcast=True, hash=False), read)
        time.sleep(3)
        sampler = Sampler(cluster)
        work(cluster, sampler, 8 if is_quick else 1)
        samples = sampler.stop()
        sent = cluster.shared()["sent"]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, Linux {platform.release().partition('-')[0]}",
        "cluster": f"{SPEC.workers} workers of {SPEC.memory_limit}, shm.capacity {SPEC.capacity}",
        "sent": sent,
        "median_difference_mib": round(float(np.median(np.abs(samples["reported"] - samples["real"]))), 1),
        "phases": sampler.phases,
        "others_at_most_mib": float(np.abs(samples.pop("others")).max()),
        "samples": {name: curve.tolist() for name, curve in samples.items()},
    }


# ------------------------------------------------------------------------------------------------------------ drawing

CURVES = {
    "rss": ("sum of RSS, which stock Dask reports", "#c44e52", 1.4),
    "real": ("what is really there: private memory of the workers + Shmem of /proc/meminfo", "#222222", 2.6),
    "reported": ("sum of what the workers report", "#4c9be8", 1.4),
}


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the three curves over time, with the phases of the workload, as SVG."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"svg.hashsalt": "memory", "font.size": 10})
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    seconds = result["samples"]["seconds"]
    curves = {name: [value / 1024 for value in result["samples"][name]] for name in CURVES}
    for name, (label, colour, width) in CURVES.items():
        axes.plot(seconds, curves[name], "-", color=colour, linewidth=width, label=label)
    top = max(map(max, curves.values()))
    ends = [*(begin for begin, _ in result["phases"][1:]), seconds[-1]]
    for number, ((begin, name), end) in enumerate(zip(result["phases"], ends, strict=True)):
        if number % 2 == 0:
            axes.axvspan(begin, end, color="#000000", alpha=0.05, linewidth=0)
        axes.text(begin + seconds[-1] / 200, 1.4 * top, name, rotation=90, ha="left", va="top", fontsize=9)
    axes.set(xlim=(0, seconds[-1]), ylim=(-0.03 * top, 1.42 * top))
    axes.set(xlabel="seconds", ylabel="GiB more than in the idle cluster", title=result["cluster"])
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=1, frameon=False)
    figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """Read the arguments, measure, write."""
    parser = report.parser(__doc__)
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the samples there")
    parser.add_argument("--from", dest="source", type=Path, help="draw these samples instead of measuring")
    asked = parser.parse_args()
    result = json.loads(asked.source.read_text()) if asked.source else measure(is_quick=asked.quick)
    report.write(asked.json, result)
    if asked.plot:
        draw(result, asked.plot)
    print(json.dumps({name: value for name, value in result.items() if name != "samples"}, indent=2))


if __name__ == "__main__":
    main()
