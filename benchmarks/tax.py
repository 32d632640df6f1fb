"""The cost of the plugin where sharing brings little: values that are mostly small, or used once.

    python benchmarks/tax.py [--quick] [--pairs 30] [--only NAME ...] [--json PATH]

Stock Dask and the plugin work in turn, and their answers must be equal (see `pairs.py`).

tiny-tasks
    Two and a half thousand tasks that add one to a number.
shuffle
    A DataFrame is shuffled by a key, peer to peer.
tensordot
    A product of two matrices in chunks of 512 KiB, below the threshold from which values are shared.
tensordot-shared
    The same in chunks of 2 MiB, above the threshold.
group-by
    Sums of a DataFrame by one of ten thousand groups.

"ratio" is the geometric mean, over all pairs, of the time with the plugin over the time without it. "at most" is its
one-sided upper confidence bound of 95 %: pairs are drawn again with replacement, ten thousand times (percentile bootstrap),
and the mean of 19 draws in 20 is not above it. Memory is not watched, which would cost time itself.
"""

from __future__ import annotations

from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pairs
import pandas as pd
import report
from distributed import Client, wait
from pairs import ARMS, Pair, work

DRAWS = 10_000
CONFIDENCE = 0.95
GROUPS = 10_000


def inc(x: int) -> int:
    """Add one."""
    return x + 1


def tiny_tasks(client: Client, prepared: tuple[int, int]) -> int:
    """Add one to many numbers."""
    seed, count = prepared
    return sum(client.gather(client.map(inc, range(seed, seed + count), pure=False)))


def part(number: int, seed: int, rows: int) -> pd.DataFrame:
    """Return random rows; integers, so the order of additions does not matter."""
    random = np.random.default_rng((seed, number))
    columns = {name: random.integers(0, 1000, rows) for name in "abcd"}
    return pd.DataFrame({"key": random.integers(0, GROUPS, rows), **columns})


def frame(client: Client, seed: int, rows: int, partitions: int) -> Any:
    """Make a DataFrame on the workers."""
    frame = dd.from_map(part, range(partitions), seed=seed, rows=rows).persist()
    wait(frame)
    return frame


def signature(frame: pd.DataFrame) -> pd.DataFrame:
    """Return sums that depend on the rows of a partition, but not on their order."""
    row = {"rows": len(frame), **frame.sum().to_dict(), "mixed": int((frame["key"] * frame["a"] * frame["b"]).sum())}
    return pd.DataFrame([row], dtype=np.int64)


def shuffle(client: Client, prepared: Any) -> Any:
    """Shuffle, and return the signature of each new partition."""
    with dask.config.set({"dataframe.shuffle.method": "p2p"}):
        signatures = prepared.shuffle("key").map_partitions(signature, meta=signature(prepared._meta)).compute()
    return signatures.to_numpy().tolist()


def group_by(client: Client, prepared: Any) -> bytes:
    """Sum by groups."""
    return prepared.groupby("key").sum().compute().sort_index().to_numpy().tobytes()


def factors(client: Client, seed: int, side: int, chunk: int) -> Any:
    """Make two matrices on the workers; of small integers, so every sum is exact."""
    random = da.random.default_rng(seed)
    shape = {"size": (side, side), "chunks": chunk}
    made = [random.integers(0, 100, **shape).astype(np.float64).persist() for _ in range(2)]
    wait(made)
    return made


def tensordot(client: Client, prepared: Any) -> float:
    """Multiply, and sum the product."""
    return float(da.tensordot(*prepared, axes=1).sum().compute())


WORKS = (
    work("tiny-tasks", tiny_tasks, count=(2_500, 500)),
    work("shuffle", shuffle, frame, rows=(100_000, 5_000), partitions=(8, 4)),
    work("tensordot", tensordot, factors, side=(1024, 512), chunk=(256, 256)),
    work("tensordot-shared", tensordot, factors, side=(1536, 1024), chunk=(512, 512)),
    work("group-by", group_by, frame, rows=(100_000, 5_000), partitions=(16, 4)),
)


def upper_bound(ratios: np.ndarray) -> float:
    """Return the upper confidence bound of the geometric mean of ratios."""
    drawn = np.random.default_rng(0).integers(0, len(ratios), (DRAWS, len(ratios)))
    return float(np.quantile(geometric_mean(ratios[drawn]), CONFIDENCE))


def geometric_mean(ratios: np.ndarray) -> np.ndarray:
    """Return the mean along the last axis."""
    return np.exp(np.mean(np.log(ratios), axis=-1))


def compared(done: list[Pair]) -> dict[str, Any]:
    """Return the medians of the times, the mean ratio, and its bound."""
    ratios = np.array(pairs.ratios(done, "plugin", "stock"))
    seconds = {arm: report.spread(one[arm]["seconds"] for one in done) for arm in ARMS}
    return {**seconds, "ratio": float(geometric_mean(ratios)), "at_most": upper_bound(ratios)}


def main() -> None:
    """Read the arguments, measure, print."""
    asked, chosen = pairs.arguments(__doc__, WORKS, 30)
    sizes = {work.name: work.sizes for work in chosen}
    result = report.head(asked, "distributed", "numpy", "pandas", pairs=asked.pairs, sizes=sizes)
    done = pairs.measure(chosen, asked.pairs, watches_memory=False)
    result["summary"] = {name: compared(pairs) for name, pairs in done.items()}
    report.write(asked.json, result)
    rows = [
        [name, *(f"{one[arm]['median']:.3f}" for arm in ARMS), f"{one['ratio']:.3f}", f"{one['at_most']:.3f}"]
        for name, one in result["summary"].items()
    ]
    report.table(["medians", "stock, s", "plugin, s", "ratio", "at most"], rows)


if __name__ == "__main__":
    main()
