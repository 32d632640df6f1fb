"""The memory of a node stays within the sum of its workers' limits, however much the workers share."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
from clusters import local_cluster
from control_groups import ControlGroup, make_control_group
from distributed import Client
from observing import MIB, addresses, array, fresh, pids, totals, wait_until

from dask_shm_plugin.node import membership

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LIMIT = 500 * MIB
STEP = 64 * MIB
PART = 40 * MIB // 8

#: The limits of two workers, one step of trimming, and one array of the running task of each worker.
BOUND = 2 * LIMIT + STEP + 2 * 8 * PART


@contextmanager
def sampled(client: Client) -> Iterator[list[int]]:
    """Collect, every 50 ms, the private memory of all workers plus the pages of the arena, in bytes."""
    (arena,), workers, over, found = membership.all_arenas(), list(pids(client).values()), threading.Event(), []

    def sample() -> None:
        while not over.wait(0.05):
            with suppress(OSError):  # a worker has been restarted
                private = sum(arena.budget.private_memory(pid) for pid in workers)
                found.append(private + arena.segment.resident - arena._access.table.reserved_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


@pytest.fixture
def group() -> Iterator[ControlGroup | None]:
    """A control group for the workers, if this user may make one: the kernel kills beyond the bound."""
    group = None
    with suppress(pytest.skip.Exception):
        group = make_control_group(f"dask-shm-test-node-{os.getpid()}", BOUND)
    yield group
    if group is not None:
        wait_until(group.remove, "the group is empty")


def is_whole(value: np.ndarray, seed: int, size: int) -> bool:
    """Tell whether a value is the array of a seed."""
    return bool(np.array_equal(value, array(seed, size)))


@pytest.mark.long
def test_two_workers_stay_within_the_sum_of_their_limits(group: ControlGroup | None) -> None:
    """Both workers hold values worth twice their limits: these are spilled as without the plugin, and all are right."""
    with local_cluster(2, {"capacity": "4 GiB"}, memory_limit=f"{LIMIT} B") as client:
        a, b = addresses(client)
        before, made = pids(client), {}
        for pid in before.values() if group else ():
            group.enter(pid)
        with sampled(client) as found:
            for _ in range(25):
                seed = fresh()
                made[seed] = client.submit(array, seed, PART, workers=[a], allow_other_workers=True)
                assert client.submit(is_whole, made[seed], seed, PART, workers=[b]).result(timeout=60)
            used = totals(client)
            for seed, future in made.items():
                assert client.submit(is_whole, future, seed, PART, workers=[b], pure=False).result(timeout=60)
        assert pids(client) == before
        assert group is None or group.killed() == 0
        assert used.adopted + used.born > 5
        assert len(found) > 50
        assert max(found) <= BOUND


MADE: dict[str, Callable[[int], Any]] = {
    "bytes": lambda size: os.urandom(size),
    "text": lambda size: "x" * size,
    "numbers": lambda size: deque(range(size // 8)),  # not a list or set: Dask serializes each item of these
}


@pytest.mark.parametrize("kind", MADE)
def test_a_value_that_readers_copy_leaves_the_arena(two: Client, kind: str) -> None:
    """Owner and readers hold a copy each of such a value, so its block would only take memory."""
    a, b = addresses(two)
    before = totals(two)
    made = two.submit(MADE[kind], 4 * MIB, workers=[a], pure=False)
    kept = two.submit(lambda value: value, made, workers=[b], pure=False)
    assert two.submit(len, kept).result() == two.submit(len, made, workers=[a]).result()
    assert (totals(two) - before).published == 1
    wait_until(lambda: totals(two).used == 0, "only copies are left")
    assert two.gather(made) == two.gather(kept)


@pytest.fixture(scope="module")
def two(nothing_leaks: None) -> Iterator[Client]:
    """A client of two workers, for the whole module. Pruning is off, which would drop a block after some seconds."""
    with local_cluster(2) as client:
        client.run(lambda dask_worker: dask_worker.plugins["dask-shm"].half._running._pruning.stop())
        yield client
