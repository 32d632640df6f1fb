"""A broadcast goes from the client to each worker at once; who cannot be given it so, gets it as Dask would give it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from describing import assert_same
from distributed import Client
from observing import BIG, addresses, array, assert_saw, fresh, holders, see_on, totals, wait_until


def refuse(dask_worker: Any, *, once: bool) -> None:
    """Let a worker raise for the next scatter that it receives, or for all until :func:`accept`."""
    handlers = dask_worker.handlers
    dask_worker._accepting = handlers["update_data"]

    async def update_data(*args: Any, **kwargs: Any) -> Any:
        if once:
            accept(dask_worker)
        raise RuntimeError("not now")

    handlers["update_data"] = update_data


def accept(dask_worker: Any) -> None:
    """Undo :func:`refuse`."""
    dask_worker.handlers["update_data"] = dask_worker._accepting


def scattered(client: Client) -> int:
    """Return how many scatters the scheduler has carried out itself."""
    return sum(event["action"] == "scatter" for _, event in client.get_events("all") if "action" in event)


@contextmanager
def behind_a_wall(client: Client) -> Iterator[list[str]]:
    """Let this client reach no worker, and collect which it has tried to reach."""
    rpc, tried = client.rpc, []

    class Wall:
        def __init__(self, address: str) -> None:
            tried.append(address)

        async def update_data(self, data: Any) -> Any:
            raise OSError("no route to host")

        async def close_rpc(self) -> None:
            pass

    class Rpc:
        def __getattr__(self, name: str) -> Any:
            return getattr(rpc, name)

        def __call__(self, address: str) -> Any:
            return Wall(address)

    client.rpc = Rpc()
    try:
        yield tried
    finally:
        client.rpc = rpc


def test_a_broadcast_does_not_pass_through_the_scheduler(four: Client) -> None:
    """Nor from worker to worker; the scheduler learns who has it."""
    before, seed = scattered(four), fresh()
    future = four.scatter(array(seed), broadcast=True)
    assert scattered(four) == before
    assert holders(four, future) == set(addresses(four))
    assert_same(future.result(), array(seed))


@pytest.mark.parametrize("refusing", [1, 3, 4])
def test_workers_that_refuse_get_it_in_another_way(four: Client, refusing: int) -> None:
    """All have it in the end, and it is right."""
    some, seed = addresses(four)[:refusing], fresh()
    four.run(refuse, workers=some, once=True)
    future = four.scatter(array(seed), broadcast=True)
    assert holders(four, future) == set(addresses(four))
    for seen in see_on(four, future, addresses(four)):
        assert_saw(seen, array(seed))


def test_workers_that_go_on_refusing_raise_what_dask_would_raise(four: Client) -> None:
    """Handles, directly and through the scheduler, and then bytes: none of it hides the worker's own error."""
    four.run(refuse, once=False)
    with pytest.raises(Exception, match="not now"):
        four.scatter(array(fresh()), broadcast=True)
    four.run(accept)
    future = four.scatter(np.zeros(BIG), broadcast=True)
    assert holders(four, future) == set(addresses(four))


def test_a_client_that_reaches_no_worker_goes_through_the_scheduler(four: Client) -> None:
    """It tries once, and then never again."""
    with behind_a_wall(four) as tried:
        for _ in range(2):
            seed, before = fresh(), totals(four)
            future = four.scatter(array(seed), broadcast=True)
            for seen in see_on(four, future, addresses(four)):
                assert_saw(seen, array(seed))
            assert (totals(four) - before).sent == 0
        assert 1 <= len(tried) <= 4


@pytest.mark.parametrize("n", [1, 2, 4, 9])
def test_as_many_workers_get_it_as_are_asked_for(four: Client, n: int) -> None:
    """Dask takes a number, too; more than there are is all."""
    seed = fresh()
    future = four.scatter(array(seed), broadcast=n)
    assert len(holders(four, future)) == min(n, 4)
    for seen in see_on(four, future, sorted(holders(four, future))):
        assert_saw(seen, array(seed))


def test_what_is_released_while_all_have_it_is_gone_everywhere(four: Client) -> None:
    """The scheduler knows of each copy, or one would stay for ever."""
    future = four.scatter(array(fresh()), broadcast=True)
    key = future.key

    def holds(dask_worker: Any) -> bool:
        return key in dask_worker.data

    assert all(four.run(holds).values())
    del future
    wait_until(lambda: not any(four.run(holds).values()), "nobody has it any more")
