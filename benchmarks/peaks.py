"""The most memory that a piece of work takes, each time in a cluster of its own, with the plugin over stock Dask.

    pip install -e '.[benchmark]'
    python benchmarks/peaks.py [--quick] [--pairs 5] [--only NAME ...] [--json PATH]

What is measured is the highest growth of ``Shmem`` of the machine and of the private memory of the client and all workers
together, read every 20 ms, since the fresh cluster stood idle: preparing counts, and so do the plugin's own tables. *Idle* is how
much of it is shared, ten seconds after the work has let go of everything; looked for in the first round only.

The works are those of `workflows.py`, `workloads.py` and `tax.py`, and besides

rechunk
    An array on the workers changes from rows to columns.
bootstrap
    Each task draws rows of one scattered array of 500 MB, and takes their means.
xgboost, lightgbm-training
    ``xgboost.dask`` and ``lightgbm.dask`` train on a table in partitions.
of array, bytes, text, ...
    One worker makes a value of that kind, and all others keep it for half a second.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import dask.array as da
import machine
import numpy as np
import pairs
import pandas as pd
import pyarrow as pa
import tax
import workflows
import workloads
from distributed import Client, wait

IDLE = 10.0


class Rechunk(pairs.Work):
    """An array that changes its chunks."""

    name = "rechunk"

    def __init__(self, side: int, chunk: int) -> None:
        self.side, self.chunk = side, chunk

    def prepare(self, client: Client, seed: int) -> Any:
        """Let the workers make the array."""
        random = da.random.default_rng(seed)
        x = random.integers(0, 1000, size=(self.side, self.side), chunks=(self.chunk, self.side)).persist()
        wait(x)
        return x

    def do(self, client: Client, prepared: Any) -> int:
        """Rechunk and sum."""
        return int((prepared.rechunk((self.side, self.chunk)).cumsum(axis=0) % 7).sum().compute())


def means(x: np.ndarray, seed: int) -> list[float]:
    """Draw a thousandth of the rows, with replacement, and return the means."""
    return x[np.random.default_rng(seed).integers(0, len(x), len(x) // 1000)].mean(axis=0).tolist()


class Bootstrap(pairs.Work):
    """Samples of one large array."""

    name = "bootstrap"

    def __init__(self, size: int, samples: int) -> None:
        self.size, self.samples = size, samples

    def prepare(self, client: Client, seed: int) -> np.ndarray:
        """Make the array."""
        return np.random.default_rng(seed).random((self.size // 800, 100))

    def do(self, client: Client, prepared: Any) -> list[list[float]]:
        """Broadcast it, and draw."""
        x = client.scatter(prepared, broadcast=True, hash=False)
        return client.gather([client.submit(means, x, seed, pure=False) for seed in range(self.samples)])


class Training(pairs.Work):
    """A table in partitions, from which a model is made."""

    def __init__(self, rows: int, columns: int, chunk: int) -> None:
        self.rows, self.columns, self.chunk = rows, columns, chunk

    def prepare(self, client: Client, seed: int) -> Any:
        """Let the workers make the table."""
        random = da.random.default_rng(seed)
        x = random.random((self.rows, self.columns), chunks=(self.chunk, self.columns)).persist()
        y = (x[:, 0] + x[:, 1] > 1).astype(np.int64).persist()
        wait([x, y])
        return x, y


class XGBoost(Training):
    """Gradient boosting by ``xgboost.dask``."""

    name = "xgboost"

    def do(self, client: Client, prepared: Any) -> int:
        """Train; models of several processes are not equal to the last bit."""
        from xgboost import dask as xgb

        data = xgb.DaskDMatrix(client, *prepared)
        return xgb.train(client, {"tree_method": "hist", "nthread": 1}, data, num_boost_round=8)[
            "booster"
        ].num_boosted_rounds()


class LightGBMTraining(Training):
    """Gradient boosting by ``lightgbm.dask``."""

    name = "lightgbm-training"

    def do(self, client: Client, prepared: Any) -> int:
        """Train; models of several processes are not equal to the last bit."""
        from lightgbm import DaskLGBMClassifier

        return DaskLGBMClassifier(client=client, n_estimators=8, num_leaves=15, verbose=-1).fit(*prepared).n_features_


def times(n: int, random: np.random.Generator) -> np.ndarray:
    """Return seconds of some years."""
    return np.datetime64("2026-01-01", "ns") + random.integers(0, 10**17, n).astype("timedelta64[ns]")


def words(n: int, random: np.random.Generator) -> list[str]:
    """Return texts of ten digits each."""
    return [f"{number:010d}" for number in random.integers(0, 10**10, n).tolist()]


#: Makes about eight bytes times ``n``.
KINDS: dict[str, Callable[[int, np.random.Generator], Any]] = {
    "array": lambda n, random: random.random(n),
    "bytes": lambda n, random: random.bytes(8 * n),
    "text": lambda n, random: random.bytes(4 * n).hex(),
    "list of floats": lambda n, random: random.random(n // 4).tolist(),
    "series with a time zone": lambda n, random: pd.Series(times(n, random)).dt.tz_localize("UTC"),
    "frame with dates": lambda n, random: pd.DataFrame(
        {"t": times(n // 4, random), **{name: random.random(n // 4) for name in "abc"}}, index=times(n // 4, random)
    ),
    "frame of objects": lambda n, random: pd.DataFrame({"o": pd.Series(words(n // 8, random), dtype=object)}),
    "arrow table": lambda n, random: pa.table({"a": random.random(n // 2), "b": random.random(n // 2)}),
    "frame of arrow texts": lambda n, random: pd.DataFrame(
        {"s": pd.Series(words(n // 2, random), dtype="string[pyarrow]")}
    ),
    "random forest": lambda n, random: forest(n, random),
}


def forest(n: int, random: np.random.Generator) -> Any:
    """Return a fitted model."""
    from sklearn.ensemble import RandomForestRegressor

    x = random.random((5000, 4))
    return RandomForestRegressor(max(1, n // 75_000), random_state=0).fit(x, x.sum(axis=1) + random.random(5000))


def made(kind: str, size: int, seed: int) -> Any:
    """Make a value of a kind."""
    return KINDS[kind](size // 8, np.random.default_rng(seed))


def kept(value: Any) -> str:
    """Keep a value for a moment."""
    time.sleep(0.5)
    return type(value).__name__


class Kind(pairs.Work):
    """A value that is made on one worker and read on all others."""

    def __init__(self, kind: str, size: int) -> None:
        self.name, self.kind, self.size = f"of {kind}", kind, size

    def do(self, client: Client, prepared: Any) -> list[str]:
        """Make it, and read it."""
        maker, *readers = workflows.on_all_workers(client, 1)
        value = client.submit(made, self.kind, self.size, prepared, workers=[maker])
        wait(value)
        return client.gather([client.submit(kept, value, workers=[reader], pure=False) for reader in readers])


def works(*, is_quick: bool) -> list[pairs.Work]:
    """Return all of them, small or large."""
    others = [work for room in (workflows, workloads, tax) for work in room.works(is_quick=is_quick)]
    if is_quick:
        return [
            *others,
            Rechunk(1024, 256),
            Bootstrap(8_000_000, 8),
            XGBoost(2000, 8, 500),
            LightGBMTraining(2000, 8, 500),
            *(Kind(kind, 1 << 20) for kind in KINDS),
        ]
    rows = 400_000
    return [
        *others,
        Rechunk(6144, 768),
        Bootstrap(500_000_000, 32),
        XGBoost(rows, 50, rows // 8),
        LightGBMTraining(rows, 50, rows // 8),
        *(Kind(kind, 64 << 20) for kind in KINDS),
    ]


def peak(arm: str, work: pairs.Work, seed: int, idle: float) -> tuple[pairs.Round, Any]:
    """Do a piece of work in a cluster of its own; return its figures, and what is shared so many seconds later, and its answer."""
    with pairs.clusters(pairs.Settings(), [arm]) as pipes:
        pipes[arm].send((work, seed))
        figures, answer = pipes[arm].recv()
        gc.collect()
        time.sleep(idle)
        figures["idle"] = machine.shared() - figures.pop("shared_before")
        return figures, answer


def main() -> None:
    """Read the arguments, measure, print."""
    asked = pairs.arguments(__doc__, [work.name for work in works(is_quick=True)], pairs=5)
    chosen = [work for work in works(is_quick=asked.quick) if work.name in asked.only]
    result: dict[str, Any] = {
        "pairs": asked.pairs,
        "surroundings": machine.surroundings(*workloads.PACKAGES, "xgboost"),
        "summary": {},
    }
    print(pairs.headline(result) + "\n")
    print(f"{'':<27}{'together, MiB':^20}{'over':>8}{'spread':>14}{'idle, MiB':>11}{'time':>8}")
    for work in chosen:
        rounds: dict[str, list[pairs.Round]] = {arm: [] for arm in pairs.ARMS}
        for number in range(asked.pairs):
            answers = []
            for arm in pairs.ARMS if number % 2 else reversed(pairs.ARMS):
                figures, answer = peak(arm, work, number + 1, 0 if number else IDLE)
                rounds[arm].append(figures)
                answers.append(answer)
            if answers[0] != answers[1]:
                sys.exit(f"{work.name}: the plugin changes the result: {str(answers)[:1000]}")
        both = list(zip(rounds["stock"], rounds["plugin"], strict=True))
        ratios = [plugin["together"] / stock["together"] for stock, plugin in both]
        medians = {
            arm: {f: statistics.median(one[f] for one in rounds[arm]) for f in rounds[arm][0] if f != "idle"}
            for arm in pairs.ARMS
        }
        times = statistics.median(plugin["seconds"] / stock["seconds"] for stock, plugin in both)
        result["summary"][work.name] = {
            **medians,
            "idle": rounds["plugin"][0]["idle"],
            "peak_over_stock": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "time_over_stock": times,
        }
        stock, plugin = (medians[arm]["together"] / 2**20 for arm in pairs.ARMS)
        print(
            f"{work.name:<27}{stock:>10.0f}{plugin:>10.0f}{statistics.median(ratios):>8.2f}"
            f"{min(ratios):>7.2f}–{max(ratios):.2f}  {rounds['plugin'][0]['idle'] / 2**20:>9.0f}{times:>8.2f}",
            flush=True,
        )
    pairs.write(asked.json, result)


if __name__ == "__main__":
    main()
