"""Clusters that do what they are told: each in a process of its own, any number of them at the same time.

Only one of them works at a time; so what is compared is measured in turn, on the same machine in the same state.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from distributed import Client, Future, LocalCluster, wait
from machine import make

PATIENCE = 60


class Spec(NamedTuple):
    """What a cluster is to be like."""

    workers: int = 4
    with_plugin: bool = True
    memory_limit: str = "2 GiB"


class Site:
    """A cluster, in its own process."""

    def __init__(self, client: Client, *, with_plugin: bool) -> None:
        self.client, self.with_plugin = client, with_plugin
        workers = client.scheduler_info(n_workers=-1)["workers"]
        self.workers = sorted(workers, key=lambda address: int(workers[address]["name"]))

    def put_on(self, worker: str, seed: int, size: int) -> Future:
        """Let a worker make an array, and wait until it is there."""
        future = self.client.submit(make, seed, size, workers=[worker], pure=False)
        wait(future)
        return future

    def read_on(self, worker: str, future: Future, read: Callable[[Any], Any]) -> Any:
        """Let a worker read a value, and return what it says."""
        return self.client.submit(read, future, workers=[worker], pure=False).result()

    def leave_to(self, owner: str, future: Future) -> None:
        """Let all workers but one forget a value."""

        def forget(dask_scheduler: Any) -> None:
            others = [worker.address for worker in dask_scheduler.tasks[future.key].who_has]
            for other in set(others) - {owner}:
                dask_scheduler.request_remove_replicas(other, [future.key], stimulus_id="targets")

        self.client.run_on_scheduler(forget)
        self.wait_until(
            lambda: list(self.client.who_has(future)[future.key]) == [owner], "the others have forgotten it"
        )
        holders = {owner: True}.items()
        self.wait_until(lambda: self._who_keeps(future) == holders, "the others have given it back")

    def _who_keeps(self, future: Future) -> Any:
        kept = self.client.run(lambda key, dask_worker: key in dask_worker.data, future.key)
        return {worker: is_kept for worker, is_kept in kept.items() if is_kept}.items()

    def settle(self) -> None:
        """Give everything back and wait until that is done, cycles of Python objects, too."""
        gc.collect()
        self.wait_until_forgotten()
        self.client.run(gc.collect)

    def wait_until_forgotten(self) -> None:
        """Wait until no worker has any data, and nothing is shared any more."""
        self.wait_until(lambda: not any(self.client.run(_count).values()), "all data are forgotten")
        if self.with_plugin:
            self.wait_until(lambda: self.shared()["blocks"] == 0, "all blocks are free")

    def shared(self) -> dict[str, Any]:
        """Return what the plugin says of the one arena."""
        from dask_shm_plugin import stats

        [arena] = stats(self.client).values()
        return arena

    def wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        """Ask again and again until the answer is yes."""
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {PATIENCE} s: {what}")
            time.sleep(0.01)


def _count(dask_worker: Any) -> int:
    return len(dask_worker.data)


class Remote:
    """A cluster, as it is seen from the process that gives orders."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function with the site and some arguments, there, and return what it returns."""
        self._pipe.send((function, arguments))
        return self._pipe.recv()

    def end(self) -> None:
        """Let it stop; harmless when it has ended by itself."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)


@contextlib.contextmanager
def sites(*specs: Spec) -> Iterator[list[Remote]]:
    """Start clusters and stop them."""
    context = multiprocessing.get_context("spawn")
    remotes, processes = [], []
    try:
        for spec in specs:
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, spec))
            process.start()
            theirs.close()
            processes.append(process)
            remotes.append(Remote(pipe))
            assert pipe.recv() == "ready"
        yield remotes
    finally:
        for remote in remotes:
            remote.end()
        for process in processes:
            process.join()


def _serve(pipe: Connection, spec: Spec) -> None:
    with (
        LocalCluster(
            n_workers=spec.workers, threads_per_worker=1, memory_limit=spec.memory_limit, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        client.amm.stop()  # who holds what is ours to say
        if spec.with_plugin:
            from dask_shm_plugin import SharedMemoryPlugin

            client.register_plugin(SharedMemoryPlugin())
        site = Site(client, with_plugin=spec.with_plugin)
        pipe.send("ready")
        while (order := pipe.recv()) is not None:
            function, arguments = order
            pipe.send(function(site, *arguments))
