"""Samples of matrices that take longer than the rest of the tests together."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def sample(cells: Iterable[T], every: int) -> list[T]:
    """Return one of so many cells, from the first on; all of them where ``DASK_SHM_TEST_ALL`` is set."""
    return list(cells)[:: 1 if os.environ.get("DASK_SHM_TEST_ALL") else every]
