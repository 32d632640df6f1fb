"""A worker gives up its private copy of a value only for a shared one that no code can tell from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from dask_shm_plugin.values.adoption import may_adopt

ARRAY = np.arange(1000.0)
NAN = float("nan")


@pytest.mark.parametrize(
    "value",
    [ARRAY, [ARRAY, 1, "x"], {("a", 1): ARRAY}, pd.DataFrame({"a": ARRAY})],
    ids=["array", "list", "dict of tuples", "frame"],
)
def test_a_value_that_is_rebuilt_exactly_may_be_adopted(value: Any) -> None:
    """Code that has a reference to the worker's value finds the same content afterwards."""
    assert may_adopt(value)


@pytest.mark.parametrize(
    "value",
    [
        [ARRAY, NAN],
        [ARRAY, (1, NAN)],
        {(0, NAN): ARRAY},
        {NAN: ARRAY},
        [ARRAY, ARRAY],
        np.array([1, "x"], dtype=object),
        (1, 2.0),
    ],
    ids=["NaN", "NaN in a tuple", "NaN in a tuple as a key", "NaN as a key", "the same twice", "objects", "immutable"],
)
def test_a_value_whose_copy_could_be_told_apart_may_not_be_adopted(value: Any) -> None:
    """For example, a container finds a NaN by its identity, which a copy does not have."""
    assert not may_adopt(value)
