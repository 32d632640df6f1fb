"""Two nodes: a shuffle goes through the arena within each node, and only what is for the other node over the wire."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from clusters import register
from distributed import Client, wait
from nodes import Driver, NodeCluster, node_cluster, why_no_nodes
from observing import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_no_nodes()), reason=why_no_nodes() or "nodes are permitted"),
]

SIDE, CHUNKS = 2048, 8
SIZE = SIDE * SIDE * 8
#: What is sent beside the shards: messages of Dask, and acknowledgements.
NOISE = 0.1


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[NodeCluster, Driver]]:
    """Two nodes with two workers each, and a client on the scheduler's node."""
    with node_cluster() as cluster:
        for name in "ab":
            cluster.add(name, 2)
        yield cluster, cluster.driver(cluster.head)


def prepare(client: Client, seed: int) -> None:
    """Make an array of rows on the workers."""
    with dask.config.set({"array.chunk-size": "1 B"}):
        PREPARED[:] = [da.random.default_rng(seed).random((SIDE, SIDE), chunks=(SIDE // CHUNKS, SIDE)).persist()]
    wait(PREPARED[0])


PREPARED: list[Any] = []


def rechunk(client: Client) -> None:
    """Change it to columns."""
    with dask.config.set({"array.chunk-size": "1 B", "array.rechunk.method": "p2p"}):
        PREPARED.append(PREPARED[0].rechunk((SIDE, SIDE // CHUNKS)).persist())
    wait(PREPARED[1])


def is_right(client: Client) -> bool:
    """Compare, and drop both arrays."""
    before, after = (part.compute() for part in PREPARED)
    PREPARED.clear()
    return np.array_equal(before, after)


def shuffled(client: Client) -> tuple[int, int]:
    """Return messages and bytes of shuffles that went through the arenas."""
    from dask_shm_plugin import stats

    arenas = stats(client).values()
    return sum(one["shuffled"]["count"] for one in arenas), sum(one["shuffled"]["bytes"] for one in arenas)


def is_empty(client: Client) -> bool:
    """Return whether nothing is left in the arenas."""
    from dask_shm_plugin import stats

    return not any(arena["used"] for arena in stats(client).values())


def carried(cluster: NodeCluster) -> int:
    """Return the bytes that the two nodes have sent so far."""
    return sum(node.carried()[1] for node in cluster.nodes.values())


def switch_on(client: Client) -> None:
    """Register the plugin."""
    register(client, threshold="64 KiB", capacity="512 MiB")


def test_only_parts_for_the_other_node_go_over_the_wire(two: tuple[NodeCluster, Driver]) -> None:
    """As many bytes as with stock Dask: half of the array."""
    cluster, driver = two
    sent = []
    for is_on in (False, True):
        if is_on:
            driver(switch_on)
        driver(prepare, is_on)
        before = carried(cluster)
        driver(rechunk)
        sent.append(carried(cluster) - before)
        if is_on:
            count, size = driver(shuffled)
            assert count > 0
            assert size == SIZE // 4  # the other half is for workers of the node, of which each keeps its own part
        assert driver(is_right)
    assert max(sent) < (1 / 2 + NOISE) * SIZE
    assert sent[1] < sent[0] + NOISE * SIZE
    assert sent[1] > SIZE / 2
    wait_until(lambda: driver(is_empty), "the arenas empty")
