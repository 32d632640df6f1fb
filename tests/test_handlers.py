"""Handlers of a worker that somebody has replaced or extended are called as Dask calls them."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest
from distributed import Client, Scheduler, Worker

from dask_shm_plugin import SharedMemoryPlugin, is_shared, membership

LENGTH = 1 << 15


class Passing(Worker):
    """Overrides handlers as people do who only want to know."""

    seen: list[Any]

    async def get_data(self, comm: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Take what comes by name."""
        self.__dict__.setdefault("seen", []).append(("get_data", sorted(kwargs)))
        return await super().get_data(comm, **kwargs)

    def update_data(self, **kwargs: Any) -> Any:  # type: ignore[override]
        """Take what comes by name."""
        self.__dict__.setdefault("seen", []).append(("update_data", sorted(kwargs)))
        return super().update_data(**kwargs)


class Waiting(Worker):
    """Overrides handlers by coroutines with the names that Dask uses."""

    async def get_data(self, comm: Any, keys: Any, who: Any = None, serializers: Any = None) -> Any:
        """Wait first."""
        await asyncio.sleep(0)
        return await super().get_data(comm, keys, who=who, serializers=serializers)

    async def update_data(self, data: Any, stimulus_id: Any = None) -> Any:  # type: ignore[override]
        """Wait first."""
        await asyncio.sleep(0)
        return super().update_data(data=data, stimulus_id=stimulus_id)


class Hoarding(Worker):
    """Keeps what a scatter has brought, and changes it later."""

    def update_data(self, data: Any, stimulus_id: Any = None) -> Any:
        """Keep it."""
        self.__dict__.setdefault("hoard", []).append(data)
        return super().update_data(data=data, stimulus_id=stimulus_id)


async def with_workers(kind: type[Worker], use: Callable[..., Any], *, share: bool = True) -> Any:
    """Use a client and two workers of a class, all in this process, with the plugin or without."""
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
    """Run :func:`with_workers`."""
    try:
        return asyncio.run(with_workers(kind, use, **options))
    finally:
        gc.collect()
        assert not membership.all_arenas()


async def scatter_and_fetch(client: Client, a: Worker, b: Worker) -> Any:
    """Scatter a value to one worker, and let the other need it and a result."""
    scattered = await client.scatter(np.arange(LENGTH), workers=[a.address])
    made = client.submit(np.ones, LENGTH, workers=[a.address])
    total = client.submit(lambda x, y: (float((x + y).sum()), is_shared(x)), scattered, made, workers=[b.address])
    return await total, getattr(a, "seen", None)


@pytest.mark.parametrize("kind", [Worker, Passing, Waiting])
def test_a_worker_with_handlers_of_its_own_shares(kind: type[Worker]) -> None:
    """What it returns, awaited or not, is what counts; it gets what Dask would have given it."""
    (expected, _), with_names = run(kind, scatter_and_fetch, share=False)
    (total, shared), with_names_here = run(kind, scatter_and_fetch)
    assert total == expected
    assert shared
    assert with_names_here == with_names


def remove_replica(address: str, key: str, dask_scheduler: Any) -> None:
    """Let a worker forget a value that another one has."""
    dask_scheduler.request_remove_replicas(address, [key], stimulus_id="test")


async def change_the_hoard(client: Client, a: Worker, b: Worker) -> list[float]:
    """Read a value elsewhere, before and after its worker has changed what it keeps of it."""
    scattered = await client.scatter(np.ones(LENGTH), workers=[a.address])
    seen = []
    for number in range(3):
        seen.append(await client.submit(np.sum, scattered, workers=[b.address], pure=False))
        await client.run_on_scheduler(remove_replica, b.address, scattered.key)
        while scattered.key in b.data:
            await asyncio.sleep(0.01)
        for data in vars(a)["hoard"]:
            data[scattered.key][:10] = number
    vars(a)["hoard"].clear()  # Dask keeps the worker, for it has called a method of it
    return seen


def test_what_a_worker_keeps_of_a_message_is_not_taken_for_out_of_reach() -> None:
    """A dict that it was given is a way to the values as well."""
    assert run(Hoarding, change_the_hoard) == run(Hoarding, change_the_hoard, share=False)


def test_a_request_takes_no_longer_where_more_keys_are_held() -> None:
    """An answer, and the look for what may be given up, touch only what is published."""

    async def use(client: Client, a: Worker, b: Worker) -> tuple[int, int]:
        many = await client.scatter({f"small-{n}": n for n in range(2_000)}, workers=[a.address])
        made = client.submit(np.ones, LENGTH, workers=[a.address])
        await client.submit(np.sum, made, workers=[b.address])
        half = next(plugin for name, plugin in a.plugins.items() if name == "dask-shm").half
        publisher = half._running.publisher
        watched = publisher._data._watched
        raw, watched.raw = watched.raw, Touched(watched.raw)
        await client.submit(np.mean, made, workers=[b.address], pure=False)
        half._running.prune()
        touched, watched.raw = watched.raw, raw
        assert len(many) == 2_000
        return touched.walks, len(publisher._entries)

    walks, entries = run(Worker, use)
    assert walks == 0
    assert entries <= 1


class Touched(dict):  # type: ignore[type-arg]
    """A dict that counts how often somebody walks through it."""

    walks = 0

    def __iter__(self) -> Any:
        self.walks += 1
        return super().__iter__()

    def items(self) -> Any:
        """Count."""
        self.walks += 1
        return super().items()

    def values(self) -> Any:
        """Count."""
        self.walks += 1
        return super().values()
