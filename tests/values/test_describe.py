"""A value is described by its type and shape, and no code of a user's class runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sparse

from dask_shm_plugin.values.describe import describe


class Odd:
    """A class whose every attribute fails."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __len__(self) -> int:
        raise RuntimeError("len")


@pytest.mark.parametrize(
    ("value", "type_", "shape"),
    [
        (np.zeros((3, 4000), np.int8), "numpy.ndarray", "3 × 4,000 int8"),
        (np.array(1.0), "numpy.ndarray", "scalar float64"),
        (pd.DataFrame({"a": range(2000), "b": 1}), "pandas.DataFrame", "2,000 rows × 2 columns"),
        (pd.Series(range(3)), "pandas.Series", "3 rows"),
        (pa.table({"a": [1, 2]}), "pyarrow.Table", "2 rows × 1 columns"),
        (sparse.csr_matrix(np.eye(3)), "scipy.csr_matrix", "3 × 3 float64, 3 stored"),
        ([1, 2], "list", "2 items"),
        (b"abc", "bytes", "3 items"),
        (Odd(), "test_describe.Odd", ""),
        (None, "NoneType", ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_is_described(value: object, type_: str, shape: str) -> None:
    """Arrays have a shape and a dtype, tables have rows and columns, and containers have items."""
    assert describe(value) == (type_, shape)
