"""What the plugin costs where sharing brings little: values that are mostly small, or used once.

    python benchmarks/tax.py [--quick] [--pairs 30] [--only NAME ...] [--json PATH]

Stock Dask and the plugin in turn (see `pairs.py`), equal answers.

tiny-tasks
    Two and a half thousand tasks that add one to a number.
shuffle
    A DataFrame is shuffled by a key, peer to peer.
tensordot
    A product of two matrices in chunks of 512 KiB, below the threshold from which values are shared.
tensordot-shared
    The same in chunks of 2 MiB, above it.
group-by
    Sums of a DataFrame by one of ten thousand groups.

"ratio" is the geometric mean of what each pair's time with the plugin is over its time without: of the two, only what
they were measured next to each other for counts. "at most" is its one-sided upper confidence bound of 95 %: pairs are drawn
again with replacement, ten thousand times (percentile bootstrap), and the mean of 19 draws in 20 is not above it. Memory is
not looked at, which would cost time itself.
"""

from __future__ import annotations

from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import machine
import numpy as np
import pairs
import pandas as pd
from distributed import Client, wait

DRAWS = 10_000
CONFIDENCE = 0.95


def inc(x: int) -> int:
    """Add one."""
    return x + 1


class TinyTasks(pairs.Work):
    """Nothing but overhead."""

    name = "tiny-tasks"

    def __init__(self, count: int) -> None:
        self.count = count

    def do(self, client: Client, prepared: int) -> int:
        """Add one to many numbers."""
        return sum(client.gather(client.map(inc, range(prepared, prepared + self.count), pure=False)))


def part(number: int, seed: int, rows: int, groups: int) -> pd.DataFrame:
    """Return random rows; integers, so that the order in which they are added does not matter."""
    random = np.random.default_rng((seed, number))
    columns = {name: random.integers(0, 1000, rows) for name in "abcd"}
    return pd.DataFrame({"key": random.integers(0, groups, rows), **columns})


class Frame(pairs.Work):
    """A DataFrame whose partitions lie on the workers."""

    def __init__(self, rows: int, partitions: int, groups: int = 10_000) -> None:
        self.rows, self.partitions, self.groups = rows, partitions, groups

    def prepare(self, client: Client, seed: int) -> Any:
        """Make it."""
        frame = dd.from_map(part, range(self.partitions), seed=seed, rows=self.rows, groups=self.groups).persist()
        wait(frame)
        return frame


def signature(frame: pd.DataFrame) -> pd.DataFrame:
    """Return what a partition holds, whatever the order of its rows."""
    row = {"rows": len(frame), **frame.sum().to_dict(), "mixed": int((frame["key"] * frame["a"] * frame["b"]).sum())}
    return pd.DataFrame([row], dtype=np.int64)


class Shuffle(Frame):
    """All rows change their place."""

    name = "shuffle"

    def do(self, client: Client, prepared: Any) -> Any:
        """Shuffle, and say what came where."""
        with dask.config.set({"dataframe.shuffle.method": "p2p"}):
            signatures = prepared.shuffle("key").map_partitions(signature, meta=signature(prepared._meta)).compute()
        return signatures.to_numpy().tolist()


class GroupBy(Frame):
    """A reduction by groups."""

    name = "group-by"

    def do(self, client: Client, prepared: Any) -> bytes:
        """Sum."""
        return prepared.groupby("key").sum().compute().sort_index().to_numpy().tobytes()


class Tensordot(pairs.Work):
    """A product of matrices whose chunks lie on the workers."""

    def __init__(self, name: str, side: int, chunk: int) -> None:
        self.name, self.side, self.chunk = name, side, chunk

    def prepare(self, client: Client, seed: int) -> Any:
        """Make the factors; of small integers, so that every sum of them is exact."""
        random = da.random.default_rng(seed)
        shape = {"size": (self.side, self.side), "chunks": self.chunk}
        factors = [random.integers(0, 100, **shape).astype(np.float64).persist() for _ in range(2)]
        wait(factors)
        return factors

    def do(self, client: Client, prepared: Any) -> float:
        """Multiply, and sum the product."""
        return float(da.tensordot(*prepared, axes=1).sum().compute())


def works(*, is_quick: bool) -> list[pairs.Work]:
    """Return all of them, small or large."""
    if is_quick:
        return [
            TinyTasks(500),
            Shuffle(5_000, 4),
            Tensordot("tensordot", 512, 256),
            Tensordot("tensordot-shared", 1024, 512),
            GroupBy(5_000, 4),
        ]
    return [
        TinyTasks(2_500),
        Shuffle(100_000, 8),
        Tensordot("tensordot", 1024, 256),
        Tensordot("tensordot-shared", 1536, 512),
        GroupBy(100_000, 16),
    ]


def upper_bound(ratios: np.ndarray) -> float:
    """Return the upper confidence bound of the geometric mean of the ratios of pairs."""
    drawn = np.random.default_rng(0).integers(0, len(ratios), (DRAWS, len(ratios)))
    return float(np.quantile(geometric_mean(ratios[drawn]), CONFIDENCE))


def geometric_mean(ratios: np.ndarray) -> np.ndarray:
    """Return the mean along the last axis."""
    return np.exp(np.mean(np.log(ratios), axis=-1))


def compared(arms: dict[str, list[pairs.Round]]) -> dict[str, float]:
    """Return the medians of the times, the mean ratio of pairs, and its bound."""
    stock, plugin = (np.array([one["seconds"] for one in arms[arm]]) for arm in pairs.ARMS)
    return {
        "stock": float(np.median(stock)),
        "plugin": float(np.median(plugin)),
        "ratio": float(geometric_mean(plugin / stock)),
        "at_most": upper_bound(plugin / stock),
    }


def main() -> None:
    """Read the arguments, measure, print."""
    asked = pairs.arguments(__doc__, [work.name for work in works(is_quick=True)], pairs=30)
    chosen = [work for work in works(is_quick=asked.quick) if work.name in asked.only]
    settings = pairs.Settings(watch_memory=False)
    result = pairs.result(asked, chosen, settings, machine.surroundings("distributed", "numpy", "pandas"))
    result["summary"] = {name: compared(arms) for name, arms in result["rounds"].items()}
    pairs.write(asked.json, result)
    print(pairs.headline(result) + "\n")
    print(f"{'':<18}{'stock, s':>10}{'plugin, s':>11}{'ratio':>8}{'at most':>10}")
    for name, figures in result["summary"].items():
        print(f"{name:<18}{figures['stock']:>10.3f}{figures['plugin']:>11.3f}{figures['ratio']:>8.3f}", end="")
        print(f"{figures['at_most']:>10.3f}")


if __name__ == "__main__":
    main()
