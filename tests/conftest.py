"""Fixtures: clusters with and without the plugin, and a check for leaks."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import dask
import pytest
from clusters import local_cluster
from distributed import Client
from observing import MIB, descriptors, mappings, names, own_descriptors, settle, shmem, used_by_strangers, wait_until

# Workers that are forked from a process with Dask imported start in a tenth of the time. Scripts and commands, which
# tests start as a user does, run in new processes.
WORKER_START_METHOD = "distributed.worker.multiprocessing-method"
dask.config.set({WORKER_START_METHOD: "forkserver"})

# The options that `.ci/run` gives to pytest are for this run, and not for runs of pytest that a test starts.
os.environ.pop("PYTEST_ADDOPTS", None)

#: Differences that are no leak: pages of other programs, sockets of asyncio's executors, and the like.
SLACK_BYTES = 8 * MIB
SLACK_DESCRIPTORS = 16


def new_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    """Return the threads of this process that did not exist before."""
    return [thread for thread in threading.enumerate() if thread not in before]


@pytest.fixture(scope="module", autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Check after the last cluster of a module has closed: no names, memory, descriptors or threads are left."""
    before = names(), mappings(), shmem(), descriptors(), own_descriptors(), set(threading.enumerate())
    yield
    # The first releases of Python 3.13 keep the object of each call of a `singledispatchmethod`. Here, it is a client.
    getattr(vars(Client)["_register_plugin"], "_method_cache", {}).clear()
    left = {
        "names": lambda: names() - before[0],
        "mappings": lambda: max(0, mappings() - before[1]),
        "MiB of shared memory": lambda: 0 if used_by_strangers() else max(0, shmem() - before[2] - SLACK_BYTES) / MIB,
        "descriptors": lambda: max(0, descriptors() - before[3] - SLACK_DESCRIPTORS),
        "descriptors of shared memory": lambda: own_descriptors() - before[4],
        "threads of the package": lambda: [one for one in new_threads(before[5]) if one.name.startswith("dask-shm")],
    }
    for what, count in left.items():
        # Clients are parts of cycles, and their threads may refer to them until they end: collect garbage each time.
        wait_until(
            lambda count=count: not (gc.collect(), count())[1],
            lambda what=what, count=count: f"{what} are left: {count()}",
        )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Function) -> None:
    """Drop the references to the fixtures of the test.

    A client keeps the messages that it sent, and so the values in them. pytest would keep the client until after the
    check of `nothing_leaks`.
    """
    item.funcargs.clear()


@pytest.fixture
def new_processes() -> Iterator[None]:
    """Start each worker as a new process: its output goes to the same place as that of this process now."""
    with dask.config.set({WORKER_START_METHOD: "spawn"}):
        yield


@pytest.fixture(scope="module")
def stock(nothing_leaks: None) -> Iterator[Client]:
    """Yield a client of two workers without the plugin, for a whole module."""
    with local_cluster(2, options=None) as client:
        yield client


@pytest.fixture(scope="module")
def cluster_of_four(nothing_leaks: None) -> Iterator[Client]:
    """Yield a client of four workers with the plugin, for a whole module."""
    with local_cluster(4) as client:
        yield client


@pytest.fixture
def four(cluster_of_four: Client) -> Client:
    """Return a client of four workers. Their arena holds no blocks of earlier tests."""
    settle(cluster_of_four)
    return cluster_of_four
