"""A value that a client or a task scatters is written into the arena once, however it is scattered."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from dask.tokenize import tokenize
from describing import assert_descriptions_equal, describe
from distributed import Client, get_client, get_worker, worker_client
from observing import (
    BIG,
    LITTLE,
    Seen,
    addresses,
    array,
    assert_saw,
    fresh,
    holders,
    see,
    see_on,
    stored_type,
    totals,
)

pytestmark = pytest.mark.slow

SCATTERS: dict[str, dict[str, Any]] = {
    "anywhere": {},
    "broadcast": {"broadcast": True},
    "direct": {"direct": True},
    "direct broadcast": {"direct": True, "broadcast": True},
    "without hash": {"hash": False},
}


def test_the_scheduler_is_told_the_true_size(four: Client) -> None:
    """Bytes in the arena count in full: another node has to receive them."""

    def told(key: str, dask_scheduler: Any) -> int:
        return int(dask_scheduler.tasks[key].nbytes)

    shared, own = 8 * BIG, 16 * BIG  # bytes
    (future,) = four.scatter([[array(fresh(), BIG), "t" * own]])
    nbytes = four.run_on_scheduler(told, future.key)
    assert own + shared <= nbytes < 1.1 * (own + shared)


def test_a_broadcast_is_written_once_and_mapped_by_every_worker(four: Client) -> None:
    """One publication serves four workers, and no bytes are sent."""
    seed = fresh()
    before = totals(four)
    future = four.scatter(array(seed), broadcast=True)
    assert holders(four, future) == set(addresses(four))
    for seen in see_on(four, future, addresses(four)):
        assert_saw(seen, array(seed))
    grown = totals(four) - before
    assert (grown.published, grown.sent) == (1, 0)
    assert BIG * 8 <= grown.used < 1.1 * BIG * 8
    assert grown.attached >= 4


def list_nothing(dask_worker: Any) -> None:
    """Prevent a worker from listing scattered values."""
    publisher = dask_worker.plugins["dask-shm"].half._running.publisher
    publisher.offer = lambda *args, **kwargs: publisher._soon(asyncio.sleep(3600))


def list_again(dask_worker: Any) -> None:
    """Undo :func:`list_nothing`."""
    publisher = dask_worker.plugins["dask-shm"].half._running.publisher
    del publisher.offer
    for task in publisher._background:
        task.cancel()


def test_a_broadcast_does_not_wait_for_a_missing_listing(four: Client) -> None:
    """A worker that finds no listing requests the value."""
    seed = fresh()
    four.run(list_nothing)
    try:
        future = four.scatter(array(seed), broadcast=True)
        assert holders(four, future) == set(addresses(four))
        for seen in see_on(four, future, addresses(four)):
            assert_saw(seen, array(seed))
    finally:
        four.run(list_again)


@pytest.mark.parametrize("options", SCATTERS.values(), ids=SCATTERS)
def test_a_scattered_array_lies_in_the_arena_on_each_of_its_workers(four: Client, options: dict[str, Any]) -> None:
    """However it is scattered, the value is right, mapped and writeable on each worker that gets it."""
    seed = fresh()
    before = totals(four)
    future = four.scatter(array(seed), **options)
    arrived = sorted(holders(four, future))
    assert len(arrived) == (4 if "broadcast" in options else 1)
    for seen in see_on(four, future, arrived):
        assert_saw(seen, array(seed))
    assert (totals(four) - before).sent == 0


@pytest.mark.parametrize("options", SCATTERS.values(), ids=SCATTERS)
def test_a_dict_of_large_and_small_values_is_scattered_value_by_value(four: Client, options: dict[str, Any]) -> None:
    """Large values are mapped, small ones arrive as usual, each under its own key."""
    seed = fresh()
    values = {f"big {seed}": array(seed), f"little {seed}": array(seed, LITTLE), f"text {seed}": "text"}
    futures = four.scatter(values, **options)
    assert list(futures) == list(values)
    for key, future in futures.items():
        assert future.key == key
        for seen in see_on(four, future, holders(four, future)):
            assert_descriptions_equal(seen.description, describe(values[key]))
            assert seen.shared == key.startswith("big")


@pytest.mark.parametrize("options", SCATTERS.values(), ids=SCATTERS)
@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_large_and_small_values_keeps_its_order(four: Client, kind: type, options: dict[str, Any]) -> None:
    """Each element becomes one future, at the same place of the same type of list."""
    seed = fresh()
    values = [array(seed), seed, array(seed, LITTLE), {"inside": array(2 * seed)}, array(3 * seed)]
    futures = four.scatter(kind(values), **options)
    assert type(futures) is kind
    for value, future in zip(values, futures, strict=True):
        for seen in see_on(four, future, holders(four, future)):
            assert_descriptions_equal(seen.description, describe(value))


def test_key_and_type_of_a_scattered_value_are_those_of_the_value(four: Client) -> None:
    """Dask names and types the user's value, and not the handle that travels in its place."""
    seed = fresh()
    future = four.scatter(array(seed))
    assert future.key == f"ndarray-{tokenize(array(seed))}"
    assert future.type is np.ndarray
    assert four.scatter(array(seed)).key == future.key


@pytest.mark.parametrize("options", SCATTERS.values(), ids=SCATTERS)
def test_workers_store_values_and_not_handles(four: Client, options: dict[str, Any]) -> None:
    """The worker's data holds the value itself at once, before any task needs it."""
    seed = fresh()
    future = four.scatter(array(seed), **options)
    kept = four.run(stored_type, future.key, workers=list(holders(four, future)))
    assert set(kept.values()) == {"ndarray"}


def scatter_inside(seed: int, other: str, broadcast: bool, secede: bool) -> tuple[Seen, str]:
    """Scatter from inside a task; let another worker look at the value, and return the type that is stored here."""
    with worker_client() if secede else nullcontext(get_client()) as client:
        future = client.scatter(array(seed), broadcast=broadcast)
        seen = client.submit(see, future, workers=[other], pure=False).result()
        return seen, stored_type(future.key, get_worker())


@pytest.mark.parametrize("broadcast", [False, True], ids=["one", "broadcast"])
@pytest.mark.parametrize("secede", [False, True], ids=["get_client", "worker_client"])
def test_a_task_scatters_as_a_client_does(four: Client, secede: bool, broadcast: bool) -> None:
    """The scattered value reaches another worker through the arena."""
    a, b, *_ = addresses(four)
    seed = fresh()
    seen, kept = four.submit(scatter_inside, seed, b, broadcast, secede, workers=[a]).result()
    assert_saw(seen, array(seed))
    assert kept == "ndarray"
