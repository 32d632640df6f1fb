"""A collection of very many small items is told from others before it is serialized."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dask_shm_plugin.values.codec import is_of_small_items

RECURSIVE: list[Any] = [1]
RECURSIVE.append(RECURSIVE)


@pytest.mark.parametrize(
    "value",
    [[1.0] * 2000, tuple(range(2000)), set(range(2000)), dict.fromkeys(range(2000)), [[1.0] * 600] * 3],
    ids=["list", "tuple", "set", "dict", "nested"],
)
def test_many_small_items_are_recognised(value: Any) -> None:
    """Dask would make a frame and a header for each item."""
    assert is_of_small_items(value, 64 << 10)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (np.ones(100_000), 800_000),
        ([1.0] * 1000, 64 << 10),
        ([np.ones(10_000)] * 2000, 2000 * 80_000),
        ("x" * 100_000, 100_000),
    ],
    ids=["array", "few", "large items", "text"],
)
def test_other_values_are_not(value: Any, size: int) -> None:
    """They may be shared."""
    assert not is_of_small_items(value, size)


def test_a_collection_that_contains_itself_ends_the_search() -> None:
    """Dask raises its own error for it."""
    assert is_of_small_items(RECURSIVE, 1 << 10)
