"""Programs reach a value by other ways than its key: readers get the bytes that stock Dask would send."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from alias_programs import KEEPERS, KINDS, MEMORY, READS, WRITES, Program
from clusters import local_cluster
from distributed import Client
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

#: The number of random programs; each takes a third of a second on each of the two clusters.
PROGRAMS = int(os.environ.get("DASK_SHM_TEST_PROGRAMS", "25"))


@pytest.fixture(
    scope="module",
    params=[1, pytest.param(3, marks=[pytest.mark.slow, pytest.mark.long])],
    ids=["one thread", "three threads"],
)
def both(nothing_leaks: None, request: pytest.FixtureRequest) -> Iterator[tuple[Client, Client]]:
    """A client without the plugin and one with it, of three workers each."""
    with (
        local_cluster(3, options=None, threads_per_worker=request.param) as stock,
        local_cluster(3, threads_per_worker=request.param) as shared,
    ):
        yield stock, shared


def compare(both: tuple[Client, Client], kind: str, memory: str, keeper: str, steps: list[str]) -> None:
    """Run a program on both clusters, and fail unless it reads the same on both."""
    stock, shared = (Program(client, kind, memory, keeper).run(steps) for client in both)
    assert shared == stock


def kinds(first: str, *others: str) -> pytest.MarkDecorator:
    """Run a test for each kind of value; for all kinds but the first, it is a slow test."""
    return pytest.mark.parametrize("kind", [first, *(pytest.param(kind, marks=pytest.mark.slow) for kind in others)])


ROUND = ["another worker", "by the keeper"]


@pytest.mark.parametrize("keeper", KEEPERS)
@kinds("array", "frame", "table", "dict", "object")
def test_writes_through_an_alias_are_read_as_on_stock_dask(both: tuple[Client, Client], kind: str, keeper: str) -> None:
    """An alias writes three times: a view, a cache, a global, an attribute or an actor. All readers see each write."""
    compare(both, kind, "own", keeper, [*ROUND, *ROUND, *ROUND, *READS])


@pytest.mark.parametrize("memory", MEMORY)
@kinds("array", "frame", "table", "sparse", "list", "masked")
def test_writes_to_memory_that_a_value_does_not_own_are_read(
    both: tuple[Client, Client], kind: str, memory: str
) -> None:
    """Readers see each write to a file, to a segment of another library, and to a part of a larger array."""
    compare(both, kind, memory, "a view in a global", [*ROUND, *ROUND, *READS])


@pytest.mark.parametrize("how", ["in the data", "another value", "as an input"])
@kinds("array", "wide frame", "series", "table", "dict")
def test_writes_that_dask_does_not_notice_are_read(both: tuple[Client, Client], kind: str, how: str) -> None:
    """A user may write to the data of a worker, and a task to its input: later readers see the write."""
    compare(both, kind, "own", "nobody", ["another worker", how, "a third worker", "another worker", how, *READS])


# Hypothesis derives its seed from the source of this test and its docstring: an edit of either gives other programs.
@pytest.mark.slow
@pytest.mark.timeout(0)
@settings(
    max_examples=PROGRAMS,
    deadline=None,
    derandomize=PROGRAMS <= 25,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(
    kind=st.sampled_from(list(KINDS)),
    memory=st.sampled_from(list(MEMORY)),
    keeper=st.sampled_from(KEEPERS),
    steps=st.lists(st.sampled_from([*READS, *WRITES, "by the keeper"]), min_size=3, max_size=12),
)
def test_random_programs_read_what_they_read_on_stock_dask(
    both: tuple[Client, Client], kind: str, memory: str, keeper: str, steps: list[str]
) -> None:
    """Makers, ways to the memory, writers and readers in any order."""
    compare(both, kind, memory, keeper, [*steps, "another worker", "client"])
