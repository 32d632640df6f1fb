"""Three nodes: each receives a value once, whichever worker is asked for it, and holds one copy of it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from distributed import Client, get_worker, wait
from moving import (
    NOISE,
    SIZE,
    array,
    begin,
    broadcast,
    carried,
    forget,
    gathered,
    made,
    moved_once,
    needed,
    of,
    replicated,
    reuse,
    total,
    undisturbed,
)
from nodes import Driver, NodeCluster, node_cluster, why_no_nodes
from observing import known_workers, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(why_no_nodes()), reason=why_no_nodes() or "nodes are permitted"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[NodeCluster]:
    """Three nodes of three workers each."""
    with node_cluster() as cluster:
        for name in "abc":
            cluster.add(name, memory="1 GiB")
        yield cluster


@pytest.fixture(scope="module")
def clients(cluster: NodeCluster) -> dict[str, Driver]:
    """Clients on the first node, and on none that has workers."""
    drivers = {"elsewhere": cluster.driver(cluster.head), "a": cluster.driver(cluster.nodes["a"])}
    for driver in drivers.values():
        driver(begin)
    return drivers


@pytest.fixture(autouse=True)
def forget_values(clients: dict[str, Driver]) -> Iterator[None]:
    """Drop the values of a test, whatever has become of it."""
    yield
    for client in clients.values():
        client(forget)


def managed(client: Client, make: Callable[[int], Any], seed: int) -> Any:
    """Make a value on a, and let the Active Memory Manager replicate it to all workers at once."""
    future = made(client, make, seed)
    client.run_on_scheduler(replicate_everywhere, future.key)
    wait_until(
        lambda: len(client.who_has([future])[future.key]) == len(known_workers(client)), "all workers have the value"
    )
    return future


def replicate_everywhere(key: Any, dask_scheduler: Any) -> None:
    """Let the Active Memory Manager of a scheduler run once, with a policy that replicates a key to all workers."""
    from distributed.active_memory_manager import ActiveMemoryManagerExtension, ActiveMemoryManagerPolicy

    class Everywhere(ActiveMemoryManagerPolicy):
        def run(self) -> Any:
            task = self.manager.scheduler.tasks[key]
            for _ in range(len(dask_scheduler.workers) - len(task.who_has)):
                yield "replicate", task, None

    manager = ActiveMemoryManagerExtension(dask_scheduler, {Everywhere()}, register=False, start=False)
    manager.run_once()


@pytest.mark.parametrize(
    ("where", "how", "first"),
    [
        ("a", broadcast, 0.0),
        ("elsewhere", broadcast, 1.0),
        ("elsewhere", needed, 0.0),
        ("elsewhere", gathered, 0.0),
        ("elsewhere", replicated, 0.0),
        ("elsewhere", managed, 0.0),
    ],
)
def test_each_of_three_nodes_receives_a_value_once(
    cluster: NodeCluster, clients: dict[str, Driver], where: str, how: Callable[..., Any], first: float
) -> None:
    """While the value travels, workers of one node ask holders on two other nodes."""
    expected = {"a": first, "b": 1.0, "c": 1.0}
    undisturbed(lambda: moved_once(cluster, clients[where], how, array, expected))


def stolen(client: Client, seed: int) -> tuple[list[str], bool]:
    """Let slow tasks need a value, and return on which workers they ran, and whether their results were right."""
    future = made(client, array, seed)
    ran = client.gather([client.submit(use_slowly, future, pure=False) for _ in range(60)])
    wait(future)
    return sorted({worker for worker, _ in ran}), {figure for _, figure in ran} == {total(array(seed))}


def use_slowly(value: Any) -> tuple[str, int]:
    """Use a value for long enough that other nodes take a part of the tasks."""
    time.sleep(0.1)
    return get_worker().address, total(value)


def test_tasks_that_are_stolen_bring_a_value_to_a_node_once(cluster: NodeCluster, clients: dict[str, Driver]) -> None:
    """Workers of other nodes steal one task after the other, and each of them needs the value."""

    def check() -> None:
        client, seed = clients["elsewhere"], random.randrange(1 << 30)
        before = carried(cluster)
        ran, are_right = client(stolen, seed)
        after = carried(cluster)
        if not are_right:
            pytest.fail("wrong values")
        reached = {name: bool(set(ran) & set(client(of, name))) for name in cluster.nodes}
        assert any(reached[name] for name in "bc")
        by_wire = {name: (after[name] - before[name]) / SIZE for name in "bc"}
        assert all(amount < 1 + NOISE for amount in by_wire.values()), by_wire
        assert all(by_wire[name] > 0.9 for name in "bc" if reached[name])

    undisturbed(check)


def test_a_key_that_is_reused_a_thousand_times_never_gives_an_old_value(clients: dict[str, Driver]) -> None:
    """Makers and readers are any workers of three nodes, and many of them still have earlier values of the key."""
    assert clients["elsewhere"](reuse, 1000) == 0
