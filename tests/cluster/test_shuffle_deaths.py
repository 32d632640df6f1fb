"""A worker is killed right before or after each step of a shuffle: results are right, and nothing is left."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import suppress

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from clusters import local_cluster
from distributed import Client
from observing import addresses, fresh, pids, totals, wait_until

from dask_shm_plugin.node import membership

pytestmark = pytest.mark.slow

STEPS = ("reserve", "seal", "pack arrays", "send shards", "open parcel", "acquire", "keep shards", "read shards")
CELLS = [
    *(("rechunk", f"after {step}") for step in STEPS),
    ("rechunk", "before pack arrays"),
    ("shuffle", "after pack table"),
    ("shuffle", "after keep shards"),
    ("shuffle", "after read shards"),
]


@pytest.fixture(scope="module")
def cluster(nothing_leaks: None) -> Iterator[Client]:
    """A client of three workers with crash points, for the whole module."""
    config = {
        "distributed.deploy.lost-worker-timeout": "1h",
        "distributed.scheduler.allowed-failures": 10,
        "array.rechunk.method": "p2p",
        "array.chunk-size": "1 B",
        "dataframe.shuffle.method": "p2p",
    }
    with dask.config.set(config), local_cluster(3, env={"DASK_SHM_CRASHPOINTS": "1"}) as client:
        yield client


def pack_all_and_die_at(moment: str | None) -> None:
    """Let this worker put shards of any size into the arena, and let it be killed at a moment."""
    from dask_shm_plugin import crashpoints
    from dask_shm_plugin.shuffling import sending

    sending._MIN_PARCEL_BYTES = 1
    if moment:
        crashpoints.arm(moment, lambda: os.kill(os.getpid(), signal.SIGKILL), skip=2)


def alive(client: Client) -> set[int]:
    """Return the process ids of the workers; an empty set while a worker is dying."""
    with suppress(OSError):
        return set(pids(client).values())
    return set()


def is_empty(client: Client) -> bool:
    """Return whether no block is left once Python has looked for cycles; connections to the dead may still fail later."""
    client.run(gc.collect)
    return totals(client).used == 0


@pytest.mark.parametrize(("kind", "moment"), CELLS, ids=str)
def test_a_worker_killed_at_a_step_of_a_shuffle_leaves_right_results_and_an_empty_arena(
    cluster: Client, kind: str, moment: str
) -> None:
    """Dask starts the shuffle again; what the dead worker held, and what was kept for the lost run, is given back."""
    wait_until(lambda: len(alive(cluster)) == 3, "all workers are there")
    before = alive(cluster)
    cluster.run(pack_all_and_die_at, None)
    cluster.run(pack_all_and_die_at, moment, workers=addresses(cluster)[:1])
    seed = fresh()
    if kind == "rechunk":
        whole = np.random.default_rng(seed).random((96, 96))
        got = da.from_array(whole, (8, 96), name=f"death-{seed}").rechunk((96, 8)).compute(retries=3)
        np.testing.assert_array_equal(got, whole)
    else:
        rows = pd.DataFrame({"k": np.random.default_rng(seed).integers(0, 40, 2000), "v": np.arange(2000)})
        got = dd.from_pandas(rows, npartitions=12).shuffle("k").compute(retries=3)
        pd.testing.assert_frame_equal(got.sort_index(), rows)
    del got
    wait_until(lambda: len(before - alive(cluster)) == 1, "the victim has died, and no other worker")
    wait_until(lambda: len(alive(cluster)) == 3, "it was started again")
    wait_until(lambda: totals(cluster).members == 4, lambda: f"the dead are no members: {totals(cluster)}")
    wait_until(lambda: is_empty(cluster), lambda: f"the arena empties: {totals(cluster)}")
    (arena,) = membership.all_arenas()
    arena.validate()
