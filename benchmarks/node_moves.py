"""The calls of `nodes.py`, in the process of a client on a node."""

from __future__ import annotations

import collections
import time
from typing import Any

import machine
from distributed import Client, get_worker, wait

KEPT: list[Any] = []
TASKS, SLEEP_S = 40, 0.05


def begin(client: Client, arm: str) -> None:
    """Switch sharing on, or not, or without receiving into the arena."""
    if arm != "stock":
        from dask_shm_plugin import SharedMemoryPlugin

        client.register_plugin(SharedMemoryPlugin())
    if arm == "copying":
        client.run(_receive_into_private_memory)
    client.amm.stop()


def _receive_into_private_memory() -> None:
    from dask_shm_plugin.transfer import receiving

    receiving._MIN_BYTES = 1 << 62


def workers(client: Client) -> dict[str, list[str]]:
    """Return the workers by the address of their node."""
    found: dict[str, list[str]] = {}
    for worker in client.sync(client.scheduler.identity, n_workers=-1)["workers"]:
        found.setdefault(worker.split("//")[1].split(":")[0], []).append(worker)
    return {node: sorted(there) for node, there in sorted(found.items())}


def prepare(client: Client, way: str, size: int, seed: int) -> None:
    """Make the array, where the way begins."""
    if way.startswith("broadcast"):
        KEPT.append(machine.make(seed, size))
    else:
        first = next(iter(workers(client).values()))[0]
        KEPT.append(client.submit(machine.make, seed, size, workers=[first], pure=False))
        wait(KEPT[0])


def move(client: Client, way: str) -> float:
    """Move the array; return the seconds that it takes."""
    begun = time.perf_counter()
    if way.startswith("broadcast"):
        KEPT.append(client.scatter(KEPT[0], broadcast=True, hash=False))
    elif way == "fan":
        _, *others = workers(client).values()
        client.gather(
            [client.submit(machine.read_pages, KEPT[0], workers=[w], pure=False) for ws in others for w in ws]
        )
    elif way == "tasks":
        KEPT.append(client.gather([client.submit(score, KEPT[0], number, pure=False) for number in range(TASKS)]))
    else:
        client.replicate(KEPT)
    return time.perf_counter() - begun


def score(array: Any, number: int) -> tuple[str, float]:
    """Read a little of an array, sleep, and return the worker's address and what was read."""
    time.sleep(SLEEP_S)
    return get_worker().address, float(array[number])


def ran(client: Client) -> dict[str, list[int]]:
    """Return how many of the tasks each worker of each node ran."""
    counts = collections.Counter(address for address, _ in KEPT[1])
    return {node: [counts[worker] for worker in there] for node, there in workers(client).items()}


def private(client: Client) -> dict[str, int]:
    """Return the private memory of the workers of each node."""
    found = client.run(lambda: machine.field("/proc/self/status", "RssAnon"))
    return {node: sum(found[worker] for worker in there) for node, there in workers(client).items()}


def blocks(client: Client) -> dict[str, int]:
    """Return the bytes of blocks in the arena of each node."""
    from dask_shm_plugin import stats

    return {name.partition("-")[0]: arena["used"] for name, arena in stats(client).items()}


def forget(client: Client) -> None:
    """Drop the array."""
    KEPT.clear()
