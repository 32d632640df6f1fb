"""The four workflows of the study that came with the first prototype (dask/distributed#6503), in an honest version.

    python benchmarks/workflows.py [--quick] [--pairs 7] [--only NAME ...] [--json PATH]

Random data whose pages are all written and all read, memory limits on, stock Dask and the plugin in turn (see `pairs.py`,
also for how memory is measured), and equal answers.

client-scatter
    The client scatters an array to one worker, as is the default; two tasks on every worker read all its pages.
worker-scatter
    A task makes an array and scatters it from inside; two tasks on every worker read all its pages.
dataframe
    The partitions of a DataFrame, which lie on the workers, are merged with a table of one partition and summed by group.
map-overlap
    An array in chunks of 8 MiB, which lie on the workers, is smoothed across their edges and summed.
"""

from __future__ import annotations

from typing import Any

import dask.array as da
import dask.dataframe as dd
import machine
import numpy as np
import pairs
from distributed import Client, wait, worker_client

MIB = 1 << 20
READS = 2


def on_all_workers(client: Client, count: int) -> list[str]:
    """Return every worker's address so many times."""
    return sorted(client.scheduler_info(n_workers=-1)["workers"]) * count


class ClientScatter(pairs.Work):
    """An array of the client's, read on all workers."""

    name = "client-scatter"

    def __init__(self, size: int) -> None:
        self.size = size

    def prepare(self, client: Client, seed: int) -> np.ndarray:
        """Make the array."""
        return machine.make(seed, self.size)

    def do(self, client: Client, prepared: np.ndarray) -> list[int]:
        """Scatter and read it."""
        future = client.scatter(prepared, hash=False)
        workers = on_all_workers(client, READS)
        return client.gather([client.submit(machine.read_pages, future, workers=[w], pure=False) for w in workers])


def scatter_and_read(seed: int, size: int, workers: list[str]) -> list[int]:
    """Scatter an array from a task, and let other tasks read it."""
    with worker_client() as client:
        future = client.scatter(machine.make(seed, size), hash=False)
        return client.gather([client.submit(machine.read_pages, future, workers=[w], pure=False) for w in workers])


class WorkerScatter(pairs.Work):
    """An array of a task's, read on all workers."""

    name = "worker-scatter"

    def __init__(self, size: int) -> None:
        self.size = size

    def do(self, client: Client, prepared: int) -> list[int]:
        """Let the task begin, and wait for what it says."""
        workers = on_all_workers(client, READS)
        return client.submit(scatter_and_read, prepared, self.size, workers, pure=False).result()


def rows(part: int, seed: int, count: int, keys: int) -> Any:
    """Return random rows of the large DataFrame."""
    import pandas as pd

    random = np.random.default_rng((seed, part))
    return pd.DataFrame({"key": random.integers(0, keys, count), "value": random.integers(0, 1000, count)})


def table(part: int, seed: int, keys: int) -> Any:
    """Return what is known of every key: a row each, in random order."""
    import pandas as pd

    random = np.random.default_rng((seed, keys))
    columns = {f"feature{n}": random.integers(0, 1000, keys) for n in range(6)}
    return pd.DataFrame({"key": random.permutation(keys), "group": random.integers(0, 100, keys), **columns})


class DataFrame(pairs.Work):
    """A join of many partitions with one."""

    name = "dataframe"

    def __init__(self, keys: int, count: int, partitions: int) -> None:
        self.keys, self.count, self.partitions = keys, count, partitions

    def prepare(self, client: Client, seed: int) -> Any:
        """Let the workers make both sides."""
        left = dd.from_map(rows, range(self.partitions), seed=seed, count=self.count, keys=self.keys).persist()
        right = dd.from_map(table, [0], seed=seed, keys=self.keys).persist()
        wait([left, right])
        return left, right

    def do(self, client: Client, prepared: Any) -> bytes:
        """Merge and sum."""
        left, right = prepared
        merged = left.merge(right, on="key", how="inner")
        sums = merged.groupby("group")[["value", *(f"feature{n}" for n in range(6))]].sum().compute()
        return sums.sort_index().to_numpy().tobytes()


def smooth(x: np.ndarray) -> np.ndarray:
    """Add the eight neighbours of every element to it; small integers, so that no order of additions matters."""
    across = x[:, 1:-1] + x[:, :-2] + x[:, 2:]
    result = x.copy()
    result[1:-1, 1:-1] = across[1:-1] + across[:-2] + across[2:]
    return result


class MapOverlap(pairs.Work):
    """A stencil over an array in chunks."""

    name = "map-overlap"

    def __init__(self, side: int, chunk: int) -> None:
        self.side, self.chunk = side, chunk

    def prepare(self, client: Client, seed: int) -> Any:
        """Let the workers make the array."""
        random = da.random.default_rng(seed)
        x = random.integers(0, 1000, size=(self.side, self.side), chunks=self.chunk, dtype=np.int64).persist()
        wait(x)
        return x

    def do(self, client: Client, prepared: Any) -> int:
        """Smooth and sum."""
        return int(prepared.map_overlap(smooth, depth=1, boundary="periodic").sum().compute())


def works(*, is_quick: bool) -> list[pairs.Work]:
    """Return all four, small or large."""
    if is_quick:
        return [
            ClientScatter(16 * MIB),
            WorkerScatter(16 * MIB),
            DataFrame(100_000, 20_000, 6),
            MapOverlap(2048, 1024),
        ]
    return [
        ClientScatter(256 * MIB),
        WorkerScatter(256 * MIB),
        DataFrame(1_000_000, 250_000, 12),
        MapOverlap(6144, 1024),
    ]


def main() -> None:
    """Read the arguments, measure, print."""
    asked = pairs.arguments(__doc__, [work.name for work in works(is_quick=True)], pairs=7)
    chosen = [work for work in works(is_quick=asked.quick) if work.name in asked.only]
    pairs.report(asked, chosen, pairs.Settings(), machine.surroundings("distributed", "numpy", "pandas"))


if __name__ == "__main__":
    main()
