"""Samples of test matrices that would take longer than all other tests together."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def sample(cells: Iterable[T], every: int) -> list[T]:
    """Return the first of every ``every`` cells, or all cells if ``DASK_SHM_TEST_ALL`` is set."""
    return list(cells)[:: 1 if os.environ.get("DASK_SHM_TEST_ALL") else every]
