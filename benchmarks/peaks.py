"""The most memory that a piece of work takes in a fresh cluster: stock, with the plugin, and with the plugin without births.

    pip install -e '.[benchmark]'
    python benchmarks/peaks.py [--quick] [--pairs 5] [--only NAME ...] [--json PATH]

The peak is the highest growth of ``Shmem`` of the machine and of the private memory of the client and all workers together,
read every 20 ms, since the fresh cluster was idle: it includes the preparation of the work and the plugin's own tables.
"over stock" and "over off" are the peak with the plugin over that of the other two, within a round: the median, the least
and the most. "time" and "cpu", of the workers and with the preparation, are ratios of the same kind. "idle" is the growth of
``Shmem`` that is left ten seconds after the work has released everything, in the first round only. Before each work 2 GiB
are written and freed, for the reason that `shuffles.py` gives.

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
import report
import tax
import workflows
import workloads
from distributed import Client, wait
from machine import MIB
from pairs import SPEC, Pair, Round, Work, work
from remote import remote

IDLE = 10.0
ARMS = {
    "stock": SPEC._replace(with_plugin=False),
    "off": SPEC._replace(born="off"),
    "plugin": SPEC._replace(born="auto"),
}


def rechunk(client: Client, x: da.Array) -> int:
    """Rechunk from rows to columns, and sum."""
    columns = x.rechunk((x.shape[0], x.chunksize[0]))
    return int((columns.cumsum(axis=0) % 7).sum().compute())


def means(x: np.ndarray, seed: int) -> list[float]:
    """Draw a thousandth of the rows, with replacement, and return the means."""
    return x[np.random.default_rng(seed).integers(0, len(x), len(x) // 1000)].mean(axis=0).tolist()


def rows_and_samples(client: Client, seed: int, size: int, samples: int) -> tuple[np.ndarray, int]:
    """Make an array of a hundred columns."""
    return np.random.default_rng(seed).random((size // 800, 100)), samples


def bootstrap(client: Client, prepared: Any) -> list[list[float]]:
    """Broadcast the array, and draw."""
    x = client.scatter(prepared[0], broadcast=True, hash=False)
    return client.gather([client.submit(means, x, seed, pure=False) for seed in range(prepared[1])])


def partitions(client: Client, seed: int, rows: int, columns: int, chunk: int) -> Any:
    """Make a table and the classes of its rows on the workers."""
    x = da.random.default_rng(seed).random((rows, columns), chunks=(chunk, columns)).persist()
    y = (x[:, 0] + x[:, 1] > 1).astype(np.int64).persist()
    wait([x, y])
    return x, y


def xgboost(client: Client, prepared: Any) -> int:
    """Train; models of several processes are not equal to the last bit, so their sizes are compared."""
    from xgboost import dask as xgb

    data, options = xgb.DaskDMatrix(client, *prepared), {"tree_method": "hist", "nthread": 1}
    return xgb.train(client, options, data, num_boost_round=8)["booster"].num_boosted_rounds()


def lightgbm_training(client: Client, prepared: Any) -> int:
    """Train; models of several processes are not equal to the last bit, so their sizes are compared."""
    from lightgbm import DaskLGBMClassifier

    return DaskLGBMClassifier(client=client, n_estimators=8, num_leaves=15, verbose=-1).fit(*prepared).n_features_


def times(n: int, random: np.random.Generator) -> np.ndarray:
    """Return seconds of some years."""
    return np.datetime64("2026-01-01", "ns") + random.integers(0, 10**17, n).astype("timedelta64[ns]")


def words(n: int, random: np.random.Generator) -> list[str]:
    """Return texts of ten digits each."""
    return [f"{number:010d}" for number in random.integers(0, 10**10, n).tolist()]


def frame_with_dates(n: int, random: np.random.Generator) -> pd.DataFrame:
    """Return a frame with dates in a column and in its index."""
    columns = {"t": times(n, random), **{name: random.random(n) for name in "abc"}}
    return pd.DataFrame(columns, index=times(n, random))


def arrow_texts(n: int, random: np.random.Generator) -> pd.DataFrame:
    """Return a frame of Arrow's texts."""
    return pd.DataFrame({"s": pd.Series(words(n, random), dtype="string[pyarrow]")})


def forest(n: int, random: np.random.Generator) -> Any:
    """Return a fitted model."""
    from sklearn.ensemble import RandomForestRegressor

    x = random.random((5000, 4))
    return RandomForestRegressor(max(1, n // 75_000), random_state=0).fit(x, x.sum(axis=1) + random.random(5000))


#: Each makes about eight bytes times ``n``.
KINDS: dict[str, Callable[[int, np.random.Generator], Any]] = {
    "array": lambda n, random: random.random(n),
    "bytes": lambda n, random: random.bytes(8 * n),
    "text": lambda n, random: random.bytes(4 * n).hex(),
    # Fewer: Dask serializes each float by itself, 10,000 in a second.
    "list of floats": lambda n, random: random.random(n // 80).tolist(),
    "series with a time zone": lambda n, random: pd.Series(times(n, random)).dt.tz_localize("UTC"),
    "frame with dates": lambda n, random: frame_with_dates(n // 4, random),
    "frame of objects": lambda n, random: pd.DataFrame({"o": pd.Series(words(n // 8, random), dtype=object)}),
    "arrow table": lambda n, random: pa.table({"a": random.random(n // 2), "b": random.random(n // 2)}),
    "frame of arrow texts": lambda n, random: arrow_texts(n // 2, random),
    "random forest": forest,
}


def make(kind: str, size: int, seed: int) -> Any:
    """Make a value of a kind."""
    return KINDS[kind](size // 8, np.random.default_rng(seed))


def hold(value: Any) -> str:
    """Keep a value for half a second."""
    time.sleep(0.5)
    return type(value).__name__


def make_and_hold(client: Client, prepared: tuple[int, str, int]) -> list[str]:
    """Make a value on one worker, and read it on all others."""
    seed, kind, size = prepared
    maker, *readers = workflows.on_all_workers(client, 1)
    value = client.submit(make, kind, size, seed, workers=[maker])
    wait(value)
    return client.gather([client.submit(hold, value, workers=[reader], pure=False) for reader in readers])


TABLE = {"rows": (400_000, 2000), "columns": (50, 8), "chunk": (50_000, 500)}
WORKS = (
    *workflows.WORKS,
    *workloads.WORKS,
    *tax.WORKS,
    work("rechunk", rechunk, workflows.chunks, side=(6144, 1024), rows=(768, 256), columns=(6144, 1024)),
    work("bootstrap", bootstrap, rows_and_samples, size=(500_000_000, 8_000_000), samples=(32, 8)),
    work("xgboost", xgboost, partitions, **TABLE),
    work("lightgbm-training", lightgbm_training, partitions, **TABLE),
    *(work(f"of {kind}", make_and_hold, kind=(kind, kind), size=(64 * MIB, MIB)) for kind in KINDS),
)


def collect(cluster: pairs.Arm) -> None:
    """Collect garbage in the process of the client."""
    gc.collect()


def measured(cluster: pairs.Arm, work: Work, seed: int) -> tuple[Round, Any]:
    """Do a piece of work, and return its figures and its answer."""
    machine.touch_memory()
    before = cluster.processor_time()
    figures, answer = cluster.round(work, seed)
    return {**figures, "cpu": cluster.processor_time() - before}, answer


def peak(arm: str, work: Work, seed: int) -> tuple[Round, Any]:
    """Do a piece of work in a fresh cluster, and return its figures and its answer."""
    with remote(pairs.arm, ARMS[arm]) as cluster:
        before = machine.shared()
        figures, answer = cluster.ask(measured, work, seed)
        cluster.ask(collect)  # joblib keeps what it has scattered in a reference cycle
        time.sleep(IDLE if seed == 1 else 0)
        return {**figures, "idle": machine.shared() - before}, answer


def compared(done: list[Pair]) -> dict[str, Any]:
    """Return the medians, the ratios within rounds, and the shared memory that was left."""
    idle = [one[arm].pop("idle") for one in done for arm in ARMS]
    over = {
        f"{figure}_over_{other}": report.spread(pairs.ratios(done, "plugin", other, figure))
        for figure in ("together", "seconds", "cpu")
        for other in ("stock", "off")
    }
    return {**pairs.medians(done), "idle": idle[list(ARMS).index("plugin")], **over}


def row(name: str, one: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    peaks = [report.mib(one[arm]["together"]["median"]) for arm in ARMS]
    over = [
        f"{one[f'together_over_{other}'][part]:.2f}" for other in ("stock", "off") for part in ("median", "min", "max")
    ]
    ratios = [
        f"{one[f'{figure}_over_{other}']['median']:.2f}" for figure in ("seconds", "cpu") for other in ("stock", "off")
    ]
    return [name, *peaks, *over, *ratios, report.mib(one["idle"])]


def main() -> None:
    """Read the arguments, measure, print."""
    asked, chosen = pairs.arguments(__doc__, WORKS, 5)
    result = report.head(asked, *workloads.PACKAGES, "xgboost", pairs=asked.pairs, summary={})
    rows = []
    for each in chosen:
        one = compared([pairs.both(number, each, peak, tuple(ARMS)) for number in range(asked.pairs)])
        result["summary"][each.name] = one
        rows.append(row(each.name, one))
        print(*rows[-1], sep=", ", file=sys.stderr)
        report.write(asked.json, result)
    over = ["over stock", "least", "most", "over off", "least", "most"]
    ratios = ["time over stock", "over off", "cpu over stock", "over off"]
    report.table(["medians", *(f"{arm}, MiB" for arm in ARMS), *over, *ratios, "idle, MiB"], rows)


if __name__ == "__main__":
    main()
