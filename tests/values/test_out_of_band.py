"""Looking at a value that is about to be serialized changes nothing in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dask_shm_plugin.values.describe import describe
from dask_shm_plugin.values.out_of_band import keep_out_of_band

ROWS = 10_000
VALUES: dict[str, Callable[[], Any]] = {
    "Series": lambda: pd.Series(np.arange(ROWS)),
    "DataFrame": lambda: pd.DataFrame({"x": np.arange(ROWS)}),
    "DataFrame with dates": lambda: pd.DataFrame({"x": np.arange(ROWS).view("M8[ns]")}),
    "RangeIndex": lambda: pd.RangeIndex(ROWS),
    "MultiIndex": lambda: pd.MultiIndex(levels=[pd.RangeIndex(ROWS)], codes=[np.arange(ROWS)]),
}


@pytest.mark.parametrize("is_mapped", [False, True])
@pytest.mark.parametrize("name", VALUES)
def test_no_array_is_made_for_a_range(name: str, is_mapped: bool) -> None:
    """Pandas would keep it: 8 bytes for each row, which a worker of stock Dask does not have."""
    value = VALUES[name]()
    before = _arrays_in_cache(value)
    keep_out_of_band(value, lambda address, length: is_mapped)
    describe(value)
    assert _arrays_in_cache(value) == before


def _arrays_in_cache(value: Any) -> set[str]:
    index = getattr(value, "index", value)
    cache = index.levels[0]._cache if isinstance(index, pd.MultiIndex) else index._cache
    return {name for name, made in cache.items() if isinstance(made, np.ndarray)}
