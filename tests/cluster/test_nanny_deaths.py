"""Nannies are killed at their steps, and commands as a whole: the survivors keep the arena, or it is gone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from clusters import OPTIONS, register
from distributed import Client
from observing import BIG, addresses, array, fresh, mappings, names, totals, wait_until
from processes import command, dask, environment, scheduler, workers
from surroundings import move

from dask_shm_plugin import stats
from dask_shm_plugin.node import membership

pytestmark = pytest.mark.slow

#: Runs in each nanny at its start: a signal arms a crash point, and makes the nanny's housekeeping the quickest.
ARMED = """
import os, pathlib, signal
from dask_shm_plugin import crashpoints
from dask_shm_plugin.arena import housekeeping

def arm(*_):
    housekeeping._INTERVAL_S = 0.01
    crashpoints.arm(pathlib.Path(os.environ["MOMENT"]).read_text(), lambda: os.kill(os.getpid(), signal.SIGKILL))

signal.signal(signal.SIGUSR1, arm)
if "DIE_AT_ONCE" in os.environ:
    arm()
"""


class Node:
    """One node of a cluster: commands, each with a nanny and a worker, are started and killed.

    Parameters
    ----------
    client
        A client in this process, which takes part.
    folder
        Holds the files that the nannies read.
    """

    def __init__(self, client: Client, folder: Path) -> None:
        self.client, self._moment, self._preload = client, folder / "moment", folder / "armed.py"
        self._preload.write_text(ARMED)
        self.commands = ExitStack()
        self.places: list[str] = []

    def _environment(self, **extra: str) -> dict[str, str]:
        return environment({"DASK_SHM_CRASHPOINTS": "1", "MOMENT": str(self._moment), **extra})

    def start(self) -> str:
        """Start a command, and return the address of its worker."""
        more = workers(self.client, "--preload-nanny", str(self._preload), env=self._environment())
        self.places += self.commands.enter_context(more)
        return self.places[-1]

    def die_at_start(self, moment: str) -> None:
        """Start a command whose nanny is killed at a moment, before it has a worker."""
        self._moment.write_text(moment)
        line = dask("worker", self.client.scheduler.address, "--host", "127.0.0.1", "--no-dashboard")
        with command(*line, "--preload-nanny", str(self._preload), env=self._environment(DIE_AT_ONCE="1")) as process:
            assert process.wait(60) == -signal.SIGKILL

    def die_at(self, moment: str, place: str) -> None:
        """Let the nanny of a worker be killed at a moment, and give it work that leads to that moment."""
        self._moment.write_text(moment)
        worker = psutil.Process(self.client.run(os.getpid, workers=[place])[place])
        nanny = psutil.Process(worker.ppid())
        (survivor,) = set(self.places) - {place}
        nanny.send_signal(signal.SIGUSR1)

        def is_dead() -> bool:
            # Another member may be the first to clean up. So there is new work until this nanny was the first.
            if nanny.is_running() and nanny.status() != psutil.STATUS_ZOMBIE:
                if "reclaim" in moment:
                    kill_members(nanny.children(recursive=True))
                else:
                    self.client.submit(array, fresh(), workers=[survivor]).result(60)
                return False
            return True

        wait_until(is_dead, "the nanny dies", seconds=60)
        self.places.remove(place)
        wait_until(lambda: addresses(self.client) == self.places, "the scheduler removes the dead worker", seconds=60)


def kill_members(processes: list[psutil.Process]) -> None:
    """Kill those of some processes that have joined an arena by now."""
    for process in processes:
        with suppress(OSError, psutil.NoSuchProcess):  # it is dead already
            if mappings(process.pid):
                process.kill()


@pytest.fixture(scope="module")
def node(nothing_leaks: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node of a cluster with the plugin, but without a command yet; at the end, no name of it may be left."""
    before = names()
    with scheduler() as address, Client(address) as client:
        client.amm.stop()
        register(client, **OPTIONS | {"warm": 0})
        node = Node(client, tmp_path_factory.mktemp("node"))
        yield node
        node.commands.close()
    wait_until(lambda: names() == before, "the last member removes all names")


def arena_id(client: Client) -> str:
    """Return the id of the only arena of the cluster."""
    (one,) = stats(client)
    return one


def test_a_nanny_killed_while_it_makes_the_arena_does_not_keep_others_from_it(node: Node) -> None:
    """No other member lives, so the next nanny begins anew in spite of the remains, and others share with it."""
    for step in ("create segment", "list", "attend"):
        for when in ("before", "after"):
            node.die_at_start(f"{when} {step}")
    a, b = node.start(), node.start()
    wait_until(lambda: move(node.client, a, b, BIG), "they share", seconds=60)
    assert move(node.client, b, a, BIG)
    assert len(names()) == 1


@pytest.mark.parametrize(
    "moment",
    [f"{when} {step}" for step in ("reclaim", "give pages back") for when in ("before", "after")]
    + ["after lock", "before unlock"],
)
def test_the_arena_outlives_a_nanny_that_is_killed_while_others_live(node: Node, moment: str) -> None:
    """The first nanny dies with its worker: a new command joins the same arena, and shares with the survivor."""
    while len(node.places) < 2:
        node.start()
    first, survivor = node.places
    assert move(node.client, first, survivor, BIG)
    before, seed = arena_id(node.client), fresh()
    kept = node.client.submit(array, seed, workers=[survivor])
    np.testing.assert_array_equal(kept.result(), array(seed))
    node.die_at(moment, first)
    newcomer = node.start()
    wait_until(lambda: move(node.client, survivor, newcomer, BIG), "they share", seconds=60)
    assert move(node.client, newcomer, survivor, BIG)
    assert arena_id(node.client) == before
    np.testing.assert_array_equal(kept.result(), array(seed))
    del kept
    # Two nannies, two workers, and this client.
    wait_until(lambda: totals(node.client).members == 5, lambda: f"the dead are no members: {totals(node.client)}")
    wait_until(lambda: totals(node.client).used == 0, lambda: f"the arena empties: {totals(node.client)}")
    (arena,) = membership.all_arenas()
    arena.validate()
