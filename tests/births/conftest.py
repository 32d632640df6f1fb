"""Fixtures for tests of arrays that are born in an arena; they need no Dask cluster."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from arena_fixtures import *  # noqa: F403 - pytest looks for fixtures here
from births import MIB, births

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.births.nursery import Nursery


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Create an arena of 64 MiB, and validate its table after the test."""
    one = Arena.create(64 * MIB, warm=MIB)
    yield one
    gc.collect()
    if not one.has_left:
        one.validate()
    one.close()


@pytest.fixture
def nursery(arena: Arena) -> Iterator[Nursery]:
    """Let arrays be born in the arena; all chunks are given back after the test."""
    with births(arena) as one:
        yield one
        gc.collect()
