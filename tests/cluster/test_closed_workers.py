"""A closed worker, nanny, client or cluster keeps nothing of the arena, even if its object is kept."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from clusters import OPTIONS
from distributed import Client, Future, Nanny, Scheduler, Worker, WorkerPlugin
from observing import array, fresh, own_descriptors, shared_in_data, wait_until
from sampling import sample

from dask_shm_plugin import SharedMemoryPlugin, is_shared, unregister
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.node import membership
from dask_shm_plugin.roles import closing

pytestmark = pytest.mark.slow


@asynccontextmanager
async def in_process(n_workers: int = 2, **arguments: Any) -> AsyncIterator[tuple[Client, list[Worker], Scheduler]]:
    """Run a scheduler, workers and a client on this loop, with the plugin; a test may close them before the end."""
    scheduler = await Scheduler(port=0, dashboard_address=":0")
    workers = [await Worker(scheduler.address, **arguments) for _ in range(n_workers)]
    client = await Client(scheduler.address, asynchronous=True)
    await client.amm.stop()  # it would drop replicas after two seconds
    await client.register_plugin(SharedMemoryPlugin(**OPTIONS))
    failure = None
    try:
        yield client, workers, scheduler
    except Exception as error:  # what stayed open would keep an arena, and fail all other tests of this process
        failure = error
    for one in (client, *workers, scheduler):
        await one.close()
    if failure:
        raise failure


async def share(client: Client, workers: list[Worker]) -> tuple[list[Future], set[str], str]:
    """Let each worker hold the same shared values and a private one; return the futures, shared keys, private key."""
    scattered = await client.scatter(array(fresh()), broadcast=True)
    small = await client.scatter(np.arange(3), broadcast=True)
    for _ in range(5):  # a value goes as bytes if the table's lock is busy for a quarter of a second
        made = client.submit(array, fresh(), workers=[workers[0].address], pure=False)
        await client.replicate([made])
        if await is_soon_shared(made.key, workers):
            break
    else:
        raise AssertionError("no value of five is shared by all workers")
    return [scattered, made, small], {scattered.key, made.key}, small.key


async def is_soon_shared(key: str, workers: list[Worker]) -> bool:
    """Wait until each worker's value of a key lies in the arena; return False if that takes longer than 10 s.

    A publisher adopts its value after a fetch, or when it looks again after five seconds. One worker alone publishes none.
    """
    deadline = time.monotonic() + 10
    while len(workers) > 1 and not all(shared_in_data(key, worker) for worker in workers):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


def the_arena() -> Arena:
    """Return the one arena of this process."""
    (arena,) = membership.all_arenas()
    return arena


def housekeeping_threads() -> list[threading.Thread]:
    """Return the housekeeping threads of all arenas."""
    return [thread for thread in threading.enumerate() if thread.name == "dask-shm-tidy"]


@pytest.fixture
def kept_objects() -> Iterator[list[Any]]:
    """Objects that a test keeps; in spite of them, this process must leave all arenas and end their threads."""
    before: set[tuple[str, str]] = own_descriptors()
    kept: list[Any] = []
    yield kept
    # The first releases of Python 3.13 keep the object of each call of a `singledispatchmethod`: here, the client.
    getattr(vars(Client)["_register_plugin"], "_method_cache", {}).clear()
    wait_until(lambda: (gc.collect(), not membership.all_arenas())[1], lambda: f"{membership.all_arenas()} are left")
    wait_until(lambda: not housekeeping_threads(), lambda: f"the housekeeping ends: {list(membership._lingering)}")
    wait_until(lambda: own_descriptors() <= before, "the descriptors are closed")
    kept.clear()


ORDERS = list(itertools.permutations(["client", "a", "b", "scheduler"]))


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(o, id=" ".join(o), marks=[] if n % 7 == 0 else pytest.mark.slow)
        for n, o in enumerate(sample(ORDERS, 5))
    ],
)
def test_closing_in_any_order_releases_the_arena(kept_objects: list[Any], order: list[str]) -> None:
    """Scheduler, workers and client are kept, but none of them keeps the arena, its blocks, or its thread."""

    async def run() -> weakref.ref[Arena]:
        async with in_process() as (client, workers, scheduler):
            await share(client, workers)
            parts = {"client": client, "a": workers[0], "b": workers[1], "scheduler": scheduler}
            kept_objects.extend(parts.values())
            for name in order:
                await parts[name].close()
            return weakref.ref(the_arena()) if membership.all_arenas() else lambda: None

    arena = asyncio.run(run())
    wait_until(lambda: (gc.collect(), arena() is None)[1], "the arena is collected")


@pytest.mark.parametrize("memory_limit", ["1 GiB", 0], ids=["spills", "never spills"])
def test_a_closed_worker_drops_its_shared_values_and_keeps_its_private_ones(
    kept_objects: list[Any], memory_limit: str | int
) -> None:
    """The blocks are free while the cluster goes on, even if the object of the closed worker is kept."""

    async def run() -> None:
        async with in_process(memory_limit=memory_limit) as (client, (a, b), _):
            kept_objects.extend([a, b])
            kept, shared, private = await share(client, [a, b])
            for worker in (a, b):
                assert all(shared_in_data(key, worker) for key in shared)
            await b.close()
            assert set(b.data) == {private}
            np.testing.assert_array_equal(b.data[private], np.arange(3))
            assert the_arena().holdings
            await a.close()
            assert set(a.data) == {private}
            for worker in (a, b):
                assert worker.state.nbytes == sum(worker.state.tasks[key].nbytes for key in worker.data)
            deadline = time.monotonic() + 20  # at once, and not when Python next looks for reference cycles
            while len(the_arena().holdings):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            del kept

    asyncio.run(run())


class Recorder(WorkerPlugin):
    """A plugin of a user that records its calls."""

    name = "told"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def teardown(self, worker: Worker) -> None:
        self.calls.append("teardown")

    def transition(self, key: Any, start: str, finish: str, **kwargs: Any) -> None:
        self.calls.append(finish)


@pytest.mark.parametrize("fails", [False, True])
def test_a_torn_down_plugin_hears_of_no_freed_key_and_closing_never_fails(
    kept_objects: list[Any], fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed worker frees its keys after the teardown of its plugins, and goes on closing if that fails."""

    async def run() -> None:
        async with in_process(1) as (client, (worker,), _):
            kept_objects.append(worker)
            told = Recorder()
            await worker.plugin_add(told)
            value = await client.scatter(array(7))
            if fails:
                monkeypatch.setattr(closing, "FreeKeysEvent", lambda **_: 1 / 0)
            await worker.close()
            assert value.key not in worker.data
            assert told.calls[-1] == "teardown", told.calls

    asyncio.run(run())


def test_a_dict_of_a_user_keeps_its_values_when_the_worker_closes(kept_objects: list[Any]) -> None:
    """The user may go on using a dict that was passed as `data=`, and its values: only the worker drops them."""

    async def run() -> tuple[dict[Any, Any], dict[Any, Any]]:
        own: dict[Any, Any] = {}
        async with in_process(1, data=own) as (client, (worker,), _):
            kept_objects.append(worker)
            value = await client.scatter(array(7))
            await worker.close()
            assert not worker.data
            return own, {value.key: array(7)}

    own, expected = asyncio.run(run())
    for key, value in expected.items():
        np.testing.assert_array_equal(own[key], value)
        assert is_shared(own[key])


def test_unregister_takes_no_value_from_a_worker_that_lives_on(kept_objects: list[Any]) -> None:
    """Only a worker that closes drops its shared values: `unregister` takes nothing away."""

    async def run() -> None:
        async with in_process() as (client, workers, _):
            kept = await share(client, workers)
            held = {worker.address: set(worker.data) for worker in workers}
            await unregister(client)
            assert {worker.address: worker.data.keys() for worker in workers} == held
            del kept

    asyncio.run(run())


def test_a_loop_that_ends_with_everything_open_leaves_the_arena(kept_objects: list[Any]) -> None:
    """Clients and workers that were never closed are collected like any object, and their roles end."""

    async def run() -> None:
        parts = in_process()
        client, workers, _ = await parts.__aenter__()
        await share(client, workers)
        _OPEN.append(parts)

    asyncio.run(run())
    assert membership.all_arenas()
    _OPEN.clear()


_OPEN: list[Any] = []


def test_a_nanny_that_is_closed_and_kept_keeps_no_arena(kept_objects: list[Any]) -> None:
    """After it has closed, neither the nanny nor its plugin keeps the arena."""

    async def run() -> weakref.ref[Arena]:
        async with (
            Scheduler(port=0, dashboard_address=":0") as scheduler,
            Nanny(scheduler.address, nthreads=1) as nanny,
            Client(scheduler.address, asynchronous=True) as client,
        ):
            await client.register_plugin(SharedMemoryPlugin(**OPTIONS))
            kept_objects.extend([nanny, *nanny.plugins.values(), client])
            return weakref.ref(the_arena())

    arena = asyncio.run(run())
    wait_until(lambda: (gc.collect(), arena() is None)[1], "the arena is collected")
