"""Several nodes: each receives a value once, and holds one copy of it, whichever way the value takes."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from distributed import Client, get_worker
from moving import (
    NOISE,
    SIZE,
    array,
    begin,
    broadcast,
    carried,
    forget,
    frame,
    gathered,
    made,
    moved_once,
    needed,
    of,
    replicated,
    reuse,
    seen,
    total,
    undisturbed,
    used,
)
from nodes import Driver, NodeCluster, node_cluster, why_no_nodes
from observing import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(why_no_nodes()), reason=why_no_nodes() or "nodes are permitted"),
]

# ------------------------------------------------------------------------------------------------------------ the tests


@dataclass
class Two:
    """Two nodes of three workers, and clients on the first of them and elsewhere."""

    cluster: NodeCluster
    clients: dict[str, Driver]


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
    undisturbed(lambda: moved_once(two.cluster, two.clients[where], how, make, expected))


def fetch_back(client: Client, seed: int) -> tuple[bool, list[tuple[int, bool]]]:
    """Send a value that its owner may still change to b, and let the owner's neighbour have it from there."""
    owner, neighbour, _ = of(client, "a")
    other = of(client, "b")[0]
    future = client.submit(aliased, seed, workers=[owner], pure=False)
    assert client.submit(seen, future, workers=[other], pure=False).result() == (total(array(seed)), True)
    is_missing = bool(client.run_on_scheduler(gather_on, neighbour, future.key, other))
    figures = client.gather([client.submit(seen, future, workers=[one], pure=False) for one in (neighbour, other)])
    client.run(drop_alias, workers=[owner])
    return is_missing, figures


def aliased(seed: int) -> Any:
    """Make a value to which the worker keeps a reference."""
    get_worker().alias = array(seed)
    return get_worker().alias


def drop_alias(dask_worker: Any) -> None:
    """Drop that reference."""
    del dask_worker.alias


async def gather_on(worker: str, key: Any, holder: str, dask_scheduler: Any) -> Any:
    """Let a worker fetch a value from a holder; return the keys that it has not got."""
    return await dask_scheduler.gather_on_worker(worker, {key: [holder]})


def test_a_value_does_not_come_back_to_its_node(two: Two) -> None:
    """It is found in the arena, although its owner does not list it, because something else reaches it there."""
    seed = random.randrange(1 << 30)
    before = carried(two.cluster)
    assert two.clients["elsewhere"](fetch_back, seed) == (False, [(total(array(seed)), True)] * 2)
    after = carried(two.cluster)
    by_wire = {name: (after[name] - before[name]) / SIZE for name in after}
    assert by_wire == pytest.approx({"a": 0, "b": 1}, abs=NOISE)


# ------------------------------------------------------------------------------------------------------ stopped senders


def pass_by(client: Client, seed: int) -> tuple[bool, list[tuple[int, bool]]]:
    """Let a worker of b ask a stopped worker for a value, and then its neighbour another one, which answers."""
    (maker, stopped, third), (first, second, _) = of(client, "a"), of(client, "b")
    future = client.submit(array, seed, workers=[maker], pure=False)
    assert client.submit(seen, future, workers=[stopped], pure=False).result() == (total(array(seed)), True)
    client.run(be_patient, 1000.0, workers=[second])
    pid = client.run(os.getpid, workers=[stopped])[stopped]
    client.run(os.kill, pid, signal.SIGSTOP, workers=[third])
    waiting = Thread(target=lambda: client.run_on_scheduler(gather_on, first, future.key, stopped))
    try:
        waiting.start()
        wait_until(lambda: client.run(is_asking, future.key, workers=[first])[first], "the first one asks")
        is_missing = bool(client.run_on_scheduler(gather_on, second, future.key, maker))
    finally:
        client.run(os.kill, pid, signal.SIGCONT, workers=[third])
        waiting.join()
        client.run(be_patient, 10.0, workers=[second])
    return is_missing, client.gather(
        [client.submit(seen, future, workers=[one], pure=False) for one in of(client, "b")]
    )


def be_patient(seconds: float) -> None:
    """Let a worker wait so long for its neighbours."""
    from dask_shm_plugin.transfer import asking

    asking._PATIENCE_S = seconds


def is_asking(key: Any) -> bool:
    """Return whether the worker of this process is asking another node for a key."""
    from dask_shm_plugin.node import membership
    from dask_shm_plugin.values import index

    name = index.name_of("asking", key)
    return any(arena.directory.find(arena.member, name) is not None for arena in membership.all_arenas())


def test_a_neighbour_of_a_stopped_sender_is_not_waited_for(two: Two) -> None:
    """The worker asks its own sender while the other one is still stopped."""
    seed = random.randrange(1 << 30)
    assert two.clients["elsewhere"](pass_by, seed) == (False, [(total(array(seed)), True)] * 3)


# ---------------------------------------------------------------------------------------------------------- reused keys


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
        before = carried(two.cluster)
        if client(lose_receiver, moment, seed) != [(total(array(seed)), True)] * 2:
            pytest.fail("wrong or private values")
        assert carried(two.cluster)["b"] - before["b"] < (2 + NOISE) * SIZE

    undisturbed(check)


def lose_sender(client: Client, moment: str, seed: int) -> list[tuple[int, bool]]:
    """Kill the worker that sends a value of which its neighbour has a replica; return what the other node sees."""
    future = made(client, array, seed)
    first, second, _ = of(client, "a")
    client.replicate([future], workers=[first, second], n=2)
    arm_death(client, first, moment)
    result = client.gather([client.submit(seen, future, workers=[one], pure=False) for one in of(client, "b")])
    client.run(disarm, on_error="ignore")  # the scheduler may still know the dead one
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
    client = two.clients["elsewhere"]

    def check() -> None:
        client(forget)
        client(drop_forgotten)
        moved_once(two.cluster, client, broadcast, array, {"a": 1, "b": 1})

    undisturbed(check)
