"""The most memory that a piece of work takes, each time in a cluster of its own, with the plugin over stock Dask.

    pip install -e '.[benchmark]'
    python benchmarks/peaks.py [--quick] [--pairs 5] [--only NAME ...] [--json PATH]

What is measured is the highest growth of ``Shmem`` of the machine and of the private memory of the client and all workers
together, read every 20 ms, since the fresh cluster stood idle: preparing counts, and so do the plugin's own tables. *Idle* is how
much of it is shared, ten seconds after the work has let go of everything.

The works are those of `workflows.py`, `workloads.py` and `tax.py`, and besides

rechunk
    An array on the workers changes from rows to columns.
bootstrap
    Each task draws rows of one scattered array of 500 MB, and takes their means.
xgboost, lightgbm-training
    ``xgboost.dask`` and ``lightgbm.dask`` train on a table in partitions.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from typing import Any

import dask.array as da
import machine
import numpy as np
import pairs
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
        ]
    rows = 400_000
    return [
        *others,
        Rechunk(6144, 768),
        Bootstrap(500_000_000, 32),
        XGBoost(rows, 50, rows // 8),
        LightGBMTraining(rows, 50, rows // 8),
    ]


def peak(arm: str, work: pairs.Work, seed: int) -> tuple[pairs.Round, Any]:
    """Do a piece of work in a cluster of its own; return its figures and its answer."""
    with pairs.clusters(pairs.Settings(), [arm]) as pipes:
        pipes[arm].send((work, seed))
        figures, answer = pipes[arm].recv()
        gc.collect()
        time.sleep(IDLE)
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
    print(f"{'':<18}{'together, MiB':^20}{'over':>8}{'spread':>14}{'idle, MiB':>11}{'time':>8}")
    for work in chosen:
        rounds: dict[str, list[pairs.Round]] = {arm: [] for arm in pairs.ARMS}
        for number in range(asked.pairs):
            answers = []
            for arm in pairs.ARMS if number % 2 else reversed(pairs.ARMS):
                figures, answer = peak(arm, work, number + 1)
                rounds[arm].append(figures)
                answers.append(answer)
            if answers[0] != answers[1]:
                sys.exit(f"{work.name}: the plugin changes the result: {str(answers)[:1000]}")
        both = list(zip(rounds["stock"], rounds["plugin"], strict=True))
        ratios = [plugin["together"] / stock["together"] for stock, plugin in both]
        medians = {
            arm: {f: statistics.median(one[f] for one in rounds[arm]) for f in rounds[arm][0]} for arm in pairs.ARMS
        }
        times = statistics.median(plugin["seconds"] / stock["seconds"] for stock, plugin in both)
        result["summary"][work.name] = {
            **medians,
            "peak_over_stock": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "time_over_stock": times,
        }
        stock, plugin = (medians[arm]["together"] / 2**20 for arm in pairs.ARMS)
        print(
            f"{work.name:<18}{stock:>10.0f}{plugin:>10.0f}{statistics.median(ratios):>8.2f}"
            f"{min(ratios):>7.2f}–{max(ratios):.2f}  {medians['plugin']['idle'] / 2**20:>9.0f}{times:>8.2f}",
            flush=True,
        )
    pairs.write(asked.json, result)


if __name__ == "__main__":
    main()
