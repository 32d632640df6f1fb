"""Workers and clients that stand still right before or right after each step that Dask sees: the others go on, and share."""

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

from dask_shm_plugin import membership, stats

pytestmark = pytest.mark.slow

MAKER, READER = 0, 1

STEPS = {
    MAKER: ("publish", "reserve", "write", "seal", "adopt", "answer"),
    READER: ("resolve", "acquire", "map"),
}
#: Whoever stands still there has the lock of the table.
IN_LOCK = {"reserve", "seal", "acquire"}
#: The reader has its value by then.
ANSWERED = {("after", "answer"), ("before", "adopt"), ("after", "adopt")}
CELLS = [
    pytest.param(victim, when, step, id=f"{('maker', 'reader')[victim]}: {when} {step}")
    for victim, steps in STEPS.items()
    for step in steps
    for when in ("before", "after")
]


@pytest.fixture(scope="module")
def cluster(nothing_leaks: None) -> Iterator[Client]:
    """A client of three workers that know crash points, for the whole module."""
    with local_cluster(3, env={"DASK_SHM_CRASHPOINTS": "1"}) as client:
        yield client


def stop_at(moment: str) -> None:
    """Let this process stand still at a moment."""
    from dask_shm_plugin import crashpoints

    # Sent to the process, it may be taken by another thread, and this one would go on for some microseconds.
    crashpoints.arm(moment, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGSTOP))


def sample(value: np.ndarray) -> float:
    """Read all of a value."""
    return float(value.sum())


def wait_until_stopped(pid: int) -> None:
    """Wait until a process stands still."""
    wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "it stands still", seconds=60)


def assert_others_work(client: Client, one: str, other: str, step: str) -> None:
    """Fail unless these two give each other right values: shared ones, or bytes where nobody can have the lock."""
    both_ways = [(one, other), (other, one)]
    if step in IN_LOCK:
        assert [move(client, *way, BIG) for way in both_ways] == [False, False]
    else:
        for way in both_ways:
            # Who was told that the lock is held waits for it again only when it was free once.
            wait_until(lambda way=way: move(client, *way, BIG), "they share", seconds=60)
    seed = fresh()
    np.testing.assert_array_equal(client.submit(array, seed, workers=[one]).result(timeout=60), array(seed))


def assert_nothing_is_left(client: Client) -> None:
    """Fail unless the table is sound, everybody is in it, and it holds nothing."""
    wait_until(lambda: totals(client).used == 0, lambda: f"the arena empties: {totals(client)}")
    wait_until(lambda: totals(client).members == 4, lambda: f"all are members, and nobody else: {totals(client)}")
    (arena,) = membership.all_arenas()
    arena.validate()


@pytest.mark.parametrize(("victim", "when", "step"), CELLS)
def test_a_worker_that_stands_still_at_a_step(cluster: Client, victim: int, when: str, step: str) -> None:
    """The two others work with each other meanwhile; what waits for it comes right when it goes on, and it shares again."""
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
    wait_until(lambda: move(cluster, places[victim], others[0], BIG), "it shares again", seconds=60)
    wait_until(lambda: move(cluster, others[0], places[victim], BIG), "others share with it", seconds=60)
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
def test_a_client_that_stands_still_while_it_scatters(cluster: Client, moment: str, tmp_path: Path) -> None:
    """All workers go on without it; when it goes on, its scatter does, and so does what it wants to know."""
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
    wait_until(lambda: move(cluster, a, b, BIG), "they share again", seconds=60)
    assert_nothing_is_left(cluster)
