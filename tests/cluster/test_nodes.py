"""Several nodes: each receives a value once, and holds one copy of it, whichever way the value takes."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusters import register
from distributed import Client, Queue, Variable, get_client, wait
from nodes import Driver, NodeCluster, node_cluster, why_no_nodes
from observing import MIB, known_workers, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(why_no_nodes()), reason=why_no_nodes() or "nodes are permitted"),
]

SIZE = 32 * MIB
#: What is sent beside the value: messages of Dask, and acknowledgements.
NOISE = 0.08


# ------------------------------------------------------------------------------------------ in the process of a client


def begin(client: Client) -> None:
    """Switch sharing on."""
    register(client, threshold="64 KiB", capacity="512 MiB")
    client.amm.stop()
    client.run(frame, 0)  # the libraries are loaded before anything is counted


def of(client: Client, node: str) -> list[str]:
    """Return the workers of a node."""
    return sorted(worker for worker in known_workers(client) if f"//{ADDRESSES[node]}:" in worker)


ADDRESSES = {"a": "10.77.0.2", "b": "10.77.0.3"}


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
    """Make a value on a, and let all workers of b need it at once."""
    future = made(client, make, seed)
    used = [client.submit(seen, future, workers=[worker], pure=False) for worker in of(client, "b")]
    assert client.gather(used) == [(total(make(seed)), True)] * 3
    return future


def replicated(client: Client, make: Callable[[int], Any], seed: int) -> Any:
    """Make a value on a, and replicate it to all workers."""
    future = made(client, make, seed)
    client.replicate([future])
    return future


def gathered(client: Client, make: Callable[[int], Any], seed: int) -> Any:
    """Make a value on a, and gather it in tasks of all workers of b at once."""
    future = made(client, make, seed)
    variable = Variable(f"value {seed}", client)
    variable.set(future)
    used = [client.submit(gather, f"value {seed}", workers=[worker], pure=False) for worker in of(client, "b")]
    assert client.gather(used) == [(total(make(seed)), True)] * 3
    variable.delete()  # it keeps the value
    return future


def gather(name: str) -> tuple[int, bool]:
    """Gather the value of a variable in a task."""
    client = get_client()
    Queue(name, client).put(1)
    wait_until(lambda: Queue(name, client).qsize() == 3, "all three are about to gather")
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
    return {node: sum(found[worker] for worker in of(client, node)) for node in ADDRESSES}


def used(client: Client) -> dict[str, int]:
    """Return the bytes of blocks on each node."""
    from dask_shm_plugin import stats

    found = stats(client)
    return {
        node: sum(arena["used"] for name, arena in found.items() if name.startswith(address + "-"))
        for node, address in ADDRESSES.items()
    }


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
    after = private(client)
    return Copies(
        {node: round(count / SIZE, 1) for node, count in used(client).items()},
        {node: round((after[node] - before[node]) / SIZE, 1) for node in ADDRESSES},
    )


def figures(client: Client, how: Callable[[Any], Any] = seen) -> dict[str, list[Any]]:
    """Return what all workers of each node see of the value that was moved."""
    return {
        node: client.gather([client.submit(how, KEPT[0], workers=[one], pure=False) for one in of(client, node)])
        for node in ADDRESSES
    }


# ------------------------------------------------------------------------------------------------------------ the tests


@dataclass
class Two:
    """Two nodes of three workers, and clients on the first of them and elsewhere."""

    cluster: NodeCluster
    clients: dict[str, Driver]

    def carried(self) -> dict[str, int]:
        """Return the bytes that each node has received so far."""
        return {name: node.carried()[0] for name, node in self.cluster.nodes.items()}


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    """Two nodes; the second has a small ``/dev/shm``, as in a container."""
    with node_cluster({"DASK_SHM_CRASHPOINTS": "1"}) as cluster:
        cluster.add("a")
        cluster.add("b", shm="64m")
        elsewhere = cluster.driver(cluster.head)
        elsewhere(begin)
        here = cluster.driver(cluster.nodes["a"])
        here(begin)
        yield Two(cluster, {"a": here, "elsewhere": elsewhere})


@pytest.fixture(autouse=True)
def forget_values(two: Two) -> Iterator[None]:
    """Drop the values of a test, whatever has become of it."""
    yield
    for client in two.clients.values():
        client(forget)


WAYS = [
    ("a", broadcast, array, {"a": 0.0, "b": 1.0}),
    ("elsewhere", broadcast, array, {"a": 1.0, "b": 1.0}),
    ("elsewhere", needed, array, {"a": 0.0, "b": 1.0}),
    ("elsewhere", replicated, array, {"a": 0.0, "b": 1.0}),
    ("elsewhere", gathered, array, {"a": 0.0, "b": 1.0}),
    # A DataFrame is pickled in more than one way.
    ("elsewhere", broadcast, frame, {"a": 1.0, "b": 1.0}),
    ("elsewhere", replicated, frame, {"a": 0.0, "b": 1.0}),
]


@pytest.mark.parametrize(
    ("where", "how", "make", "expected"),
    WAYS,
    ids=[f"{how.__name__}-{make.__name__}-{where}" for where, how, make, _ in WAYS],
)
def test_each_node_receives_a_value_once(
    two: Two, where: str, how: Callable[..., Any], make: Callable[[int], Any], expected: dict[str, float]
) -> None:
    """The wire carries the value once to each other node, and each node has one copy, in its arena."""
    undisturbed(lambda: moved_once(two, two.clients[where], how, make, expected))


def undisturbed(check: Callable[[], None]) -> None:
    """Make a check that must hold in one of three attempts: a worker that is late costs a transfer, but no value."""
    for _ in range(2):
        with suppress(AssertionError):
            return check()
    return check()


def moved_once(
    two: Two, client: Driver, how: Callable[..., Any], make: Callable[[int], Any], expected: dict[str, float]
) -> None:
    """Move a value, and check what the wires have carried and where the copies are."""
    seed = random.randrange(1 << 30)
    client(forget)
    before = two.carried()
    copies = client(move, how, make, seed)
    after = two.carried()
    seen_by_all = client(figures) if how is not gathered else None
    if how is not gathered and seen_by_all != dict.fromkeys("ab", [(total(make(seed)), True)] * 3):
        pytest.fail(f"wrong or private values: {seen_by_all}")
    final = two.carried()
    carried = {name: (after[name] - before[name]) / SIZE for name in after}
    assert carried == pytest.approx(expected, abs=NOISE)
    assert copies.arena == pytest.approx({"a": 1, "b": 1}, abs=0.1)
    if make is array:
        assert copies.private == pytest.approx({"a": 0, "b": 0}, abs=0.3)
    if how is not gathered:
        later = {name: (final[name] - after[name]) / SIZE for name in after}
        assert later == pytest.approx({"a": 0, "b": 0}, abs=NOISE)


# ---------------------------------------------------------------------------------------------------------- reused keys


def reuse(client: Client, rounds: int) -> int:
    """Let a key have one value after the other, and return how many times a worker has read another one."""
    every, wrong = [*of(client, "a"), *of(client, "b")], 0
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


def test_a_reused_key_never_gives_an_old_value(two: Two) -> None:
    """Neighbours may still have the old value of a key when others ask for its new one, on either node."""
    assert two.clients["elsewhere"](reuse, 30) == 0


# ---------------------------------------------------------------------------------------------------------------- deaths


def arm_death(client: Client, worker: str, moment: str, pause: float = 0) -> Path:
    """Let a worker be killed at a moment, some seconds after it has come to it; return a file that it makes before."""
    sign = Path(tempfile.mkdtemp()) / "sign"

    def arm() -> None:
        import os
        import signal
        import time

        from dask_shm_plugin import crashpoints

        def die() -> None:
            sign.touch()
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGKILL)

        crashpoints.arm(moment, die)

    client.run(arm, workers=[worker])
    return sign


def lose_receiver(client: Client, moment: str, seed: int) -> list[tuple[int, bool]]:
    """Kill the worker that receives a value for its node while its neighbours wait; return what these see."""
    future = made(client, array, seed)
    first, *others = of(client, "b")
    sign = arm_death(client, first, moment, pause=0.5)
    doomed = client.submit(seen, future, workers=[first], pure=False)
    wait_until(sign.exists, "it receives the value")
    result = client.gather([client.submit(seen, future, workers=[one], pure=False) for one in others])
    wait_until(lambda: first not in of(client, "b"), "it was killed")
    doomed.cancel()
    wait_until(lambda: len(of(client, "b")) == 3, "its nanny has started another one", seconds=60)
    return result


@pytest.mark.parametrize("moment", ["before receive", "before land", "after land"])
def test_neighbours_go_on_when_the_receiver_dies(two: Two, moment: str) -> None:
    """They ask the sender again: one of them receives the value, and the other one waits for that."""

    def check() -> None:
        client, seed = two.clients["elsewhere"], random.randrange(1 << 30)
        before = two.carried()
        if client(lose_receiver, moment, seed) != [(total(array(seed)), True)] * 2:
            pytest.fail("wrong or private values")
        assert two.carried()["b"] - before["b"] < (2 + NOISE) * SIZE

    undisturbed(check)


def lose_sender(client: Client, moment: str, seed: int) -> list[tuple[int, bool]]:
    """Kill the worker that sends a value of which its neighbour has a replica; return what the other node sees."""
    future = made(client, array, seed)
    first, second, _ = of(client, "a")
    client.replicate([future], workers=[first, second], n=2)
    arm_death(client, first, moment)
    result = client.gather([client.submit(seen, future, workers=[one], pure=False) for one in of(client, "b")])
    client.run(disarm)
    wait_until(lambda: len(of(client, "a")) == 3, "its nanny has started another one", seconds=60)
    return result


def disarm() -> None:
    """Let no worker be killed any more."""
    from dask_shm_plugin import crashpoints

    crashpoints.disarm()


@pytest.mark.parametrize("moment", ["before answer", "after answer"])
def test_the_other_node_gets_the_value_when_the_sender_dies(two: Two, moment: str) -> None:
    """All workers of the other node get the value from the sender's neighbour."""
    client, seed = two.clients["elsewhere"], random.randrange(1 << 30)
    assert client(lose_sender, moment, seed) == [(total(array(seed)), True)] * 3


def drop_forgotten(client: Client) -> None:
    """Drop the values of keys that the scheduler does not know any more.

    On stock Dask, a broadcast may end so, too: what is on its way to a worker when its client dies stays there.
    """

    def drop(dask_worker: Any, known: set[str]) -> None:
        from distributed.worker_state_machine import FreeKeysEvent

        dask_worker.handle_stimulus(FreeKeysEvent(keys=list(set(dask_worker.data) - known), stimulus_id="test"))

    def is_empty() -> bool:
        client.run(drop, known=client.run_on_scheduler(lambda dask_scheduler: set(dask_scheduler.tasks)))
        return not any(used(client).values())

    def stays_empty() -> bool:
        # The scheduler may still be sending what it has received from the dead client.
        return all((time.sleep(0.2), is_empty())[1] for _ in range(15))

    wait_until(stays_empty, lambda: f"the arenas are empty: {used(client)}", seconds=60)


def test_a_client_may_die_in_the_middle_of_a_broadcast(two: Two) -> None:
    """Its value is dropped on all nodes, but for the keys that Dask itself forgets, and other clients go on."""
    doomed = two.cluster.driver(two.cluster.head)
    doomed.begin(broadcast, array, 1)
    time.sleep(0.2)
    doomed.kill()
    client, seed = two.clients["elsewhere"], random.randrange(1 << 30)
    client(drop_forgotten)
    assert client(move, broadcast, array, seed).arena == pytest.approx({"a": 1, "b": 1}, abs=0.1)
    assert client(figures) == dict.fromkeys("ab", [(total(array(seed)), True)] * 3)
