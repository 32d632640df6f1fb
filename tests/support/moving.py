"""Ways of a value between nodes, in the process of a client: move it, and count its copies."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from clusters import register
from distributed import Client, Queue, Variable, get_client, wait
from nodes import Driver, NodeCluster
from observing import MIB, known_workers, wait_until

SIZE = 32 * MIB
#: What is sent beside the value: messages of Dask, and acknowledgements.
NOISE = 0.08


def begin(client: Client) -> None:
    """Switch sharing on."""
    register(client, threshold="64 KiB", capacity="512 MiB")
    client.amm.stop()
    client.run(frame, 0)  # the libraries are loaded before anything is counted


def of(client: Client, node: str) -> list[str]:
    """Return the workers of a node."""
    return sorted(worker for worker in known_workers(client) if f"//{ADDRESSES[node]}:" in worker)


ADDRESSES = {"a": "10.77.0.2", "b": "10.77.0.3", "c": "10.77.0.4"}


def nodes(client: Client) -> list[str]:
    """Return the nodes that have workers."""
    return [node for node in ADDRESSES if of(client, node)]


def array(seed: int, size: int = SIZE) -> np.ndarray:
    """Return random doubles; every page is touched."""
    return np.random.default_rng(seed).random(size // 8)


def frame(seed: int) -> Any:
    """Return a DataFrame of numbers."""
    import pandas as pd

    return pd.DataFrame(np.random.default_rng(seed).random((SIZE // 16, 2)), columns=["x", "y"])


def total(value: Any) -> int:
    """Return a figure of all bytes of a value, whichever alignment they have."""
    return int(np.ascontiguousarray(value).view("u8").sum())


def seen(value: Any) -> tuple[int, bool]:
    """Return the figure of a value, and whether it lies in the arena."""
    from dask_shm_plugin import is_shared

    return total(value), is_shared(value)


def broadcast(client: Client, make: Callable[[int], Any], seed: int) -> Any:
    """Scatter a value to all workers."""
    return client.scatter(make(seed), broadcast=True, hash=False)


def made(client: Client, make: Callable[[int], Any], seed: int) -> Any:
    """Make a value on the first worker of node a."""
    future = client.submit(make, seed, workers=of(client, "a")[:1], pure=False)
    wait(future)
    return future


def needed(client: Client, make: Callable[[int], Any], seed: int) -> Any:
    """Make a value on a, and let all workers of the other nodes need it at once."""
    future = made(client, make, seed)
    others = [worker for node in nodes(client)[1:] for worker in of(client, node)]
    used = [client.submit(seen, future, workers=[worker], pure=False) for worker in others]
    assert client.gather(used) == [(total(make(seed)), True)] * len(others)
    return future


def replicated(client: Client, make: Callable[[int], Any], seed: int) -> Any:
    """Make a value on a, and replicate it to all workers."""
    future = made(client, make, seed)
    client.replicate([future])
    return future


def gathered(client: Client, make: Callable[[int], Any], seed: int) -> Any:
    """Make a value on a, and gather it in tasks of all workers of the other nodes at once."""
    future = made(client, make, seed)
    variable = Variable(f"value {seed}", client)
    variable.set(future)
    others = [worker for node in nodes(client)[1:] for worker in of(client, node)]
    name, count = f"value {seed}", len(others)
    used = [client.submit(gather, name, count, workers=[worker], pure=False) for worker in others]
    assert client.gather(used) == [(total(make(seed)), True)] * count
    variable.delete()  # it keeps the value
    return future


def gather(name: str, count: int) -> tuple[int, bool]:
    """Gather the value of a variable in a task, when as many tasks are about to."""
    client = get_client()
    Queue(name, client).put(1)
    wait_until(lambda: Queue(name, client).qsize() == count, "all are about to gather")
    return seen(client.gather(Variable(name, client).get(), direct=True))


@dataclass(frozen=True)
class Copies:
    """The copies of a value on each node: in the arena, and private ones."""

    arena: dict[str, float]
    private: dict[str, float]


def private(client: Client) -> dict[str, int]:
    """Return the private memory of all workers of each node."""
    from observing import private_memory

    found = client.run(private_memory)
    return {
        node: sum(count for worker, count in found.items() if f"//{address}:" in worker)
        for node, address in ADDRESSES.items()
        if any(f"//{address}:" in worker for worker in found)
    }


def used(client: Client) -> dict[str, int]:
    """Return the bytes of blocks on each node."""
    from dask_shm_plugin import stats

    found = stats(client)
    return {
        node: sum(arena["used"] for name, arena in found.items() if name.startswith(address + "-"))
        for node, address in ADDRESSES.items()
        if any(name.startswith(address + "-") for name in found)
    }


def idle(client: Client) -> int:
    """Return the bytes of all workers' chunks that wait for an array."""
    from dask_shm_plugin.births import switch

    return sum(figures.idle + figures.bare for figures in client.run(switch.figures).values() if figures is not None)


KEPT: list[Any] = []


def forget(client: Client) -> None:
    """Drop the value that was moved."""
    KEPT.clear()


def move(client: Client, how: Callable[..., Any], make: Callable[[int], Any], seed: int) -> Copies:
    """Move a value and keep its future; return the copies of it that this has made."""
    wait_until(lambda: not any(used(client).values()), lambda: f"the arenas are empty: {used(client)}")
    before = private(client)
    KEPT.append(how(client, make, seed))
    with suppress(AssertionError):
        wait_until(lambda: sum(private(client).values()) - sum(before.values()) < SIZE / 2, "owners adopt", seconds=1)
    wait_until(lambda: idle(client) == 0, "no chunk waits for an array")
    after = private(client)
    return Copies(
        {node: round(count / SIZE, 1) for node, count in used(client).items()},
        {node: round((after[node] - before[node]) / SIZE, 1) for node in after},
    )


def figures(client: Client, how: Callable[[Any], Any] = seen) -> dict[str, list[Any]]:
    """Return what all workers of each node see of the value that was moved."""
    return {
        node: client.gather([client.submit(how, KEPT[0], workers=[one], pure=False) for one in of(client, node)])
        for node in nodes(client)
    }


def reuse(client: Client, rounds: int) -> int:
    """Let a key have one value after the other, and return how many times a worker has read another one."""
    every, wrong = sorted(known_workers(client)), 0
    for seed in range(rounds):
        maker, *readers = random.sample(every, 3)
        future = client.submit(array, seed, 256 << 10, key="reused", workers=[maker], pure=False)
        read = [client.submit(total, future, workers=[one], pure=False) for one in readers]
        wrong += sum(one != total(array(seed, 256 << 10)) for one in client.gather(read))
        del future, read
        # Stock Dask, too, gives the old value if the scheduler still knows the key. Workers may still have the value.
        wait_until(lambda: not client.run_on_scheduler(knows_key), "the scheduler forgets the key")
    return wrong


def knows_key(dask_scheduler: Any) -> bool:
    """Return whether the scheduler knows the key."""
    return "reused" in dask_scheduler.tasks


# ------------------------------------------------------------------------------------------- in the process of the tests


def carried(cluster: NodeCluster) -> dict[str, int]:
    """Return the bytes that each node has received so far."""
    return {name: node.carried()[0] for name, node in cluster.nodes.items()}


def undisturbed(check: Callable[[], None]) -> None:
    """Make a check that must hold in one of three attempts: a worker that is late costs a transfer, but no value."""
    for _ in range(2):
        with suppress(AssertionError):
            return check()
    return check()


def moved_once(
    cluster: NodeCluster,
    client: Driver,
    how: Callable[..., Any],
    make: Callable[[int], Any],
    expected: dict[str, float],
) -> None:
    """Move a value, and check what the wires have carried and where the copies are."""
    seed = random.randrange(1 << 30)
    client(forget)
    before = carried(cluster)
    copies = client(move, how, make, seed)
    after = carried(cluster)
    seen_by_all = client(figures) if how is not gathered else None
    if how is not gathered and seen_by_all != dict.fromkeys(before, [(total(make(seed)), True)] * 3):
        pytest.fail(f"wrong or private values: {seen_by_all}")
    final = carried(cluster)
    by_wire = {name: (after[name] - before[name]) / SIZE for name in after}
    assert by_wire == pytest.approx(expected, abs=NOISE)
    assert copies.arena == pytest.approx(dict.fromkeys(before, 1), abs=0.1)
    if make is array:
        assert copies.private == pytest.approx(dict.fromkeys(before, 0), abs=0.3)
    if how is not gathered:
        later = {name: (final[name] - after[name]) / SIZE for name in after}
        assert later == pytest.approx(dict.fromkeys(before, 0), abs=NOISE)
