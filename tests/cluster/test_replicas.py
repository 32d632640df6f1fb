"""Replicas that share memory stay, and a worker's death loses nothing that was shared."""

from __future__ import annotations

import os
import random
import signal
import time
import zlib
from collections.abc import Iterator
from typing import Any

import dask
import numpy as np
import pytest
from clusters import local_cluster
from distributed import Client, wait
from distributed.active_memory_manager import ReduceReplicas
from namespaces import PRIVATE_NODE, can_unshare, root
from observing import MIB, addresses, array, fresh, holders, kept, pids, wait_until
from processes import environment, workers

from dask_shm_plugin import SharedMemoryPlugin, stats

pytestmark = pytest.mark.slow

SIZE = 16 * MIB


@pytest.fixture
def client() -> Iterator[Client]:
    """A client of three workers, with the Active Memory Manager running."""
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 10}),
        local_cluster(3, {"publish": "on-completion"}) as client,
    ):
        client.amm.start()
        yield client


def big(seed: int) -> np.ndarray:
    """Return 16 MiB."""
    return array(seed, SIZE // 8)


def digest(value: np.ndarray) -> int:
    """Read all of an array."""
    return zlib.crc32(value)


def manage(client: Client, rounds: int = 4) -> None:
    """Let the Active Memory Manager run some times, with time for the workers to follow."""
    for _ in range(rounds):
        client.amm.run_once()
        time.sleep(0.2)


def wait_for_holders(client: Client, future: Any, count: int) -> set[str]:
    """Wait until a number of workers hold a value."""
    wait_until(lambda: len(holders(client, future)) == count, lambda: f"{count}: {holders(client, future)}")
    return holders(client, future)


def kill(client: Client, address: str) -> None:
    """Kill a worker, and wait until the scheduler has noticed."""
    os.kill(pids(client)[address], signal.SIGKILL)
    wait_until(lambda: address not in addresses(client), "the scheduler notices the death")


def summary(client: Client) -> dict[str, Any]:
    """Return the entry of `stats` for the only arena."""
    (found,) = stats(client).values()
    return found


def test_a_broadcast_stays_a_broadcast(client: Client) -> None:
    """Its replicas take no memory, so none is dropped; stock Dask leaves one."""
    future = client.scatter(big(fresh()), broadcast=True, hash=False)
    manage(client)
    assert holders(client, future) == set(addresses(client))
    assert all(kept(client, future, address) for address in addresses(client))
    assert summary(client)["free_replicas"] == 2


def test_private_replicas_are_reduced_as_before(client: Client) -> None:
    """Values that are too small for the arena, or that lie outside of it, are copies."""
    small = client.scatter(b"x" * 1000, broadcast=True)
    with workers(client, env=environment({"DASK_SHM__CAPACITY": "0"})) as (outsider,):
        future = client.scatter(big(fresh()), broadcast=True, hash=False)
        wait_until(lambda: manage(client, 1) or outsider not in holders(client, future), "the outsider's copy goes")
        assert len(holders(client, future)) == 3
        wait_until(lambda: manage(client, 1) or len(holders(client, small)) == 1, "one small replica is left")


@root
def test_copies_on_two_nodes_are_reduced_to_those_of_one(client: Client) -> None:
    """Each node has an arena: the replicas of one node go together, and those of the other stay."""
    if not can_unshare():
        pytest.skip("needs namespaces")
    wrapper = ["unshare", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", PRIVATE_NODE, "sh"]
    here = set(addresses(client))
    with workers(client, "--nworkers", "2", count=2, env=environment(), wrapper=wrapper) as there:
        wait_until(lambda: len(stats(client)) == 2, "the other node has an arena")
        future = client.scatter(big(fresh()), broadcast=True, hash=False)
        wait_until(lambda: manage(client, 1) or not holders(client, future) & set(there), "one node's copy goes")
        assert holders(client, future) == here
        read = client.submit(digest, future, workers=there, pure=False)
        assert read.result(timeout=30) == digest(future.result())


@pytest.mark.parametrize("broadcast", [False, True])
def test_a_scattered_value_survives_its_holder(client: Client, *, broadcast: bool) -> None:
    """A second worker holds it soon; killed one after the other, the workers lose nothing."""
    value = big(fresh())
    future = client.scatter(value, broadcast=broadcast, hash=False)
    for deaths in range(1, 4):
        wait_until(lambda: len(holders(client, future)) >= 2, "a second worker holds the value")
        kill(client, min(holders(client, future)))
        np.testing.assert_array_equal(future.result(timeout=30), value)
        assert client.submit(digest, future, pure=False).result(timeout=30) == digest(value)
        wait_until(lambda: len(addresses(client)) == 3, "the nanny restarts the worker")
        assert summary(client)["deaths_absorbed"] == deaths


def test_a_published_result_is_not_computed_again(client: Client) -> None:
    """The task has run once, though the worker that ran it is dead."""
    runs = client.scatter(0)
    del runs
    future = client.submit(noted, big, fresh(), pure=False)
    wait(future)
    first = wait_for_holders(client, future, 2)
    assert run_counts(client) == 1
    kill(client, next(iter(first)))
    assert client.submit(digest, future, pure=False).result(timeout=30)
    # The reader may hold it, too, beside the worker to which the manager gives it.
    wait_until(lambda: len(holders(client, future)) >= 2, "a second worker holds the value")
    assert run_counts(client) == 1


def noted(function: Any, *args: Any) -> Any:
    """Call a function, and tell the scheduler's event log."""
    from distributed import get_worker

    get_worker().log_event("runs", "run")
    return function(*args)


def run_counts(client: Client) -> int:
    """Return how many tasks have told that they ran."""
    return len(client.get_events("runs"))


def test_workers_that_are_killed_in_turn_lose_nothing_that_was_shared(client: Client) -> None:
    """Dask's own events name the values that each removal of a worker has lost."""
    order, seeds = random.Random(3), [fresh() for _ in range(9)]
    futures = [client.submit(big, seed, pure=False) for seed in seeds[:6]]
    futures += [client.scatter(big(seed), hash=False) for seed in seeds[6:]]
    wait(futures)
    for _ in range(4):
        wait_until(lambda: all(len(holders(client, one)) >= 2 for one in futures), "each value has two holders")
        kill(client, order.choice(addresses(client)))
        wait_until(lambda: len(addresses(client)) == 3, "the nanny restarts the worker")
    assert [digest(one.result(timeout=30)) for one in futures] == [digest(big(seed)) for seed in seeds]
    events = [event for _, event in client.get_events("all") if event.get("action") == "remove-worker"]
    lost = {key for event in events for kind in ("computed", "scattered") for key in event[f"lost-{kind}-tasks"]}
    assert len(events) == 4
    assert lost.isdisjoint(one.key for one in futures)


def test_a_released_value_has_no_second_holder(client: Client) -> None:
    """The extra replica goes with the others."""
    future = client.scatter(big(fresh()), hash=False)
    wait_for_holders(client, future, 2)
    del future
    wait_until(lambda: summary(client)["used"] == 0, "the arena is empty")


def test_nothing_is_replicated_while_the_user_has_stopped_the_manager(client: Client) -> None:
    """Replicas are managed by the Active Memory Manager, which can be off."""
    client.amm.stop()
    future = client.scatter(big(fresh()), hash=False)
    time.sleep(1)
    assert len(holders(client, future)) == 1
    client.amm.start()
    wait_for_holders(client, future, 2)


def test_a_retired_worker_takes_nothing_with_it(client: Client) -> None:
    """`retire_workers` moves values that only the retiring workers hold."""
    value = big(fresh())
    future = client.scatter(value, hash=False)
    first = wait_for_holders(client, future, 2)
    client.retire_workers(list(first), close_workers=True, remove=True)
    np.testing.assert_array_equal(future.result(timeout=30), value)
    assert not holders(client, future) & first


class OwnPolicy(ReduceReplicas):
    """A policy of the user."""


def test_policies_of_the_user_are_left_alone() -> None:
    """Only Dask's own policy is replaced, not one that a user has derived from it."""

    def policies(dask_scheduler: Any) -> list[str]:
        return sorted(type(policy).__name__ for policy in dask_scheduler.extensions["amm"].policies)

    def put(dask_scheduler: Any) -> None:
        manager = dask_scheduler.extensions["amm"]
        manager.policies.clear()
        manager.add_policy(OwnPolicy())

    with local_cluster(1, None) as client:
        client.run_on_scheduler(put)
        client.register_plugin(SharedMemoryPlugin())
        assert client.run_on_scheduler(policies) == ["OwnPolicy"]
