"""A broadcast reaches as many workers as it shall, and the scheduler knows of each."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from distributed import Client
from observing import addresses, array, assert_saw, fresh, holders, see_on, wait_until

from dask_shm_plugin import handover


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


def test_a_replication_that_never_ends_keeps_no_scatter_waiting(four: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a worker dies meanwhile. Whoever needs the value maps it from where it is."""

    async def wait_for_the_dead(**_: Any) -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr(handover, "_PATIENCE", 0.1)
    monkeypatch.setattr(four.scheduler, "replicate", wait_for_the_dead, raising=False)
    seed = fresh()
    future = four.scatter(array(seed), broadcast=True)
    assert len(holders(four, future)) == 1
    for seen in see_on(four, future, addresses(four)):
        assert_saw(seen, array(seed))
