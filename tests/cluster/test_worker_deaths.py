"""Workers and clients are killed right before or after each step that Dask sees: values are right, nothing is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress

import dask
import numpy as np
import pytest
from clusters import local_cluster
from distributed import Client, wait
from observing import BIG, addresses, array, fresh, outside, pids, totals, wait_until
from processes import environment, run_script

from dask_shm_plugin.node import membership

pytestmark = pytest.mark.slow

MAKER, READER = "maker", "reader"

STEPS = {
    MAKER: ("publish", "reserve", "write", "seal", "adopt", "answer"),
    READER: ("resolve", "acquire", "map"),
}
CELLS = [
    pytest.param(victim, f"{when} {step}", id=f"{victim}: {when} {step}")
    for victim, steps in STEPS.items()
    for step in steps
    for when in ("before", "after")
]


@pytest.fixture(scope="module")
def cluster(nothing_leaks: None) -> Iterator[Client]:
    """A client of two workers with crash points, for the whole module."""
    env = {"DASK_SHM_CRASHPOINTS": "1"}
    # Within this time, a cluster gives up a nanny whose worker dies twice.
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1h"}), local_cluster(2, env=env) as client:
        yield client


def die_at(moment: str) -> None:
    """Let this process be killed at a moment."""
    from dask_shm_plugin import crashpoints

    crashpoints.arm(moment, lambda: os.kill(os.getpid(), signal.SIGKILL))


def sample(value: np.ndarray) -> float:
    """Read all of a value."""
    return float(value.sum())


def alive(client: Client) -> set[int]:
    """Return the process ids of the workers; an empty set while a worker is dying."""
    with suppress(OSError):
        return set(pids(client).values())
    return set()


def assert_nothing_is_left(client: Client) -> None:
    """Fail unless the table is sound, and has neither blocks nor dead members."""
    wait_until(lambda: len(alive(client)) == 2, "both workers are there")
    wait_until(lambda: totals(client).members == 3, lambda: f"the dead are no members: {totals(client)}")
    wait_until(lambda: totals(client).used == 0, lambda: f"the arena empties: {totals(client)}")
    (arena,) = membership.all_arenas()
    arena.validate()


@pytest.mark.parametrize(("victim", "moment"), CELLS)
def test_a_worker_killed_at_a_step_leaves_right_values_and_an_empty_arena(
    cluster: Client, victim: str, moment: str
) -> None:
    """Dask makes lost values again, and each reader gets the right value."""
    seed, before = fresh(), alive(cluster)
    place = dict(zip((MAKER, READER), addresses(cluster), strict=True))
    # The other worker may run the task when this one is dead.
    made = cluster.submit(outside, array, seed, workers=[place[MAKER]], allow_other_workers=True)
    wait(made)
    cluster.run(die_at, moment, workers=[place[victim]])
    read = cluster.submit(sample, made, workers=[place[READER]], allow_other_workers=True, pure=False)
    assert read.result(timeout=60) == sample(array(seed))
    wait_until(lambda: len(before - alive(cluster)) == 1, "the victim has died, and no other worker")
    del made, read
    assert_nothing_is_left(cluster)


CLIENT = """
import os, signal, sys
import numpy as np
from distributed import Client
from dask_shm_plugin import SharedMemoryPlugin, crashpoints

if __name__ == "__main__":
    if os.fork():
        os.wait()  # the script ends well, whatever becomes of the client
    else:
        client = Client("ADDRESS")
        client.register_plugin(SharedMemoryPlugin(threshold="64 KiB", capacity="256 MiB"))
        crashpoints.arm("MOMENT hand over", lambda: os.kill(os.getpid(), signal.SIGKILL))
        client.scatter(np.random.default_rng(0).random(SIZE), broadcast=True)
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_client_killed_during_a_scatter_leaves_an_empty_arena(cluster: Client, moment: str) -> None:
    """Its handles may have arrived or not: the scheduler forgets the client, and the keys that it wanted."""
    script = CLIENT.replace("ADDRESS", cluster.scheduler.address).replace("MOMENT", moment).replace("SIZE", str(BIG))
    run_script(script, env=environment({"DASK_SHM_CRASHPOINTS": "1"}))
    assert_nothing_is_left(cluster)
    seed = fresh()
    future = cluster.scatter(array(seed), broadcast=True)
    assert cluster.submit(sample, future).result() == sample(array(seed))
    del future
    assert_nothing_is_left(cluster)
