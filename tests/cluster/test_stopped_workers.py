"""Workers and clients are stopped right before or after each step that Dask sees: the others go on, and share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from clusters import local_cluster
from distributed import Client, wait
from observing import BIG, addresses, array, fresh, pids, totals, wait_until
from processes import environment
from surroundings import move

from dask_shm_plugin import stats
from dask_shm_plugin.node import membership

pytestmark = pytest.mark.slow

MAKER, READER = 0, 1

STEPS = {
    MAKER: ("publish", "reserve", "write", "seal", "adopt", "answer"),
    READER: ("resolve", "acquire", "map"),
}
#: A process that is stopped at one of these steps holds the lock of the table.
IN_LOCK = {"reserve", "seal", "acquire"}
#: At these moments, the reader has its value already.
ANSWERED = {("after", "answer"), ("before", "adopt"), ("after", "adopt")}
CELLS = [
    pytest.param(victim, when, step, id=f"{('maker', 'reader')[victim]}: {when} {step}")
    for victim, steps in STEPS.items()
    for step in steps
    for when in ("before", "after")
]


@pytest.fixture(scope="module")
def cluster(nothing_leaks: None) -> Iterator[Client]:
    """A client of three workers with crash points, for the whole module."""
    with local_cluster(3, env={"DASK_SHM_CRASHPOINTS": "1"}) as client:
        yield client


def stop_at(moment: str) -> None:
    """Let this process be stopped at a moment."""
    from dask_shm_plugin import crashpoints

    # A signal to the process may reach another thread first, and this one would run on for some microseconds.
    crashpoints.arm(moment, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGSTOP))


def sample(value: np.ndarray) -> float:
    """Read all of a value."""
    return float(value.sum())


def wait_until_stopped(pid: int) -> None:
    """Wait until a process is stopped."""
    wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "the process is stopped", seconds=60)


def assert_others_work(client: Client, one: str, other: str, step: str) -> None:
    """Fail unless two workers exchange right values: shared, or as bytes while a stopped process has the lock."""
    both_ways = [(one, other), (other, one)]
    if step in IN_LOCK:
        assert [move(client, *way, BIG) for way in both_ways] == [False, False]
    else:
        for way in both_ways:
            # A process that has found the lock held does not wait for it again until it was free once.
            wait_until(lambda way=way: move(client, *way, BIG), "the two workers share", seconds=60)
    seed = fresh()
    np.testing.assert_array_equal(client.submit(array, seed, workers=[one]).result(timeout=60), array(seed))


def assert_nothing_is_left(client: Client) -> None:
    """Fail unless the table is sound, has all members and no others, and holds nothing."""
    wait_until(lambda: totals(client).used == 0, lambda: f"the arena empties: {totals(client)}")
    wait_until(
        lambda: totals(client).members == 4, lambda: f"the members are three workers and this client: {totals(client)}"
    )
    (arena,) = membership.all_arenas()
    arena.validate()


@pytest.mark.parametrize(("victim", "when", "step"), CELLS)
def test_a_stopped_worker_does_not_stop_the_others(cluster: Client, victim: int, when: str, step: str) -> None:
    """The other two share meanwhile; a read that waits for the worker ends when it goes on, and it shares again."""
    seed, before = fresh(), pids(cluster)
    places = addresses(cluster)
    others = [place for place in places if place != places[victim]]
    made = cluster.submit(array, seed, workers=[places[MAKER]])
    wait(made)
    cluster.run(stop_at, f"{when} {step}", workers=[places[victim]])
    read = cluster.submit(sample, made, workers=[places[READER]], pure=False)
    try:
        wait_until_stopped(before[places[victim]])
        assert_others_work(cluster, *others, step)
        assert not read.done() or (when, step) in ANSWERED
    finally:
        os.kill(before[places[victim]], signal.SIGCONT)
    assert read.result(timeout=60) == sample(array(seed))
    wait_until(lambda: move(cluster, places[victim], others[0], BIG), "the stopped worker shares again", seconds=60)
    wait_until(lambda: move(cluster, others[0], places[victim], BIG), "the others share with it", seconds=60)
    assert pids(cluster) == before
    del made, read
    assert_nothing_is_left(cluster)


CLIENT = """
import signal, threading
import numpy as np
from distributed import Client
from dask_shm_plugin import SharedMemoryPlugin, crashpoints

if __name__ == "__main__":
    with Client("ADDRESS") as client:
        client.register_plugin(SharedMemoryPlugin(threshold="64 KiB", capacity="256 MiB"))
        crashpoints.arm("MOMENT", lambda: signal.pthread_kill(threading.get_ident(), signal.SIGSTOP))
        value = np.random.default_rng(0).random(SIZE)
        future = client.scatter(value, broadcast=True)
        assert client.submit(np.sum, future).result() == np.sum(value)
"""


@pytest.mark.parametrize("moment", ["before hand over", "after hand over", "after reserve", "before seal"])
def test_a_client_that_is_stopped_during_a_scatter_does_not_stop_the_workers(
    cluster: Client, moment: str, tmp_path: Path
) -> None:
    """All workers go on without the client; when the client goes on, its scatter and its task succeed."""
    script = tmp_path / "client.py"
    script.write_text(
        CLIENT.replace("ADDRESS", cluster.scheduler.address).replace("MOMENT", moment).replace("SIZE", str(BIG))
    )
    a, b, c = sorted(addresses(cluster))
    step = moment.partition(" ")[2]
    env = environment({"DASK_SHM_CRASHPOINTS": "1"})
    with subprocess.Popen([sys.executable, str(script)], env=env) as process:
        try:
            wait_until_stopped(process.pid)
            for one, other in [(a, b), (b, c)]:
                assert_others_work(cluster, one, other, step)
            (figures,) = stats(cluster).values()
            assert (figures["used"] is None) == (step in IN_LOCK)
            assert figures["workers"] == [a, b, c]
            assert figures["sent"] if step in IN_LOCK else figures["published"]["count"]
            process.send_signal(signal.SIGCONT)
            assert process.wait(60) == 0
        finally:
            process.kill()
    wait_until(lambda: move(cluster, a, b, BIG), "the workers share again", seconds=60)
    assert_nothing_is_left(cluster)
