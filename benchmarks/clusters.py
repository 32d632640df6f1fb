"""Clusters with the same settings, with and without the plugin, each in a process of its own.

Several may live at the same time, but only one works at a time. Measurements that are compared are taken in turn, on the
same machine in the same state. Nothing here imports the plugin unless a cluster uses it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import psutil
from distributed import Client, Future, LocalCluster, wait
from machine import make
from remote import Remote, remote

ARMS = ("stock", "plugin")
TIMEOUT = 60  # seconds

K = TypeVar("K")


class Spec(NamedTuple):
    """Settings of a cluster: among them those of the plugin, and whether the Active Memory Manager runs."""

    with_plugin: bool = True
    workers: int = 4
    memory_limit: str = "2 GiB"
    has_amm: bool = False
    capacity: str | None = None
    born: str | None = None


class Site:
    """A running cluster and its client."""

    def __init__(self, client: Client, spec: Spec) -> None:
        self.client, self.with_plugin = client, spec.with_plugin
        workers = client.scheduler_info(n_workers=-1)["workers"]
        self.workers = sorted(workers, key=lambda address: int(workers[address]["name"]))
        self.processes = [os.getpid(), *client.run(os.getpid).values()]

    def put_on(self, worker: str, seed: int, size: int) -> Future:
        """Let a worker make an array, and wait for it."""
        future = self.client.submit(make, seed, size, workers=[worker], pure=False)
        wait(future)
        return future

    def read_on(self, worker: str, future: Future, read: Callable[[Any], Any]) -> Any:
        """Let a worker read a value, and return the result."""
        return self.client.submit(read, future, workers=[worker], pure=False).result()

    def read_on_all(self, future: Future, read: Callable[[Any], Any]) -> list[Any]:
        """Let all workers read a value at the same time, and return the results."""
        tasks = [self.client.submit(read, future, workers=[worker], pure=False) for worker in self.workers]
        return self.client.gather(tasks)

    def shared(self) -> dict[str, Any]:
        """Return the state and the counters of the cluster's one arena."""
        from dask_shm_plugin import stats

        [arena] = stats(self.client).values()
        return arena

    def processor_time(self) -> float:
        """Return the processor time that the workers have taken so far, in seconds."""
        times = [psutil.Process(pid).cpu_times() for pid in self.processes[1:]]
        return sum(one.user + one.system for one in times)

    def settle(self, *, blocks_too: bool = False) -> None:
        """Collect garbage everywhere, and wait until no worker has data (and no block is in use)."""
        gc.collect()
        self.wait_until_released(blocks_too=blocks_too)
        self.client.run(gc.collect)

    def wait_until_released(self, *, blocks_too: bool) -> None:
        """Wait until no worker has data (and no block of the arena is in use)."""
        self.wait_until(lambda: not any(self.client.run(_count).values()), "all workers have released all data")
        if blocks_too and self.with_plugin:
            self.wait_until(lambda: self.shared()["blocks"] == 0, "all blocks are free")

    def wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        """Ask every 10 ms until the answer is yes."""
        deadline = time.monotonic() + TIMEOUT
        while not is_so():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {TIMEOUT} s: {what}")
            time.sleep(0.01)


def _count(dask_worker: Any) -> int:
    return len(dask_worker.data)


@contextlib.contextmanager
def site(spec: Spec) -> Iterator[Site]:
    """Start a cluster in this process."""
    # distributed logs the beginning and end of every shuffle as a warning (2026.8.0, shuffle/_scheduler_plugin.py).
    logging.getLogger("distributed.shuffle").setLevel(logging.ERROR)
    settings = {"memory_limit": spec.memory_limit, "threads_per_worker": 1, "dashboard_address": ":0"}
    with LocalCluster(n_workers=spec.workers, **settings) as cluster, Client(cluster) as client:
        if not spec.has_amm:
            client.amm.stop()
        if spec.with_plugin:
            from dask_shm_plugin import SharedMemoryPlugin

            client.register_plugin(SharedMemoryPlugin(capacity=spec.capacity, born=spec.born))
        yield Site(client, spec)


@contextlib.contextmanager
def arms(spec: Spec, subject: Callable[..., Any] = site, *arguments: Any) -> Iterator[dict[str, Remote]]:
    """Start ``subject(spec, *arguments)`` without and with the plugin, in two processes."""
    with contextlib.ExitStack() as stack:
        specs = {arm: spec._replace(with_plugin=arm == "plugin") for arm in ARMS}
        yield {arm: stack.enter_context(remote(subject, one, *arguments)) for arm, one in specs.items()}


def in_turn(number: int, items: Iterable[K]) -> list[K]:
    """Return items from first to last in rounds of odd number, from last to first in others."""
    return list(items) if number % 2 else list(items)[::-1]


def take_turns(
    count: int,
    orders: dict[K, Callable[[int], Any]],
    before: dict[K, Callable[[int], Any]] | None = None,
    sequence: Callable[[int], Iterable[K]] | None = None,
    unmeasured: int = 1,
) -> dict[K, np.ndarray]:
    """Measure several things in turn, and return the results of each in ``count`` rounds.

    An order is called with the number of the round; rounds of negative numbers do not count. The orders in ``before`` come
    first in every round; ``sequence`` tells the names of the others by the number of the round (default: :func:`in_turn`).
    """
    all_orders = {**(before or {}), **orders}
    done: dict[K, list[Any]] = {name: [] for name in all_orders}
    for number in range(-unmeasured, count):
        for name in (*(before or ()), *(sequence(number) if sequence else in_turn(number, orders))):
            result = all_orders[name](number)
            done[name] += [result] if number >= 0 else []
    return {name: np.array(results) for name, results in done.items()}
