"""Shared bytes count once in Dask's decisions: no worker is paused, spilled or killed for its neighbours."""

from __future__ import annotations

import itertools
import operator
import os
import time
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import dask
import numpy as np
import pytest
from clusters import local_cluster
from describing import assert_same
from distributed import Client, Future, KilledWorker, wait
from observing import (
    MIB,
    addresses,
    array,
    drop_replica,
    fresh,
    holders,
    pids,
    shared_memory,
    totals,
    undisturbed,
    unshared,
    wait_until,
)
from processes import environment, scheduler, workers

from dask_shm_plugin import unregister

pytestmark = pytest.mark.slow

#: The memory limit of a worker, and the doubles of an array that is larger.
LIMIT = "800 MB"
LARGER_THAN_LIMIT = 110 << 20

#: The arena has room for an array that is larger than the limit of a worker.
OPTIONS = {"threshold": "64 KiB", "capacity": "2 GiB"}

#: The doubles of an array; fourteen such arrays fit into the target of a worker.
PART = 4 << 20


@pytest.fixture
def small() -> Iterator[Client]:
    """A client of four workers with little memory."""
    with local_cluster(4, OPTIONS, memory_limit=LIMIT) as client:
        yield client


@pytest.fixture
def two() -> Iterator[Client]:
    """A client of two workers with little memory."""
    with local_cluster(2, OPTIONS, memory_limit=LIMIT) as client:
        yield client


def look(client: Client, future: Future) -> list[float]:
    """Let every worker read every page of a value."""
    tasks = [client.submit(sample, future, workers=[address], pure=False) for address in addresses(client)]
    return client.gather(tasks)


def sample(value: np.ndarray) -> float:
    return float(value[::512].sum())


def reported(client: Client) -> dict[str, int]:
    """Return the memory that each worker reports."""
    return client.run(lambda dask_worker: dask_worker.monitor.get_process_memory())


def anonymous(client: Client) -> dict[str, int]:
    """Return the part of each worker's memory that is certainly its own."""
    return client.run(own_memory)


def own_memory() -> int:
    """Return the bytes of anonymous memory and of mapped files of this process."""
    with open("/proc/self/status") as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.startswith(("RssAnon", "RssFile")))


def trouble(client: Client) -> list[str]:
    """Return the workers' log messages about memory, and the workers that are not running or have spilled."""
    logs = itertools.chain(*client.get_worker_logs().values(), *client.get_worker_logs(nanny=True).values())
    said = [text for level, text in logs if "memory" in text and level != "INFO"]
    states = client.run(lambda dask_worker: (dask_worker.status.name, len(dask_worker.data.slow)))
    return said + [f"{address} {state}" for address, state in states.items() if state != ("running", 0)]


def let_monitors_run(client: Client) -> None:
    """Wait for some rounds of the memory monitors (every 0.1 s) and of the other meters (every second)."""
    time.sleep(1.3)


# ---------------------------------------------------------------------------------------------- the reported memory


def test_the_reported_memory_adds_up_to_the_memory_in_use(two: Client) -> None:
    """The workers report their private memory and, together, one copy of the value; written pages are private."""

    def excess() -> float:
        return sum(reported(two).values()) - sum(anonymous(two).values()) - expected

    expected, everybody = 0, [os.getpid(), *pids(two).values()]
    assert abs(undisturbed(excess, lambda n: abs(n) < 4 * MIB)) < 4 * MIB
    # Even twice the value, as after the writes, fits below the target: nothing is spilled during the measurement.
    future = two.scatter(array(fresh(), 4 * PART), broadcast=True)
    look(two, future)
    expected = shared_memory(everybody)
    assert expected > 0.95 * 4 * PART * 8
    assert abs(undisturbed(excess, lambda n: abs(n) < 8 * MIB)) < 16 * MIB
    a, b = addresses(two)
    drop_replica(two, future, b)
    assert abs(undisturbed(excess, lambda n: abs(n) < 8 * MIB)) < 16 * MIB
    dirty = two.submit(dirtied, future, workers=[a])
    growth = two.submit(operator.itemgetter(1), dirty)
    assert growth.result() > 0.95 * 4 * PART * 8
    assert reported(two)[a] - anonymous(two)[a] <= expected + 16 * MIB


def test_managed_memory_counts_a_shared_value_once(two: Client) -> None:
    """The scheduler compares workers by it; nothing is shown as spilled, and a value with one holder counts in full."""
    size = 8 * PART
    future = two.scatter(array(fresh(), PART), broadcast=True)
    look(two, future)

    def is_told(*parts: float) -> bool:
        *found, spilled = two.run_on_scheduler(managed)
        return not spilled and found == pytest.approx([part * size for part in parts], abs=MIB)

    a, b = addresses(two)
    wait_until(lambda: is_told(1 / 2, 1 / 2), "each worker has half of the value")
    half = two.submit(operator.itemgetter(slice(0, PART // 2)), future, workers=[a])
    wait(half)
    wait_until(lambda: is_told(1 / 2, 1 / 2), "a view of the value is no further memory")
    del half
    drop_replica(two, future, b)
    wait_until(lambda: is_told(1, 0), "the last holder has all of it")
    unregister(two)
    wait_until(lambda: is_told(1, 0), "as stock Dask says")


def managed(dask_scheduler: Any) -> list[int]:
    """Return the managed memory of each worker by name, and the bytes that the scheduler shows as spilled."""
    workers = sorted(dask_scheduler.workers.values(), key=lambda ws: ws.name)
    return [ws.memory.managed for ws in workers] + [dask_scheduler.memory.spilled]


def dirtied(value: np.ndarray) -> tuple[np.ndarray, int]:
    """Write to every page of a copy-on-write view, and return it with the private memory that this took."""
    before = own_memory()
    value[::512] += 1
    return value, own_memory() - before


def test_shared_memory_of_the_user_is_reported(two: Client) -> None:
    """Shared memory outside of the arena counts as the worker's own, as without the plugin."""
    a, b = addresses(two)
    future = two.scatter(array(fresh(), PART), broadcast=True)
    look(two, future)
    before = reported(two)
    two.run(keep_shared_memory, 100 * MIB, workers=[a])
    wait_until(lambda: reported(two)[a] - before[a] > 95 * MIB, "the user's shared memory is reported")
    assert reported(two)[a] - before[a] < 120 * MIB
    assert reported(two)[b] - before[b] < 10 * MIB
    two.run(drop_shared_memory, workers=[a])
    wait_until(lambda: reported(two)[a] - before[a] < 10 * MIB, "the user's shared memory is freed")


def keep_shared_memory(size: int, dask_worker: Any) -> None:
    """Make and fill shared memory that has nothing to do with the plugin."""
    memory = SharedMemory(create=True, size=size)
    memory.buf[:] = b"x" * size
    dask_worker.users_own = memory


def drop_shared_memory(dask_worker: Any) -> None:
    """Undo :func:`keep_shared_memory`."""
    dask_worker.users_own.close()
    dask_worker.users_own.unlink()
    del dask_worker.users_own


# --------------------------------------------------------------------------------------- pausing and terminating


def test_a_broadcast_larger_than_the_limit_of_a_worker_runs_everywhere(small: Client) -> None:
    """No worker refuses, pauses, spills or dies, and the reports add up to about one array."""
    look(small, small.scatter(array(fresh(), PART), broadcast=True))
    before, processes = sum(reported(small).values()), pids(small)
    seed = fresh()
    future = small.scatter(array(seed, LARGER_THAN_LIMIT), broadcast=True)
    expected = sample(array(seed, LARGER_THAN_LIMIT))
    for _ in range(3):
        np.testing.assert_allclose(look(small, future), expected)
    added = sum(reported(small).values()) - before
    assert 0.9 < added / (8 * LARGER_THAN_LIMIT) < 1.25
    let_monitors_run(small)
    assert trouble(small) == []
    # As the Active Memory Manager does, drop all replicas but one.
    _, *others = addresses(small)
    for other in others:
        drop_replica(small, future, other)
    let_monitors_run(small)
    assert trouble(small) == []
    np.testing.assert_allclose(look(small, future), expected)
    assert trouble(small) == []
    assert pids(small) == processes
    assert totals(small).sent == 0


def test_the_last_holder_of_a_large_value_is_neither_paused_nor_killed(small: Client) -> None:
    """A value close to the limit may be left on one worker because its neighbours have dropped their replicas."""
    seed, size = fresh(), 90 << 20
    future = small.scatter(array(seed, size), broadcast=True)
    look(small, future)
    processes = pids(small)
    *others, last = addresses(small)
    for other in others:
        drop_replica(small, future, other)
    let_monitors_run(small)
    assert pids(small) == processes
    assert not [text for text in trouble(small) if "aus" in text or "Restart" in text]
    assert holders(small, future) == {last}
    np.testing.assert_allclose(look(small, future), sample(array(seed, size)))


def test_a_worker_with_too_much_private_memory_is_terminated() -> None:
    """Its nanny acts as without the plugin, although the worker holds shared values as well."""
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        local_cluster(2, OPTIONS, memory_limit=LIMIT) as client,
    ):
        a, _ = addresses(client)
        shared = client.scatter(array(fresh(), PART), broadcast=True)
        greedy = client.submit(hoard, shared, workers=[a])
        with pytest.raises(KilledWorker):
            greedy.result(timeout=60)


def hoard(value: np.ndarray) -> None:
    """Take more memory than the limit allows, and keep it."""
    kept = []
    for _ in range(120):
        kept.append(np.ones(2 << 20))
        time.sleep(0.02)
    time.sleep(60)


def test_a_worker_with_much_private_memory_is_paused_until_it_is_freed() -> None:
    """As without the plugin, it runs again as soon as the memory is freed."""
    with local_cluster(1, OPTIONS, memory_limit=LIMIT) as client:
        (a,) = addresses(client)
        shared = client.scatter(array(fresh(), PART), broadcast=True)
        look(client, shared)
        client.run(keep_private_memory, int(0.87 * 800e6) - anonymous(client)[a])
        wait_until(lambda: state_of(client, a) == "paused", "the worker is paused")
        client.run(drop_private_memory)
        wait_until(lambda: state_of(client, a) == "running", "the worker goes on")


def state_of(client: Client, address: str) -> str:
    """Return a worker's state."""
    return client.run(lambda dask_worker: dask_worker.status.name)[address]


def keep_private_memory(size: int, dask_worker: Any) -> None:
    """Take memory that spilling cannot free."""
    dask_worker.users_own = np.ones(size // 8)


def drop_private_memory(dask_worker: Any) -> None:
    """Undo :func:`keep_private_memory`."""
    del dask_worker.users_own


# --------------------------------------------------------------------------------------------------------- spilling


def where(client: Client, address: str) -> tuple[set[str], set[str]]:
    """Return the keys that a worker holds in memory and on disk."""
    return client.run(lambda dask_worker: (set(dask_worker.data.fast), set(dask_worker.data.slow)), workers=[address])[
        address
    ]


def test_a_value_that_other_workers_hold_is_not_spilled(two: Client) -> None:
    """Spilling it would free nothing: a private value is spilled instead, although it is younger."""
    a, _ = addresses(two)
    shared = two.scatter(array(fresh(), 12 * PART), broadcast=True)
    look(two, shared)
    private = [two.submit(array, fresh(), PART, workers=[a], pure=False) for _ in range(24)]
    wait(private)
    in_memory, on_disk = where(two, a)
    assert shared.key in in_memory
    assert on_disk
    assert on_disk <= {future.key for future in private}
    weights = two.run(lambda dask_worker: dict(dask_worker.data.fast.weights), workers=[a])[a]
    assert weights[shared.key] == 0


def test_a_shared_value_with_one_holder_is_spilled_and_its_block_is_freed(two: Client) -> None:
    """A shared value with one holder has its full weight, like any value, and is right when it is read back."""
    a, b = addresses(two)
    seed = fresh()
    shared = two.scatter(array(seed, PART), broadcast=True)
    look(two, shared)
    drop_replica(two, shared, b)
    assert totals(two).used >= 8 * PART
    private = [two.submit(array, fresh(), PART, workers=[a], pure=False) for _ in range(24)]
    wait(private)
    wait_until(lambda: shared.key in where(two, a)[1], "the oldest value is spilled")
    wait_until(lambda: totals(two).used == unshared(two), "its block is freed")
    del private
    assert_same(two.gather(shared), array(seed, PART))


@pytest.mark.parametrize("publish", ["on-request", pytest.param("on-completion", marks=pytest.mark.long)])
def test_results_of_several_times_the_limit_finish_by_spilling(publish: str) -> None:
    """As on stock Dask, all values are right, and no worker dies."""
    with local_cluster(2, OPTIONS | {"publish": publish}, memory_limit=LIMIT) as client:
        processes = pids(client)
        seeds = [fresh() for _ in range(48)]
        made = [client.submit(array, seed, PART) for seed in seeds]
        wait(made)
        turned = [client.submit(np.negative, future) for future in made]
        sums = client.gather([client.submit(sample, future) for future in turned])
        np.testing.assert_allclose(sums, [-sample(array(seed, PART)) for seed in seeds])
        assert any(where(client, address)[1] for address in addresses(client))
        assert pids(client) == processes


def test_meters_stats_and_unregister_leave_spilled_values_on_disk(two: Client) -> None:
    """A look at a spilled value must not read it back into memory, which is short."""
    from dask_shm_plugin import unregister

    a, _ = addresses(two)
    made = [two.submit(array, fresh(), PART, workers=[a], pure=False) for _ in range(24)]
    wait(made)

    def is_done() -> bool:
        before = where(two, a)
        let_monitors_run(two)
        return bool(before[1]) and where(two, a) == before

    wait_until(is_done, "no more values are spilled", seconds=60)
    before = where(two, a)
    totals(two)
    let_monitors_run(two)
    assert where(two, a) == before
    unregister(two)
    assert where(two, a) == before


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"target": False}, {}),
        ({"spill": False}, {}),
        ({"pause": False}, {}),
        ({"target": False, "spill": False, "pause": False, "terminate": False}, {}),
        ({}, {"data": dict}),
        ({}, {"memory_limit": "0"}),
    ],
    ids=str,
)
def test_other_settings_of_the_memory_monitor_work(settings: dict[str, bool], arguments: dict[str, Any]) -> None:
    """With parts of the monitor switched off, values are shared and reported, and the workers run."""
    names = {f"distributed.worker.memory.{name}": value for name, value in settings.items()}
    with dask.config.set(names), local_cluster(2, OPTIONS, **{"memory_limit": LIMIT} | arguments) as client:
        seed = fresh()
        future = client.scatter(array(seed, PART), broadcast=True)
        assert look(client, future) == [sample(array(seed, PART))] * 2
        let_monitors_run(client)
        assert set(client.run(lambda dask_worker: dask_worker.status.name).values()) == {"running"}
        assert sum(reported(client).values()) - sum(anonymous(client).values()) < 1.2 * 8 * PART
        assert totals(client).sent == 0


def test_a_worker_that_was_restarted_is_measured_as_well(two: Client) -> None:
    """Its nanny got the plugin long before, and must measure the new process in the same way."""
    a, _ = addresses(two)
    os.kill(pids(two)[a], 9)
    wait_until(lambda: len(addresses(two)) == 2 and a not in addresses(two), "the nanny restarts the worker")
    future = two.scatter(array(fresh(), LARGER_THAN_LIMIT), broadcast=True)
    processes = pids(two)
    look(two, future)
    let_monitors_run(two)
    assert trouble(two) == []
    assert pids(two) == processes


@pytest.mark.long
def test_the_nanny_of_a_worker_with_a_preload_measures_as_well() -> None:
    """``dask worker --preload`` reaches only the worker, which passes the plugin on to its nanny."""
    preload, env = "dask_shm_plugin", environment({"DASK_SHM__CAPACITY": "2 GiB"})
    with (
        dask.config.set({"distributed.client.preload": [preload]}),
        scheduler() as address,
        Client(address) as client,
        workers(client, "--preload", preload, "--nworkers", "2", "--memory-limit", LIMIT, count=2, env=env),
    ):
        processes, seed = pids(client), fresh()
        future = client.scatter(array(seed, LARGER_THAN_LIMIT), broadcast=True)
        np.testing.assert_allclose(look(client, future), sample(array(seed, LARGER_THAN_LIMIT)))
        let_monitors_run(client)
        assert trouble(client) == []
        assert pids(client) == processes
