"""The scheduler places tasks by the place of large values; small inputs and strangers are treated as by stock Dask."""

from __future__ import annotations

import asyncio
import collections
import os
import random
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import numpy as np
import pytest
from clusters import OPTIONS, local_cluster, register
from distributed import Client, Event, KilledWorker, get_worker, wait
from observing import MIB, addresses, array, fresh, holders, lies_in_arena, pids, see_on, settle, totals, wait_until
from processes import environment, scheduler, workers

from dask_shm_plugin import unregister

pytestmark = pytest.mark.slow

SIZE = 32 * MIB
REPLACED = ("decide_worker_non_rootish", "get_comm_cost", "_add_to_processing", "remove_worker")


@pytest.fixture(scope="module")
def cluster(nothing_leaks: None) -> Iterator[Client]:
    """A client of four workers, whose scheduler checks its state after each transition."""
    with (
        dask.config.set({"distributed.scheduler.validate": True}),
        local_cluster(4, OPTIONS | {"capacity": "1 GiB"}) as client,
    ):
        yield client


@pytest.fixture
def client(cluster: Client) -> Client:
    """The client, with an empty arena."""
    settle(cluster)
    return cluster


def big(seed: int) -> np.ndarray:
    """Return 32 MiB."""
    return array(seed, SIZE // 8)


def work(value: np.ndarray, seconds: float, number: int) -> tuple[str, float]:
    """Read a value, take some time, and return the worker's address."""
    time.sleep(seconds)
    return get_worker().address, float(value[number])


def touch(value: np.ndarray) -> float:
    """Read a value. The scheduler does not take this task's duration for that of `work`."""
    return float(value[0])


def counts(client: Client, future: Any, seconds: float, tasks: int) -> list[int]:
    """Let tasks read a value; return how many each worker has run, in ascending order."""
    futures = [client.submit(work, future, seconds, number, pure=False) for number in range(tasks)]
    ran = collections.Counter(address for address, _ in client.gather(futures))
    return sorted(ran[address] for address in addresses(client))


def wait_for(name: str, value: np.ndarray) -> float:
    """Wait for an event."""
    Event(name).wait()
    return float(value[0])


def published(client: Client, worker: str, reader: str) -> Any:
    """Return the future of a value that lies in the arena, and that two workers hold."""
    future = client.submit(big, fresh(), workers=[worker], pure=False)
    client.submit(touch, future, workers=[reader], pure=False).result()
    wait_until(lambda: lies_in_arena(client, future, worker), "the owner adopts the value")
    wait_until(lambda: is_known(client, future), "the scheduler knows that the value is published")
    return future


def is_known(client: Client, future: Any) -> bool:
    """Return whether the scheduler knows that a value is published."""

    def look(dask_scheduler: Any) -> bool:
        half = dask_scheduler.extensions["dask-shm-scheduling"]
        return any(ts.key == future.key for ts, _ in half._nodes.holders())

    return client.run_on_scheduler(look)


def test_tasks_that_share_a_published_value_are_spread(client: Client) -> None:
    """All four workers of the node get as many tasks, though only two hold the value."""
    a, b, *_ = addresses(client)
    future, name = published(client, a, b), f"event-{fresh()}"
    waiting = [client.submit(wait_for, name, future, pure=False) for _ in range(8)]  # Dask queues more, as root tasks
    try:
        wait_until(lambda: placed(client) == [2, 2, 2, 2], lambda: f"the tasks are spread: {placed(client)}")
    finally:
        Event(name, client=client).set()
    wait(waiting)


def placed(client: Client) -> list[int]:
    """Return how many tasks each worker is to run."""
    return [len(keys) for keys in client.processing().values()]


def test_tasks_that_share_a_private_value_are_spread_if_that_is_worth_a_copy(client: Client) -> None:
    """One worker holds the value; the tasks take eight seconds altogether, and a copy a tenth of one."""
    before = totals(client)
    made = client.submit(big, fresh(), workers=addresses(client)[:1], pure=False)
    wait(made)
    ran = counts(client, made, 0.2, 40)
    assert ran[-1] <= 30, ran  # 37 with stock Dask
    assert (totals(client) - before).blocks_made == 1


def test_a_chain_of_tasks_stays_with_its_private_values(client: Client) -> None:
    """Each task reads the result of the one before: none is worth a copy, and none is published."""
    before = totals(client)
    ends = []
    for worker in addresses(client):
        end = client.submit(big, fresh(), workers=[worker], pure=False)
        for _ in range(5):
            end = client.submit(np.negative, end, pure=False)
        ends.append(end)
    wait(ends)
    assert sorted(next(iter(holders(client, end))) for end in ends) == sorted(addresses(client))
    assert (totals(client) - before).blocks_made == 0


def test_tasks_run_where_the_user_says(client: Client) -> None:
    """`workers=` and `allow_other_workers` hold for tasks with large inputs, too."""
    a, b, c, d = addresses(client)
    future = published(client, a, b)
    for options, allowed in (({"workers": [c]}, {c}), ({"workers": [c, d]}, {c, d})):
        futures = [client.submit(work, future, 0.01, 0, pure=False, **options) for _ in range(8)]
        assert {address for address, _ in client.gather(futures)} <= allowed
    nowhere = client.submit(work, future, 0, 0, pure=False, workers=["tcp://10.255.255.1:1"], allow_other_workers=True)
    assert nowhere.result(timeout=20)[0] in {a, b, c, d}


def traffic(client: Client) -> tuple[list[int], int]:
    """Return the expected traffic (bytes) of each worker, and of all."""

    def look(dask_scheduler: Any) -> tuple[list[int], int]:
        return [ws._network_occ for ws in dask_scheduler.workers.values()], dask_scheduler._network_occ_global

    return client.run_on_scheduler(look)


def test_expected_traffic_comes_back_to_nothing(client: Client) -> None:
    """After random programs of large and small inputs, no worker is taken to receive or to have sent anything."""
    order = random.Random(1)
    for _ in range(3):
        values = [client.submit(big, fresh(), pure=False) for _ in range(3)]
        values += [client.submit(array, fresh(), 1000, pure=False) for _ in range(3)]
        values.append(client.scatter(big(fresh()), hash=False))
        for _ in range(25):
            inputs = order.sample(values, 3)
            place = order.choice([None, [order.choice(addresses(client))]])
            values.append(client.submit(lambda *values: values[0][:10] + 1, *inputs, workers=place, pure=False))
        wait(values)
        assert {future.status for future in values} == {"finished"}
    assert traffic(client) == ([0, 0, 0, 0], 0)


SETTINGS: list[dict[str, Any]] = [
    {"distributed.scheduler.worker-saturation": float("inf")},
    {"distributed.scheduler.worker-saturation": 1.1, "distributed.scheduler.work-stealing": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_random_programs_give_the_right_results_whatever_happens_to_the_workers(settings: dict[str, Any]) -> None:
    """Values are rebalanced and replicated, workers are added, retired and restarted, and replicas are managed."""
    order = random.Random(2)
    with dask.config.set(settings | {"distributed.scheduler.validate": True}), local_cluster(3, {}) as client:
        client.amm.start()
        for change in (client.rebalance, lambda: client.retire_workers(addresses(client)[:1]), client.restart):
            seeds = [fresh() for _ in range(4)]
            values = [client.submit(big, seed, pure=False, priority=order.randrange(3)) for seed in seeds]
            values.append(client.scatter(big(seeds[0]), broadcast=order.random() < 0.5, hash=False))
            sums = [client.submit(two_sums, *order.sample(values, 2), pure=False) for _ in range(20)]
            client.replicate(values[:2], n=2)
            expected = {float(big(seed).sum().round(3)) for seed in seeds}
            assert {one for pair in client.gather(sums) for one in pair} <= expected
            change()
            wait_until(lambda: len(addresses(client)) >= 2, "enough workers are there")
        assert client.submit(two_sums, *[client.submit(big, seeds[0], pure=False)] * 2).result()[0] in expected


def two_sums(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Read all of two arrays."""
    return float(a.sum().round(3)), float(b.sum().round(3))


def test_near_inputs_are_no_traffic(client: Client) -> None:
    """A worker that waits for a published value is not taken to be busy with receiving it."""
    a, b, c, _ = addresses(client)
    future = published(client, a, b)
    pid = pids(client)[c]
    os.kill(pid, signal.SIGSTOP)
    try:
        waiting = client.submit(work, future, 0, 0, workers=[c], pure=False)
        wait_until(lambda: waits_for(client, c, future.key), "the scheduler has placed the task")
        assert traffic(client) == ([0, 0, 0, 0], 0)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert waiting.result()[0] == c


def waits_for(client: Client, address: str, key: str) -> bool:
    """Return whether a worker is to get the value of a key."""

    def look(dask_scheduler: Any) -> bool:
        return key in {ts.key for ts in dask_scheduler.workers[address].needs_what}

    return client.run_on_scheduler(look)


def test_mapped_bytes_are_no_measure_of_the_network(client: Client) -> None:
    """A fetch from the arena leaves the bandwidth as it is."""

    def measured(dask_worker: Any) -> tuple[float, int, int]:
        return dask_worker.bandwidth, len(dask_worker.bandwidth_workers), len(dask_worker.bandwidth_types)

    a, b, *_ = addresses(client)
    before = client.run(measured)[b]
    logged = client.run(lambda dask_worker: len(dask_worker.transfer_incoming_log))[b]
    made = client.submit(big, fresh(), workers=[a], pure=False)
    client.submit(work, made, 0, 0, workers=[b], pure=False).result()
    assert client.run(lambda dask_worker: len(dask_worker.transfer_incoming_log))[b] == logged + 1
    assert client.run(measured)[b][0] == before[0]


# --------------------------------------------------------------------------------------------------- memory limits


def test_a_broadcast_beyond_each_workers_limit_is_used_on_its_node_and_refused_elsewhere() -> None:
    """768 MiB are mapped by workers of 700 MB; a worker outside the arena gets Dask's `MemoryError` at once."""
    with (
        local_cluster(4, {}, memory_limit="700 MB") as client,
        workers(client, "--memory-limit", "700MB", env=environment({"DASK_SHM__CAPACITY": "0"})) as (outsider,),
    ):
        members = [address for address in addresses(client) if address != outsider]
        value = array(fresh(), 768 * MIB // 8)
        future = client.scatter(value, workers=members, broadcast=True, hash=False)
        seen = [client.submit(work, future, 0, 7, workers=[address], pure=False) for address in members]
        assert client.gather(seen) == [(address, float(value[7])) for address in members]
        refused = client.submit(work, future, 0, 7, workers=[outsider], pure=False)
        with pytest.raises((MemoryError, KilledWorker), match="memory_limit"):
            refused.result(timeout=30)
        assert set(addresses(client)) == {*members, outsider}


# ----------------------------------------------------------------------------------------------- switching on and off


def replaced(dask_scheduler: Any) -> dict[str, Any]:
    """Return the differences from a stock scheduler."""
    from distributed.scheduler import WorkerState

    return {
        "scheduler": [name for name in REPLACED if name in vars(dask_scheduler)],
        "stealing": "steal_time_ratio" in vars(dask_scheduler.extensions["stealing"]),
        "policies": sorted(type(policy).__name__ for policy in dask_scheduler.extensions["amm"].policies),
        "methods": WorkerState.add_replica.__module__,
        "plugins": [name for name in dask_scheduler.plugins if "shm" in name],
        "managers": sum(name.startswith("amm") for name in dask_scheduler.periodic_callbacks),
    }


def test_everything_is_put_back_when_the_plugin_is_switched_off() -> None:
    """Registering again, from another client too, does not change that."""
    with local_cluster(1, None) as client:
        stock = client.run_on_scheduler(replaced)
        from dask_shm_plugin import SharedMemoryPlugin

        for _ in range(2):
            client.register_plugin(SharedMemoryPlugin())
            on = client.run_on_scheduler(replaced)
            assert (on["scheduler"], on["policies"]) == (list(REPLACED), ["ReduceReplicasPerNode"])
            assert on["plugins"] == ["dask-shm"]  # each one costs a call in each transition
        unregister(client)
        assert client.run_on_scheduler(replaced) == stock


def test_two_registrations_at_the_same_time_leave_one_plugin_that_hears_the_news() -> None:
    """Two clients may register the plugin at the same time; Dask then warns of no plugin that is replaced."""

    async def register_twice(dask_scheduler: Any) -> tuple[list[str], bool]:
        from dask_shm_plugin import SharedMemoryPlugin

        plugins = SharedMemoryPlugin(), SharedMemoryPlugin()
        await asyncio.gather(*(dask_scheduler.register_scheduler_plugin(one, idempotent=False) for one in plugins))
        names = [name for name in dask_scheduler.plugins if "shm" in name]
        return names, plugins[1].half is dask_scheduler.extensions["dask-shm-scheduling"]

    with local_cluster(1, None) as client, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert client.run_on_scheduler(register_twice) == (["dask-shm"], True)
        unregister(client)


def test_an_error_puts_everything_back_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """The task that met the error runs, and all later ones are placed as without the plugin."""

    def break_it(dask_scheduler: Any) -> None:
        dask_scheduler.extensions["dask-shm-scheduling"]._placement._nodes = None

    with local_cluster(2) as client:
        a, b = addresses(client)
        future = published(client, a, b)
        client.run_on_scheduler(break_it)
        for _ in range(3):
            assert client.submit(work, future, 0, 0, pure=False).result(timeout=20)
        assert client.run_on_scheduler(replaced)["scheduler"] == []
    assert len([record for record in caplog.records if "placed as without" in record.message]) == 1


@pytest.mark.parametrize("lacks", ["the package", "this part of it"])
def test_a_scheduler_without_the_package_places_tasks_as_stock_dask(tmp_path: Path, lacks: str) -> None:
    """Values are shared all the same. Another version of the package may not have this part."""
    module = tmp_path / "dask_shm_plugin.py"
    module.write_text("raise ImportError('not here')" if lacks == "the package" else "__version__ = '0'")
    with (
        scheduler(env=environment(first=str(tmp_path))) as address,
        Client(address) as client,
        workers(client, "--nworkers", "2", count=2),
    ):
        register(client, **OPTIONS)
        a, b = addresses(client)
        made = client.submit(array, fresh(), SIZE // 8, workers=[a], pure=False)
        assert see_on(client, made, [b])[0].shared
        assert totals(client).sent == 0
        assert not client.run_on_scheduler(lambda dask_scheduler: set(vars(dask_scheduler)) & {"get_comm_cost"})
        unregister(client)


def test_a_function_that_other_code_has_wrapped_is_dasks_own_after_unregister() -> None:
    """Ours cannot be taken out then, and it gives no advice any more."""

    def wrap(dask_scheduler: Any) -> None:
        ours = dask_scheduler.get_comm_cost
        dask_scheduler.get_comm_cost = lambda ts, ws: ours(ts, ws)

    def stock(dask_scheduler: Any) -> bool:
        (ts,) = dask_scheduler.tasks.values()
        waiting = SimpleNamespace(dependencies={ts})
        ws = next(ws for ws in dask_scheduler.workers.values() if ws not in ts.who_has)
        return dask_scheduler.get_comm_cost(waiting, ws) == ts.nbytes / dask_scheduler.bandwidth

    with local_cluster(2) as client:
        future = client.submit(big, fresh(), workers=addresses(client)[:1], pure=False)
        wait(future)
        client.run_on_scheduler(wrap)
        unregister(client)
        assert client.run_on_scheduler(stock)


def test_two_clusters_of_one_process_do_not_disturb_each_other() -> None:
    """The methods of `WorkerState` are replaced for the process; a stock scheduler's workers behave as before."""
    with local_cluster(2) as ours, local_cluster(2, None) as stock:
        for client in (ours, stock):
            a, b = addresses(client)
            made = client.submit(big, fresh(), workers=[a], pure=False)
            assert client.submit(work, made, 0, 0, workers=[b], pure=False).result()[0] == b
        assert traffic(ours) == traffic(stock) == ([0, 0], 0)
        assert client.run_on_scheduler(replaced)["scheduler"] == []
