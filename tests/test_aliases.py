"""Whoever else reaches a value, and whatever is written that way: readers get what stock Dask would have sent."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from alias_programs import KEEPERS, KINDS, MEMORY, READS, WRITES, Program
from clusters import local_cluster
from distributed import Client
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

#: As many as one has time for: a program takes a third of a second on either cluster.
PROGRAMS = int(os.environ.get("DASK_SHM_TEST_PROGRAMS", "25"))


@pytest.fixture(
    scope="module", params=[1, pytest.param(3, marks=pytest.mark.slow)], ids=["one thread", "three threads"]
)
def both(nothing_leaks: None, request: pytest.FixtureRequest) -> Iterator[tuple[Client, Client]]:
    """A client without the plugin and one with it, of three workers each."""
    with (
        local_cluster(3, options=None, threads_per_worker=request.param) as stock,
        local_cluster(3, threads_per_worker=request.param) as shared,
    ):
        yield stock, shared


def compare(both: tuple[Client, Client], kind: str, memory: str, keeper: str, steps: list[str]) -> None:
    """Run a program on both clusters."""
    stock, shared = (Program(client, kind, memory, keeper).run(steps) for client in both)
    assert shared == stock


def kinds(first: str, *others: str) -> pytest.MarkDecorator:
    """Run a test for each kind of value; for the first also where only quick tests are run."""
    return pytest.mark.parametrize("kind", [first, *(pytest.param(kind, marks=pytest.mark.slow) for kind in others)])


ROUND = ["another worker", "by the keeper"]


@pytest.mark.parametrize("keeper", KEEPERS)
@kinds("array", "frame", "table", "dict", "object")
def test_what_is_written_by_whoever_keeps_a_value_is_read(both: tuple[Client, Client], kind: str, keeper: str) -> None:
    """A view, a cache, a global, an attribute, an actor: three times, by readers on each side."""
    compare(both, kind, "own", keeper, [*ROUND, *ROUND, *ROUND, *READS])


@pytest.mark.parametrize("memory", MEMORY)
@kinds("array", "frame", "table", "sparse", "list", "masked")
def test_memory_that_is_not_the_values_own_is_read_as_it_is(
    both: tuple[Client, Client], kind: str, memory: str
) -> None:
    """A file, a segment of another library, a part of a larger array."""
    compare(both, kind, memory, "a view in a global", [*ROUND, *ROUND, *READS])


@pytest.mark.parametrize("how", ["in the data", "another value", "as an input"])
@kinds("array", "wide frame", "series", "table", "dict")
def test_what_is_written_without_dasks_knowledge_is_read(both: tuple[Client, Client], kind: str, how: str) -> None:
    """Who knows the worker can write to its data."""
    compare(both, kind, "own", "nobody", ["another worker", how, "a third worker", "another worker", how, *READS])


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
