"""A broadcast reaches the requested number of workers, and the scheduler knows each copy."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from distributed import Client
from observing import addresses, array, assert_saw, fresh, holders, see_on, wait_until

from dask_shm_plugin.transfer import scatter

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("n", [1, 2, 4, 9])
def test_a_broadcast_reaches_the_requested_number_of_workers(four: Client, n: int) -> None:
    """`broadcast` may be a number of workers; a number above that of all workers means all of them."""
    seed = fresh()
    future = four.scatter(array(seed), broadcast=n)
    assert len(holders(four, future)) == min(n, 4)
    for seen in see_on(four, future, sorted(holders(four, future))):
        assert_saw(seen, array(seed))


def test_a_released_broadcast_leaves_all_workers(four: Client) -> None:
    """The scheduler must know each copy: a copy that it does not know would stay for ever."""
    future = four.scatter(array(fresh()), broadcast=True)
    key = future.key

    def holds(dask_worker: Any) -> bool:
        return key in dask_worker.data

    assert all(four.run(holds).values())
    del future
    wait_until(lambda: not any(four.run(holds).values()), "no worker holds the key")


def test_a_scatter_does_not_wait_for_a_replication_that_hangs(four: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replication hangs if a worker dies: the scatter returns, and a worker that needs the value maps it later."""

    async def hang(**_: Any) -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr(scatter, "_REPLICATE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(four.scheduler, "replicate", hang, raising=False)
    seed = fresh()
    future = four.scatter(array(seed), broadcast=True)
    assert len(holders(four, future)) == 1
    for seen in see_on(four, future, addresses(four)):
        assert_saw(seen, array(seed))
