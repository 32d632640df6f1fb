"""Exhausted resources cost speed and never results: each is named once, counted, and used again when it is back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest
from clusters import local_cluster
from describing import assert_same
from distributed import Client, Future
from observing import (
    KIB,
    MIB,
    addresses,
    array,
    assert_saw,
    fresh,
    holders,
    lies_in_arena,
    pids,
    see_on,
    settle,
    totals,
    wait_until,
)
from processes import cluster as commands
from processes import environment, workers
from surroundings import (
    TAKE_PLACES,
    forbid_address_space,
    forbid_descriptors,
    forbid_files,
    forbid_mappings,
    forget_mappings,
    forget_warnings,
    heard,
    listen,
    move,
    sent,
    stop_listening,
    take_rows,
    warnings_of,
    without,
)

from dask_shm_plugin import stats
from dask_shm_plugin.linux import limits
from dask_shm_plugin.node import membership

pytestmark = pytest.mark.slow

#: Sizes in doubles: 512 KiB, and 8 MiB, which is more than other tests have left warm.
SMALL, LARGE = 64 * KIB, 1 * MIB
OPTIONS = {"threshold": "64 KiB", "capacity": "96 MiB", "born": "off"}  # values are to be copied


@pytest.fixture(scope="module")
def cluster_of_two(nothing_leaks: None) -> Iterator[Client]:
    """A client of two workers that share 96 MiB."""
    with local_cluster(2, OPTIONS) as client:
        yield client


@pytest.fixture
def client(cluster_of_two: Client) -> Iterator[Client]:
    """The same client with an empty arena and open connections; at the end no worker has died, and sharing works."""
    settle(cluster_of_two)
    a, b = addresses(cluster_of_two)
    assert move(cluster_of_two, a, b, SMALL)
    assert move(cluster_of_two, b, a, SMALL)
    settle(cluster_of_two)
    cluster_of_two.run(listen)
    before = pids(cluster_of_two)
    yield cluster_of_two
    assert pids(cluster_of_two) == before
    # After thousands of rows were taken and freed, the first move was once refused for a lack of rows: not understood.
    wait_until(lambda: move(cluster_of_two, a, b, SMALL), lambda: f"values are shared again: {stats(cluster_of_two)}")
    assert move(cluster_of_two, b, a, SMALL)


@pytest.mark.parametrize(
    ("what", "reason", "remedy"),
    [
        (forbid_descriptors, "descriptors-exhausted", "ulimit -n"),
        (forbid_files, "file-size-limited", "ulimit -f"),
    ],
)
def test_a_publisher_that_may_not_write_sends(
    client: Client, what: Callable[[], None], reason: str, remedy: str
) -> None:
    """A worker under a small ``ulimit -n`` or ``-f`` sends its results, and warns once which limit to raise."""
    a, b = addresses(client)
    before = sent(client).get(reason, 0)
    with without(client, what, a):
        assert [move(client, a, b, LARGE) for _ in range(3)] == [False] * 3
    (said,) = warnings_of(client, a)[a]
    assert reason in said
    assert remedy in said
    assert warnings_of(client, b)[b] == []
    assert sent(client)[reason] == before + 3


@pytest.mark.parametrize(
    ("what", "remedy"), [(forbid_mappings, "vm.max_map_count"), (forbid_address_space, "ulimit -v")]
)
def test_a_reader_that_may_not_map_copies(client: Client, what: Callable[[], None], remedy: str) -> None:
    """A worker that has used up ``vm.max_map_count`` or ``ulimit -v`` copies values, and warns once which to raise."""
    a, b = addresses(client)
    before = sent(client).get("mapping-refused", 0)
    client.run(forget_warnings)
    with without(client, what, b):
        assert [move(client, a, b, LARGE) for _ in range(3)] == [False] * 3
    (said,) = warnings_of(client, b)[b]
    assert "mapping-refused" in said
    assert remedy in said
    assert sent(client)["mapping-refused"] == before + 3


def test_a_publisher_that_may_not_map_shares_all_the_same(client: Client) -> None:
    """It writes without a mapping; it warns once that it keeps its private copy, and which limit to raise."""
    a, b = addresses(client)
    client.run(forget_warnings)
    client.run(forget_mappings, workers=[a])
    before = totals(client)
    with without(client, forbid_mappings, a):
        for _ in range(2):
            seed = fresh()
            made = client.submit(array, seed, LARGE, workers=[a])
            for _ in range(2):
                (seen,) = see_on(client, made, [b])
                assert_saw(seen, array(seed, LARGE))
            assert_same(client.gather(made), array(seed, LARGE))
    assert (totals(client) - before).adopted == 0
    (said,) = warnings_of(client, a)[a]
    assert "private copy" in said
    assert "vm.max_map_count" in said


def test_a_value_larger_than_the_arena_is_sent(client: Client) -> None:
    """Neither a result nor a scatter may wait for room that there will never be."""
    a, b = addresses(client)
    size = 13 * MIB
    before = sent(client).get("arena-full", 0)
    assert not move(client, a, b, size)
    seed = fresh()
    future = client.scatter(array(seed, size), workers=[b])
    assert client.submit(is_array, future, seed, size, workers=[b]).result()
    assert not lies_in_arena(client, future, b)
    assert sent(client)["arena-full"] == before + 2
    (said,) = warnings_of(client, a)[a]
    assert "raise shm.capacity" in said


def test_values_are_sent_while_the_arena_is_full(client: Client) -> None:
    """One value fills the arena, so others are sent; after its release, they are shared again."""
    a, b = addresses(client)
    seed, size = fresh(), 11 * MIB
    filling = client.scatter(array(seed, size), workers=[a])
    assert lies_in_arena(client, filling, a)
    assert [move(client, a, b, 2 * LARGE) for _ in range(3)] == [False] * 3
    assert client.submit(is_array, filling, seed, size, workers=[b]).result()
    del filling
    settle(client)
    assert move(client, a, b, 2 * LARGE)


def is_array(value: np.ndarray, seed: int, size: int) -> bool:
    """Tell whether a value is the array of a seed."""
    return np.array_equal(value, array(seed, size))


def test_more_values_than_the_table_has_rows_are_sent(client: Client) -> None:
    """A small value that finds no row is sent, and the warning names a higher threshold as the remedy."""
    a, b = addresses(client)
    with without(client, lambda: take_rows(leave=3), b):
        seeds = [fresh() for _ in range(12)]
        futures = wait_until(lambda: scattered_in_peace(client, seeds, a), "the table's lock is free in time")
        assert sum(lies_in_arena(client, future, a) for future in futures) == 3, f"{stats(client)}"
        for seed, value in zip(seeds, client.gather(futures), strict=True):
            assert_same(value, array(seed, 9 * KIB))
        assert not move(client, a, b, SMALL)
        assert sent(client)["table-full"] >= 10
    (said,) = warnings_of(client, a)[a]
    assert "raise shm.threshold" in said


def scattered_in_peace(client: Client, seeds: list[int], worker: str) -> list[Future] | None:
    """Scatter values; return None if the lock of the table was busy, as it may be while a process takes all rows."""
    before = sent(client).get("lock-busy", 0)
    futures = client.scatter([array(seed, 9 * KIB) for seed in seeds], workers=[worker], hash=False)
    return futures if sent(client).get("lock-busy", 0) == before else None


@pytest.fixture
def all_slots_taken() -> Iterator[Callable[[Client], subprocess.Popen[str]]]:
    """Let a process take all slots that the arena of a cluster still has."""
    started: list[subprocess.Popen[str]] = []

    def take(client: Client) -> subprocess.Popen[str]:
        arena = membership.of_cluster(client.scheduler_info()["id"])
        assert arena is not None
        line = [sys.executable, "-c", TAKE_PLACES, arena.arena_id.hex(), *map(str, arena.segment.whereabouts)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(line, env=environment(), **pipes))
        assert started[0].stdout is not None
        assert started[0].stdout.readline() == "taken\n"
        return started[0]

    yield take
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.usefixtures("new_processes")
def test_a_worker_without_a_slot_joins_when_one_is_free(
    all_slots_taken: Callable[[Client], subprocess.Popen[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    """Until then it gets bytes and gives the reason once; then it shares, without a restart."""
    with local_cluster(1, OPTIONS) as client:
        (a,) = addresses(client)
        others = all_slots_taken(client)
        client.cluster.scale(2)
        client.wait_for_workers(2)
        (b,) = set(addresses(client)) - {a}
        assert [move(client, a, b, SMALL), move(client, b, a, SMALL)] == [False, False]
        before = pids(client)
        others.kill()
        wait_until(lambda: move(client, a, b, SMALL), "the worker gets a slot", seconds=60)
        assert move(client, b, a, SMALL)
        assert pids(client) == before
        # The answering worker counts, by the reason that the request gives.
        assert sent(client)["members-full"] >= 1
        assert "not-co-located" not in sent(client)
    said = [line for line in capfd.readouterr().err.splitlines() if "places for members" in line]
    assert len(said) == 1, said


# ------------------------------------------------------------------------------------------------------------ capacity


def capacity_of(client: Client) -> int:
    """Return the capacity of the one arena of a cluster."""
    return int(*(arena["capacity"] for arena in stats(client).values()))


@pytest.fixture
def said_here() -> Iterator[Callable[[], list[tuple[str, str]]]]:
    """Record the package's log messages in this process; a ``LocalCluster`` silences the handlers of pytest."""
    listen()
    yield heard
    stop_listening()


def test_two_idle_clusters_have_their_full_capacity_and_log_it(
    said_here: Callable[[], list[tuple[str, str]]],
) -> None:
    """An idle cluster takes nothing from another one; each logs once how much it may take, and of which limit."""
    with local_cluster(1, {"capacity": "60%"}) as one, local_cluster(1, {"capacity": "60%"}) as other:
        first, second = capacity_of(one), capacity_of(other)
        assert first == second == pytest.approx(limits.memory_limit() * 0.6, rel=1e-3)
        lines = [text for level, text in said_here() if level == "INFO"]
        assert len(lines) == 2
        for line, capacity in zip(lines, (first, second), strict=True):
            assert f" {capacity} bytes" in line
            assert "shm.capacity is '60%'" in line
            assert f"{limits.memory_limit()} bytes ({limits.tightest().name})" in line
            assert "memfd" in line or "POSIX shared memory" in line


@pytest.mark.usefixtures("new_processes")
def test_a_capacity_of_zero_switches_sharing_off(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Everything works as without the plugin, and each process logs once that sharing is off."""
    with local_cluster(2, OPTIONS | {"capacity": 0}) as client:
        a, b = addresses(client)
        assert [move(client, a, b, SMALL) for _ in range(3)] == [False] * 3
        seed = fresh()
        future = client.scatter(array(seed), broadcast=True)
        assert holders(client, future) == {a, b}
        assert_same(future.result(), array(seed))
        assert stats(client) == {}
    off = "Sharing is off in this process: shm.capacity is zero"
    assert [line for line in capfd.readouterr().err.splitlines() if "Sharing" in line] == [off] * 2
    assert [text for text in caplog.messages if "Sharing" in text] == [off]


@pytest.mark.usefixtures("new_processes")
def test_a_capacity_above_the_installed_memory_is_accepted(capfd: pytest.CaptureFixture[str]) -> None:
    """A capacity is a limit and not a reservation: values are shared as long as there is memory."""
    with local_cluster(2, OPTIONS | {"capacity": 4 * psutil.virtual_memory().total}) as client:
        a, b = addresses(client)
        assert move(client, a, b, SMALL)
        assert move(client, b, a, SMALL)
    assert "Sharing" not in capfd.readouterr().err


def test_a_worker_that_was_started_under_small_limits_reads_and_sends() -> None:
    """It maps shared values of others, and sends its own results as bytes."""
    limits_ = 'ulimit -n 64 && ulimit -f 1024 && ulimit -v 4000000 && exec "$@"'
    with commands(count=1, options=OPTIONS) as client:
        (a,) = addresses(client)
        with workers(client, wrapper=["sh", "-c", limits_, "sh"]) as (b,):
            client.run(listen)
            assert [move(client, a, b, LARGE) for _ in range(2)] == [True] * 2
            assert [move(client, b, a, 4 * LARGE) for _ in range(2)] == [False] * 2
            (said,) = warnings_of(client, b)[b]
            assert "ulimit -f" in said
            assert sent(client) == {"file-size-limited": 2}
            # It does not write to warm pages either: the address space is left to the user.
            assert not move(client, b, a, SMALL)
