"""How many copies of a large array exist, what crosses a socket, and how long it takes: with and without the plugin.

    python benchmarks/one_copy.py [--size "256 MiB"] [--workers 4] [--pairs 5] [--json PATH]

Two clusters with the same settings run at the same time, one with the plugin and one without, each in a process of its
own; they work in turn, never together, and who begins alternates. Each round makes one array of random numbers and moves
it in one of two ways:

broadcast
    ``scatter(x, broadcast=True, hash=False)`` and then, on every worker, a task that reads one element of every page.
fetch
    A worker makes ``x``. A task on a second worker, which reads one element of every page, fetches it; then the same on a
    third worker.

Memory is what ``Shmem`` of the machine and the ``RssAnon`` of the client's and the workers' processes have grown to
since the cluster was idle, as multiples of the array. (Freed pages of the arena stay warm, so growth is counted from the
start, not from the round before. Only for the cluster without the plugin is ``Shmem`` read again before each round, for
the other one's warm pages are not its own.) In a fetch the array that the first worker made counts, too: two copies
without the plugin, one with it.

Other programs that use shared memory or the loopback while this runs spoil its figures.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import distributed
from dask.utils import format_bytes, parse_bytes
from distributed import Client, LocalCluster
from machine import PAGE, field, loopback, make, read_pages, surroundings, warm_copy

from dask_shm_plugin import SharedMemoryPlugin

Round = dict[str, float]

WAYS = ("broadcast", "fetch")
ARMS = ("stock", "plugin")


# --------------------------------------------------------------------------------------------------------- one cluster


class Arm:
    """A cluster, with or without the plugin, and what it measures."""

    def __init__(self, client: Client, size: int, *, with_plugin: bool) -> None:
        self._client, self._size, self._with_plugin = client, size, with_plugin
        workers = client.scheduler_info(n_workers=-1)["workers"]
        self._workers = sorted(workers, key=lambda address: str(workers[address]["name"]))
        self._processes = [os.getpid(), *client.run(os.getpid).values()]
        for worker in self._workers:  # imports and connections are not what is measured
            small = client.submit(make, 0, PAGE, workers=[worker], pure=False)
            for reader in self._workers:
                client.submit(read_pages, small, workers=[reader], pure=False).result()
        small = client.scatter(make(0, PAGE), broadcast=True, hash=False)
        del small
        self._settle()
        self._shared, self._private = self._memory()

    def broadcast(self, seed: int) -> Round:
        """Give an array to all workers."""
        x = make(seed, self._size)
        with self._measured(own=x.nbytes) as figures:
            future = self._client.scatter(x, broadcast=True, hash=False)
            tasks = [self._client.submit(read_pages, future, workers=[w], pure=False) for w in self._workers]
            results = self._client.gather(tasks)
        assert results == [read_pages(x)] * len(self._workers), "wrong values"
        del future, tasks, x
        self._settle()
        return figures

    def fetch(self, seed: int) -> Round:
        """Let a worker make an array, and two others read it."""
        maker, first, second = (self._workers * 3)[:3]
        future = self._client.submit(make, seed, self._size, workers=[maker], pure=False)
        distributed.wait(future)
        with self._measured() as figures:
            results = [self._client.submit(read_pages, future, workers=[first], pure=False).result()]
        start = time.perf_counter()
        results.append(self._client.submit(read_pages, future, workers=[second], pure=False).result())
        figures["seconds_second_reader"] = time.perf_counter() - start
        assert results == [read_pages(make(seed, self._size))] * 2, "wrong values"
        del future
        self._settle()
        return figures

    @contextmanager
    def _measured(self, own: int = 0) -> Iterator[Round]:
        """Measure what happens inside; ``own`` bytes were there before."""
        figures: Round = {}
        if not self._with_plugin:
            self._shared, _ = self._memory()
        wire, start = loopback(), time.perf_counter()
        yield figures
        figures["seconds"] = time.perf_counter() - start
        figures["loopback"] = (loopback() - wire) / self._size
        shared, private = self._memory()
        figures["shared"] = (shared - self._shared) / self._size
        figures["private"] = (private - self._private - own) / self._size

    def _memory(self) -> tuple[int, int]:
        private = sum(field(f"/proc/{pid}/status", "RssAnon") for pid in self._processes)
        return field("/proc/meminfo", "Shmem"), private

    def _settle(self) -> None:
        """Wait until all workers have forgotten all data."""
        gc.collect()
        deadline = time.monotonic() + 30
        while any(self._client.run(lambda dask_worker: len(dask_worker.data)).values()):
            if time.monotonic() > deadline:
                raise TimeoutError("the workers still hold data")
            time.sleep(0.05)
        self._client.run(gc.collect)


def serve(pipe: Connection, with_plugin: bool, size: int, workers: int) -> None:
    """Run one cluster and do what the other end of the pipe asks for, until it says None."""
    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        client.amm.stop()  # replicas must still be there when memory is read
        if with_plugin:
            client.register_plugin(SharedMemoryPlugin())
        arm = Arm(client, size, with_plugin=with_plugin)
        ways: dict[str, Callable[[int], Round]] = {"broadcast": arm.broadcast, "fetch": arm.fetch}
        pipe.send("ready")
        while (order := pipe.recv()) is not None:
            way, seed = order
            pipe.send(ways[way](seed))


# -------------------------------------------------------------------------------------------------------------- both


def measure(size: int, workers: int, pairs: int) -> dict[str, Any]:
    """Run both clusters in turn and return all rounds."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for arm in ARMS:
        pipes[arm], theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, arm == "plugin", size, workers))
        process.start()
        theirs.close()
        processes.append(process)
        assert pipes[arm].recv() == "ready"
    rounds: dict[str, dict[str, list[Round]]] = {way: {arm: [] for arm in ARMS} for way in WAYS}
    try:
        for number in range(pairs):
            for way in WAYS:
                for arm in ARMS if number % 2 else reversed(ARMS):
                    pipes[arm].send((way, number))
                    rounds[way][arm].append(pipes[arm].recv())
    finally:
        for pipe in pipes.values():
            pipe.send(None)
        for process in processes:
            process.join()
    return rounds


def summary(rounds: dict[str, dict[str, list[Round]]]) -> dict[str, dict[str, Any]]:
    """Return the median of every figure, and of the ratio of times within each pair."""
    result: dict[str, dict[str, Any]] = {}
    for way, arms in rounds.items():
        names = list(arms["stock"][0])
        result[way] = {arm: {name: statistics.median(one[name] for one in arms[arm]) for name in names} for arm in ARMS}
        pairs = list(zip(arms["stock"], arms["plugin"], strict=True))
        result[way]["times_faster"] = {
            name: statistics.median(stock[name] / plugin[name] for stock, plugin in pairs)
            for name in names
            if name.startswith("seconds")
        }
    return result


def show(result: dict[str, Any]) -> None:
    """Print the figures for people."""
    around, size = result["surroundings"], format_bytes(result["size"])
    print(f"{size} of random numbers, {result['workers']} workers, {result['pairs']} pairs in turn, medians")
    print(
        f"Python {around['python']}, distributed {around['distributed']}, Linux {around['linux']}, "
        f"{around['processors']} processors, {format_bytes(around['memory'])}, {around['date']}"
    )
    print(f"a warm copy of {size} takes {result['warm_copy'] * 1000:.0f} ms here\n")
    titles = {
        "shared": "growth of Shmem, × array",
        "private": "growth of RssAnon, × array",
        "loopback": "over the loopback, × array",
        "seconds": "time, s",
        "seconds_second_reader": "second reader's time, s",
    }
    print(f"{'':<40}{'stock':>10}{'plugin':>10}{'faster by':>12}")
    for way, figures in result["summary"].items():
        for name, stock in figures["stock"].items():
            ratio = figures["times_faster"].get(name)
            line = f"{way}: {titles[name]:<{38 - len(way)}}{stock:>10.3f}{figures['plugin'][name]:>10.3f}"
            print(line + (f"{ratio:>10.1f} ×" if ratio else ""))
        firsts = [result["rounds"][way][arm][0]["seconds"] for arm in ARMS]
        print(f"{way}: {'the very first time, s':<{38 - len(way)}}{firsts[0]:>10.3f}{firsts[1]:>10.3f}", end="")
        print(f"{firsts[0] / firsts[1]:>10.1f} ×")


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_bytes, default="256 MiB", help="of the array (default: 256 MiB)")
    parser.add_argument("--workers", type=int, default=4, help="of each cluster (default: 4)")
    parser.add_argument("--pairs", type=int, default=5, help="rounds with and without the plugin (default: 5)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all rounds there")
    asked = parser.parse_args()
    if asked.workers < 3 or asked.pairs < 1 or asked.size < PAGE:
        parser.error("needs at least three workers, one pair, and one page")
    rounds = measure(asked.size, asked.workers, asked.pairs)
    result = {
        "size": asked.size,
        "workers": asked.workers,
        "pairs": asked.pairs,
        "surroundings": surroundings("distributed", "numpy"),
        "warm_copy": warm_copy(asked.size),
        "summary": summary(rounds),
        "rounds": rounds,
    }
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    main()
