"""The four workflows of the study of the first prototype (dask/distributed#6503).

    python benchmarks/workflows.py [--quick] [--pairs 7] [--only NAME ...] [--json PATH]

Unlike in the study, the data are random, every page of them is written and read, and memory limits are on. Stock Dask and the
plugin work in turn, and their answers must be equal (see `pairs.py`, also for how memory is measured).

client-scatter
    The client scatters an array to one worker, as is the default; two tasks on every worker read all its pages.
worker-scatter
    A task makes an array and scatters it; two tasks on every worker read all its pages.
dataframe
    The partitions of a DataFrame on the workers are merged with a table of one partition and summed by group.
map-overlap
    An array on the workers, in chunks of 8 MiB, is smoothed across the edges of its chunks and summed.
"""

from __future__ import annotations

from typing import Any

import dask.array as da
import dask.dataframe as dd
import machine
import numpy as np
import pairs
import pandas as pd
from distributed import Client, wait, worker_client
from machine import MIB
from pairs import work

READS = 2


def on_all_workers(client: Client, count: int) -> list[str]:
    """Return the address of every worker, ``count`` times."""
    return sorted(client.scheduler_info(n_workers=-1)["workers"]) * count


def array(client: Client, seed: int, size: int) -> np.ndarray:
    """Make an array on the client."""
    return machine.make(seed, size)


def scatter_and_read(client: Client, x: np.ndarray, workers: list[str] | None = None) -> list[int]:
    """Scatter an array, and read it on all workers."""
    future = client.scatter(x, hash=False)
    workers = workers or on_all_workers(client, READS)
    return client.gather([client.submit(machine.read_pages, future, workers=[w], pure=False) for w in workers])


def make_and_scatter(seed: int, size: int, workers: list[str]) -> list[int]:
    """Make an array in a task, scatter it, and let other tasks read it."""
    with worker_client() as client:
        return scatter_and_read(client, machine.make(seed, size), workers)


def scatter_from_task(client: Client, prepared: tuple[int, int]) -> list[int]:
    """Start the task, and wait for its result."""
    return client.submit(make_and_scatter, *prepared, on_all_workers(client, READS), pure=False).result()


def rows(part: int, seed: int, count: int, keys: int) -> pd.DataFrame:
    """Return random rows of the large DataFrame."""
    random = np.random.default_rng((seed, part))
    return pd.DataFrame({"key": random.integers(0, keys, count), "value": random.integers(0, 1000, count)})


def table(part: int, seed: int, keys: int) -> pd.DataFrame:
    """Return one row for every key, in random order."""
    random = np.random.default_rng((seed, keys))
    columns = {f"feature{n}": random.integers(0, 1000, keys) for n in range(6)}
    return pd.DataFrame({"key": random.permutation(keys), "group": random.integers(0, 100, keys), **columns})


def frames(client: Client, seed: int, keys: int, count: int, partitions: int) -> Any:
    """Make both sides of the join on the workers."""
    left = dd.from_map(rows, range(partitions), seed=seed, count=count, keys=keys).persist()
    right = dd.from_map(table, [0], seed=seed, keys=keys).persist()
    wait([left, right])
    return left, right


def merge(client: Client, prepared: Any) -> bytes:
    """Merge and sum."""
    left, right = prepared
    merged = left.merge(right, on="key", how="inner")
    sums = merged.groupby("group")[["value", *(f"feature{n}" for n in range(6))]].sum().compute()
    return sums.sort_index().to_numpy().tobytes()


def chunks(client: Client, seed: int, side: int, rows: int, columns: int) -> da.Array:
    """Make a square array of small integers on the workers, in chunks of some rows and columns."""
    random = da.random.default_rng(seed)
    x = random.integers(0, 1000, size=(side, side), chunks=(rows, columns), dtype=np.int64).persist()
    wait(x)
    return x


def smooth(x: np.ndarray) -> np.ndarray:
    """Add the eight neighbours of every element to it; small integers, so the order of additions does not matter."""
    across = x[:, 1:-1] + x[:, :-2] + x[:, 2:]
    result = x.copy()
    result[1:-1, 1:-1] = across[1:-1] + across[:-2] + across[2:]
    return result


def overlap(client: Client, x: da.Array) -> int:
    """Smooth and sum."""
    return int(x.map_overlap(smooth, depth=1, boundary="periodic").sum().compute())


WORKS = (
    work("client-scatter", scatter_and_read, array, size=(256 * MIB, 16 * MIB)),
    work("worker-scatter", scatter_from_task, size=(256 * MIB, 16 * MIB)),
    work("dataframe", merge, frames, keys=(1_000_000, 100_000), count=(250_000, 20_000), partitions=(12, 6)),
    work("map-overlap", overlap, chunks, side=(6144, 2048), rows=(1024, 1024), columns=(1024, 1024)),
)

if __name__ == "__main__":
    pairs.run(__doc__, WORKS, 7, "distributed", "numpy", "pandas")
