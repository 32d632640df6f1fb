"""Handlers of a worker that a user has replaced or extended are called as Dask calls them."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest
from distributed import Client, Scheduler, Worker, wait

from dask_shm_plugin import SharedMemoryPlugin, is_shared
from dask_shm_plugin.node import membership

pytestmark = pytest.mark.slow

LENGTH = 1 << 15


class Passing(Worker):
    """Overrides handlers only to record the names of their arguments."""

    seen: list[Any]

    async def get_data(self, comm: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Record the arguments, and pass them on by name."""
        self.__dict__.setdefault("seen", []).append(("get_data", sorted(kwargs)))
        return await super().get_data(comm, **kwargs)

    def update_data(self, **kwargs: Any) -> Any:  # type: ignore[override]
        """Record the arguments, and pass them on by name."""
        self.__dict__.setdefault("seen", []).append(("update_data", sorted(kwargs)))
        return super().update_data(**kwargs)


class Waiting(Worker):
    """Overrides handlers by coroutines that name the arguments as Dask does."""

    async def get_data(self, comm: Any, keys: Any, who: Any = None, serializers: Any = None) -> Any:
        """Yield to the event loop first."""
        await asyncio.sleep(0)
        return await super().get_data(comm, keys, who=who, serializers=serializers)

    async def update_data(self, data: Any, stimulus_id: Any = None) -> Any:  # type: ignore[override]
        """Yield to the event loop first."""
        await asyncio.sleep(0)
        return super().update_data(data=data, stimulus_id=stimulus_id)


class Hoarding(Worker):
    """Keeps the data of each scatter, so that a test can change the values later."""

    def update_data(self, data: Any, stimulus_id: Any = None) -> Any:
        """Keep the data."""
        self.__dict__.setdefault("hoard", []).append(data)
        return super().update_data(data=data, stimulus_id=stimulus_id)


async def with_workers(kind: type[Worker], use: Callable[..., Any], *, share: bool = True) -> Any:
    """Call ``use`` with a client and two workers of a class, all in this process, with the plugin or without."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        scheduler = await enter(Scheduler(host="127.0.0.1", port=0, dashboard_address=":0"))
        workers = [
            await enter(kind(scheduler.address, name=name, nthreads=1, memory_limit="1 GiB", host="127.0.0.1"))
            for name in "ab"
        ]
        client = await enter(Client(scheduler.address, asynchronous=True))
        await client.amm.stop()
        if share:
            await client.register_plugin(SharedMemoryPlugin(threshold="64 KiB", capacity="64 MiB"))
        return await use(client, *workers)


def run(kind: type[Worker], use: Callable[..., Any], **options: Any) -> Any:
    """Run :func:`with_workers`, and fail if this process stays in an arena."""
    try:
        return asyncio.run(with_workers(kind, use, **options))
    finally:
        gc.collect()
        assert not membership.all_arenas()


async def scatter_and_fetch(client: Client, a: Worker, b: Worker) -> Any:
    """Scatter a value to one worker; let the other compute with it and with a result of the first."""
    scattered = await client.scatter(np.arange(LENGTH), workers=[a.address])
    made = client.submit(np.ones, LENGTH, workers=[a.address])
    total = client.submit(lambda x, y: (float((x + y).sum()), is_shared(x)), scattered, made, workers=[b.address])
    return await total, getattr(a, "seen", None)


@pytest.mark.parametrize("kind", [Worker, Passing, Waiting])
def test_a_worker_with_overridden_handlers_shares(kind: type[Worker]) -> None:
    """A handler gets the arguments that Dask would pass, and may return its answer directly or as a coroutine."""
    (expected, _), with_names = run(kind, scatter_and_fetch, share=False)
    (total, shared), with_names_here = run(kind, scatter_and_fetch)
    assert total == expected
    assert shared
    assert with_names_here == with_names


def remove_replica(address: str, key: str, dask_scheduler: Any) -> None:
    """Let a worker drop a value that another one holds."""
    dask_scheduler.request_remove_replicas(address, [key], stimulus_id="test")


async def change_the_hoard(client: Client, a: Worker, b: Worker) -> list[float]:
    """Read a value on the other worker, before and after its holder has changed the kept data."""
    scattered = await client.scatter(np.ones(LENGTH), workers=[a.address])
    seen = []
    for number in range(3):
        seen.append(await client.submit(np.sum, scattered, workers=[b.address], pure=False))
        await client.run_on_scheduler(remove_replica, b.address, scattered.key)
        while scattered.key in b.data:
            await asyncio.sleep(0.01)
        for data in vars(a)["hoard"]:
            data[scattered.key][:10] = number
    vars(a)["hoard"].clear()  # Dask keeps a worker of which it has called a method
    return seen


def test_the_kept_data_of_a_scatter_count_as_an_alias() -> None:
    """A worker may change values through the dict that a scatter gave it: readers see the change as on stock Dask."""
    assert run(Hoarding, change_the_hoard) == run(Hoarding, change_the_hoard, share=False)


def test_answers_and_pruning_do_not_iterate_over_all_keys() -> None:
    """An answer and the pruning touch only published values, so their cost does not grow with the worker's keys."""

    async def use(client: Client, a: Worker, b: Worker) -> tuple[int, int]:
        many = await client.scatter({f"small-{n}": n for n in range(2_000)}, workers=[a.address])
        made = client.submit(np.ones, LENGTH, workers=[a.address])
        await client.submit(np.sum, made, workers=[b.address])
        other = client.submit(np.zeros, LENGTH, workers=[a.address])
        await wait(other)
        half = next(plugin for name, plugin in a.plugins.items() if name == "dask-shm").half
        publisher = half._running.publisher
        watched = publisher._entries._data._watched
        raw, watched.raw = watched.raw, CountingDict(watched.raw)
        await client.submit(np.mean, other, workers=[b.address])
        half._running.publisher.prune()
        touched, watched.raw = watched.raw, raw
        assert len(many) == 2_000
        return touched.walks, len(publisher._entries)

    walks, entries = run(Worker, use)
    assert walks == 0
    assert entries <= 2


class CountingDict(dict):  # type: ignore[type-arg]
    """A dict that counts the iterations over it."""

    walks = 0

    def __iter__(self) -> Any:
        self.walks += 1
        return super().__iter__()

    def items(self) -> Any:
        """Count an iteration."""
        self.walks += 1
        return super().items()

    def values(self) -> Any:
        """Count an iteration."""
        self.walks += 1
        return super().values()
