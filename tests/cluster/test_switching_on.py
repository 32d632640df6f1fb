"""Each way to switch sharing on is enough by itself."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress

import dask
import pytest
from clusters import OPTIONS, local_cluster, register
from describing import assert_descriptions_equal, assert_same, describe
from distributed import Client, LocalCluster, Worker
from observing import (
    BIG,
    addresses,
    array,
    fresh,
    holders,
    is_shared,
    pids,
    see,
    see_on,
    settle,
    summed,
    totals,
    wait_until,
)
from processes import cluster, environment, run_script, scheduler, workers

from dask_shm_plugin import SharedMemoryPlugin, stats, unregister
from dask_shm_plugin.node import membership
from dask_shm_plugin.roles.client import half_of

pytestmark = pytest.mark.slow

#: A threshold in the environment, as operators set it.
THRESHOLD = {"DASK_SHM__THRESHOLD": "64 KiB"}


def assert_shared_between(client: Client, a: str, b: str) -> None:
    """Fail unless one worker maps a result of another one."""
    seed = fresh()
    made = client.submit(array, seed, workers=[a])
    (seen,) = see_on(client, made, [b])
    assert_descriptions_equal(seen.description, describe(array(seed)))
    assert seen.shared


def assert_client_takes_part(client: Client) -> None:
    """Fail unless scatters and gathers of this client go through the arena."""
    seed = fresh()
    future = client.scatter(array(seed, 8 * BIG), broadcast=True)
    for seen in see_on(client, future, holders(client, future)):
        assert_descriptions_equal(seen.description, describe(array(seed, 8 * BIG)))
        assert seen.shared, stats(client)
    value = client.submit(array, fresh(), 8 * BIG, pure=False).result()
    assert is_shared(value)


# ------------------------------------------------------------------------------------------------ register_plugin

SCRIPT = """
import numpy as np
from distributed import Client, LocalCluster
from dask_shm_plugin import SharedMemoryPlugin, is_shared, stats

if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        client.register_plugin(SharedMemoryPlugin())
        future = client.scatter(np.ones(1 << 20), broadcast=True)
        print(*client.run(lambda key, dask_worker: is_shared(dask_worker.data[key]), future.key).values())
        print(len(stats(client)))
"""


def test_a_script_only_needs_to_register_the_plugin() -> None:
    """The three lines of the README share values, with default settings, in a script of their own."""
    assert run_script(SCRIPT).split() == ["True", "True", "1"]


def test_an_asynchronous_client_awaits_the_same_calls() -> None:
    """In a notebook, `register_plugin`, `stats` and `unregister` can be awaited."""

    async def main() -> None:
        from dask_shm_plugin import SharedMemoryPlugin, stats, unregister

        seed = fresh()
        async with (
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", asynchronous=True) as local,
            Client(local, asynchronous=True) as client,
        ):
            await client.register_plugin(SharedMemoryPlugin(**OPTIONS))
            future = await client.scatter(array(seed), broadcast=True)
            for address in local.scheduler.workers:
                seen = await client.submit(see, future, workers=[address], pure=False)
                assert_descriptions_equal(seen.description, describe(array(seed)))
                assert seen.shared
            value = await client.gather(future)
            assert_same(value, array(seed))
            assert is_shared(value)
            assert summed(await stats(client)).used >= BIG * 8
            await unregister(client)
            assert_same(value, array(seed))

    asyncio.run(main())


@pytest.fixture(scope="module")
def remote_cluster(nothing_leaks: None) -> Iterator[Client]:
    """A client of a cluster of separate commands; this process has registered the plugin."""
    with cluster(count=2, options=OPTIONS) as client:
        yield client


@pytest.fixture
def remote(remote_cluster: Client) -> Client:
    """The same client with an empty arena."""
    settle(remote_cluster)
    return remote_cluster


def test_a_client_in_another_process_registers_for_the_whole_cluster(remote: Client) -> None:
    """The commands that started the scheduler and the workers know nothing of the plugin."""
    a, b = addresses(remote)
    assert_shared_between(remote, a, b)
    assert_client_takes_part(remote)
    assert totals(remote).arenas == 1


def test_workers_that_join_later_take_part(remote: Client) -> None:
    """A further command, with a nanny or without, joins the same arena."""
    a, b = addresses(remote)
    with workers(remote) as (c,), workers(remote, "--no-nanny") as (d,):
        for first, second in [(a, c), (c, d), (d, b)]:
            assert_shared_between(remote, first, second)
        assert totals(remote).arenas == 1


def test_a_worker_that_its_nanny_restarted_takes_part(remote: Client) -> None:
    """The worker that replaces a killed one shares as before."""
    before = pids(remote)
    victim = addresses(remote)[0]
    os.kill(before[victim], signal.SIGKILL)

    def restarted() -> bool:
        with suppress(OSError):
            found = pids(remote)
            return len(found) == 2 and before[victim] not in found.values()
        return False

    wait_until(restarted, "the nanny restarts the worker", seconds=60)
    a, b = addresses(remote)
    assert_shared_between(remote, a, b)
    assert_shared_between(remote, b, a)
    assert totals(remote).arenas == 1


def test_registering_twice_is_harmless(remote: Client) -> None:
    """A second registration changes nothing for values and workers."""
    seed = fresh()
    future = remote.scatter(array(seed), broadcast=True)
    register(remote, **OPTIONS)
    register(remote, **OPTIONS)
    for seen in see_on(remote, future, addresses(remote)):
        assert_descriptions_equal(seen.description, describe(array(seed)))
        assert seen.shared
    assert_shared_between(remote, *addresses(remote))
    assert totals(remote).arenas == 1


def test_a_second_client_without_the_plugin_works(remote: Client) -> None:
    """A client in a process that has not registered the plugin gets and sends right values."""
    script = f"""
import sys
from distributed import Client
from describing import assert_same
from observing import array

if __name__ == "__main__":
    with Client("{remote.scheduler.address}") as client:
        future = client.scatter(array(1), broadcast=True)
        assert_same(client.gather(future), array(1))
        assert_same(client.submit(array, 2).result(), array(2))
        assert "dask_shm_plugin" not in sys.modules or sys.argv[1:]
        print("right")
"""
    assert run_script(script).strip() == "right"


def test_a_second_client_takes_part_by_a_preload(remote: Client) -> None:
    """`distributed.client.preload: [dask_shm_plugin]` makes any client a member."""
    script = f"""
from distributed import Client
from observing import array, see_on, addresses
from dask_shm_plugin import is_shared

if __name__ == "__main__":
    with Client("{remote.scheduler.address}") as client:
        future = client.scatter(array(1), broadcast=True)
        print(*[seen.shared for seen in see_on(client, future, addresses(client))])
        print(is_shared(client.submit(array, 2).result()))
"""
    preload = THRESHOLD | {"DASK_DISTRIBUTED__CLIENT__PRELOAD": '["dask_shm_plugin"]'}
    assert run_script(script, env=environment(preload)).split() == ["True", "True", "True"]


@pytest.mark.parametrize("is_earlier", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_second_client_of_a_process_takes_part(remote: Client, is_earlier: bool) -> None:
    """It scatters to the arena and gathers from it, whether it was made before or after the first one took part."""
    script = f"""
from distributed import Client
from observing import array, see_on, addresses
from dask_shm_plugin import SharedMemoryPlugin, is_shared
from dask_shm_plugin.roles.client import half_of

if __name__ == "__main__":
    first = Client("{remote.scheduler.address}")
    second = Client(first.scheduler.address) if {is_earlier} else None
    first.register_plugin(SharedMemoryPlugin(threshold="64 KiB"))
    client = second or Client(first.scheduler.address)
    future = client.scatter(array(1), broadcast=True)
    print(*[seen.shared for seen in see_on(client, future, addresses(client))])
    print(is_shared(client.submit(array, 2).result()), half_of(client) is not None)
    first.close()
    print(is_shared(client.submit(array, 3).result()), hasattr(Client._gather, "__wrapped__"))
    client.close()
    print(hasattr(Client._gather, "__wrapped__"))
"""
    printed = run_script(script, env=environment(THRESHOLD))
    assert printed.split() == ["True"] * 6 + ["False"]


def test_all_clients_of_a_process_leave_together() -> None:
    """Those that followed, also on another event loop; the arena is gone then, and a new registration brings all back."""

    async def take_part_elsewhere(address: str, is_over: threading.Event) -> None:
        async with Client(address, asynchronous=True, set_as_default=False) as other:
            assert is_shared(await other.submit(array, fresh()))
            assert half_of(other) is not None
            has_followed.set()
            while not is_over.is_set():
                await asyncio.sleep(0.01)
            assert half_of(other) is None

    before = membership.all_arenas()
    with local_cluster(1) as client, Client(client.scheduler.address) as second:
        is_over, has_followed = threading.Event(), threading.Event()
        with ThreadPoolExecutor(1) as threads:
            elsewhere = threads.submit(asyncio.run, take_part_elsewhere(client.scheduler.address, is_over))
            try:
                assert is_shared(second.submit(array, fresh()).result())
                wait_until(lambda: has_followed.is_set() or elsewhere.done(), "the other client follows")
                unregister(client)
                assert half_of(client) is half_of(second) is None
                wait_until(lambda: membership.all_arenas() == before, "the process has left the arena")
                second.submit(array, fresh()).result()
                assert half_of(second) is None
            finally:
                is_over.set()
            elsewhere.result()
        register(second, **OPTIONS)
        assert is_shared(client.submit(array, fresh()).result())


def test_a_local_cluster_shares_with_workers_that_are_added(nothing_leaks: None) -> None:
    """Scaling up from no worker after the registration reaches each new worker."""
    with local_cluster(0) as client:
        client.cluster.scale(1)
        client.wait_for_workers(1)
        client.cluster.scale(3)
        client.wait_for_workers(3)
        a, b, c = addresses(client)
        assert_shared_between(client, a, b)
        assert_shared_between(client, c, a)
        assert_client_takes_part(client)


# --------------------------------------------------------------------------------------------------------- preloads


def test_worker_commands_with_a_preload_share_one_arena() -> None:
    """`dask worker --preload`: four workers of one command, one without a nanny, and the client are in one arena."""
    preload = ("--preload", "dask_shm_plugin")
    env = environment(THRESHOLD)
    with scheduler() as address, dask.config.set({"distributed.client.preload": ["dask_shm_plugin"]}):
        with (
            Client(address) as client,
            workers(client, *preload, "--nworkers", "4", count=4, env=env) as (a, b, *_),
            workers(client, *preload, "--no-nanny", env=env) as (e,),
        ):
            for first, second in [(a, b), (b, e), (e, a)]:
                assert_shared_between(client, first, second)
            assert totals(client).arenas == 1
        with Client(address) as late, workers(late, *preload, env=env):
            assert_client_takes_part(late)


def test_the_preload_of_a_nanny_switches_its_workers_on() -> None:
    """`--preload-nanny` alone reaches the workers, too."""
    preload = "--preload-nanny", "dask_shm_plugin"
    with (
        scheduler() as address,
        Client(address) as client,
        workers(client, *preload, "--nworkers", "2", count=2, env=environment(THRESHOLD)) as (a, b),
    ):
        assert_shared_between(client, a, b)
        assert totals(client).arenas == 1


def test_the_configured_preload_of_nannies_switches_their_workers_on(nothing_leaks: None) -> None:
    """`distributed.nanny.preload` alone is sufficient where Dask reads it: in a `LocalCluster`, not in `dask worker`."""
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0", "memory_limit": "1 GiB"}
    preload = {"distributed.nanny.preload": ["dask_shm_plugin"], "shm.threshold": "64 KiB"}
    with dask.config.set(preload), LocalCluster(**options) as cluster, Client(cluster) as client:
        assert_shared_between(client, *addresses(client))


def test_a_scheduler_with_a_preload_switches_the_whole_cluster_on() -> None:
    """`dask scheduler --preload`: plain workers, with and without a nanny, share."""
    env = environment(THRESHOLD)
    with (
        scheduler("--preload", "dask_shm_plugin", env=env) as address,
        Client(address) as client,
        workers(client, "--nworkers", "2", count=2, env=env) as (a, b),
        workers(client, "--no-nanny", env=env) as (c,),
    ):
        for first, second in [(a, b), (b, c), (c, a)]:
            assert_shared_between(client, first, second)
        assert totals(client).arenas == 1


# --------------------------------------------------------------------- simultaneous registrations, invalid settings


def replaced_functions(dask_worker: Worker) -> list[str]:
    """Return the names of a worker's functions that this package has replaced; the scatter guard is not among them."""
    found = {
        "get_data": dask_worker.handlers["get_data"],
        "get_process_memory": dask_worker.monitor.get_process_memory,
        "memory_monitor": dask_worker.periodic_callbacks["memory_monitor"].callback,
    }
    return [name for name, it in found.items() if type(getattr(it, "__self__", it)).__module__.startswith("dask_shm")]


def test_many_clients_that_register_at_the_same_time_leave_nothing_behind() -> None:
    """Dask may tear a plugin down during its setup, for another of the same name: one is active, and then none."""

    async def main() -> None:
        async with (
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", asynchronous=True) as cluster,
            Client(cluster, asynchronous=True) as client,
            AsyncExitStack() as stack,
        ):
            elsewhere = membership.all_arenas()
            others = [await stack.enter_async_context(Client(cluster, asynchronous=True)) for _ in range(6)]
            nannies = list(cluster.workers.values())
            before = [nanny.periodic_callbacks["memory_monitor"].callback for nanny in nannies]
            await asyncio.gather(*(other.register_plugin(SharedMemoryPlugin(**OPTIONS)) for other in others))
            (seen,) = (await stats(client)).values()
            assert sorted(seen["workers"]) == sorted(cluster.scheduler.workers)
            for other in [*others, client]:
                await unregister(other)
            assert await client.run(replaced_functions) == {address: [] for address in cluster.scheduler.workers}
            assert [nanny.periodic_callbacks["memory_monitor"].callback for nanny in nannies] == before
            assert membership.all_arenas() == elsewhere

    asyncio.run(main())


def test_an_invalid_setting_on_a_node_leaves_that_node_as_it_is() -> None:
    """The cluster works, all functions of the worker are Dask's own, and Dask logs no error."""
    env = environment({"DASK_SHM__THRESHOLD": "nonsense"})
    with scheduler() as address, Client(address) as client, workers(client, env=env) as (worker,):
        register(client, capacity="64 MiB")
        assert client.submit(len, [1, 2, 3]).result() == 3
        assert client.run(replaced_functions) == {worker: []}
        said = [line for level, line in client.get_worker_logs()[worker] if level == "ERROR"]
        assert not said
