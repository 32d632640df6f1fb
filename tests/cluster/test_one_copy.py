"""A shared array exists once in memory and crosses no socket: measured from outside, with every page touched."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from clusters import local_cluster
from distributed import Client, wait
from observing import (
    MIB,
    addresses,
    array,
    drop_replica,
    fresh,
    lies_in_arena,
    loopback,
    pids,
    private_memory,
    settle,
    shared_memory,
    totals,
    undisturbed,
    wait_until,
)

pytestmark = pytest.mark.slow

SIZE = 64 * MIB
#: Freed pages are returned at once here, so that each round of a measurement starts without pages.
OPTIONS: dict[str, Any] = {"capacity": "512 MiB", "warm": 0}


@pytest.fixture(scope="module")
def cluster(nothing_leaks: None) -> Iterator[Client]:
    """A client of four workers, with the default threshold."""
    with local_cluster(4, OPTIONS) as client:
        client.run(np.random.default_rng)  # the libraries that the tasks need are loaded before anything is measured
        yield client


@pytest.fixture
def client(cluster: Client) -> Client:
    """A client of four workers whose arena has returned all its pages."""
    begin_anew(cluster)
    return cluster


def begin_anew(client: Client) -> None:
    """Wait until the arena has returned its pages: a measurement does not see pages that exist before it."""
    settle(client)
    wait_until(lambda: totals(client).resident < SIZE // 8, "freed pages go back to the operating system")


@dataclass(frozen=True)
class Growth:
    """The cost of one transfer, in multiples of the array."""

    shared: float
    private: float
    wire: float
    digests: frozenset[int]

    def is_one_copy(self) -> bool:
        """Tell whether this is one shared copy, no private one, and (almost) nothing on the wire."""
        return 0.95 < self.shared < 1.15 and self.private < 0.25 and self.wire < 0.02


class Measurement:
    """Measures the memory of all processes and the bytes on the loopback, before and after a transfer."""

    def __init__(self, client: Client) -> None:
        self.pids = pids(client).values()
        self.processes = [os.getpid(), *self.pids]
        self.shared, self.wire = shared_memory(self.processes), loopback()
        self.private = {pid: private_memory(pid) for pid in self.pids}

    def growth(self, digests: Iterable[int]) -> Growth:
        """Return the growth since this object was made."""
        return Growth(
            shared=(shared_memory(self.processes) - self.shared) / SIZE,
            private=max(private_memory(pid) - self.private[pid] for pid in self.pids) / SIZE,
            wire=(loopback() - self.wire) / SIZE,
            digests=frozenset(digests),
        )


def big(seed: int) -> np.ndarray:
    """Return an array of 64 MiB."""
    return array(seed, SIZE // 8)


def digest(value: np.ndarray) -> int:
    """Read all of an array."""
    return zlib.crc32(value)


def digests(client: Client, future: Any, workers: Iterable[str]) -> list[int]:
    """Let each worker read all of an array."""
    return client.gather([client.submit(digest, future, workers=[address], pure=False) for address in workers])


def test_a_broadcast_is_one_copy_in_memory_and_nothing_on_the_wire(client: Client) -> None:
    """Four workers read 64 MiB: this takes one shared copy, no private memory, and hardly any traffic."""
    value = big(fresh())

    def measure() -> Growth:
        begin_anew(client)
        measurement = Measurement(client)
        future = client.scatter(value, broadcast=True, hash=False)
        return measurement.growth(digests(client, future, addresses(client)))

    growth = undisturbed(measure, Growth.is_one_copy)
    assert growth.digests == {digest(value)}
    assert growth.is_one_copy(), growth


@pytest.mark.parametrize("options", [{}, {"direct": True}, {"broadcast": True, "direct": True}], ids=str)
def test_any_scatter_is_one_copy_and_nothing_on_the_wire(client: Client, options: dict[str, Any]) -> None:
    """However a value is scattered, there is one copy for all workers."""
    value = big(fresh())

    def measure() -> Growth:
        begin_anew(client)
        measurement = Measurement(client)
        future = client.scatter(value, hash=False, **options)
        return measurement.growth(digests(client, future, addresses(client)))

    growth = undisturbed(measure, Growth.is_one_copy)
    assert growth.digests == {digest(value)}
    assert growth.is_one_copy(), growth


def test_a_fetch_between_workers_is_one_copy_and_nothing_on_the_wire(client: Client) -> None:
    """Each of three fetches ships a handle: one shared copy appears, and the publisher's own copy goes away."""
    a, *others = addresses(client)
    seed = fresh()

    def measure() -> Growth:
        begin_anew(client)
        measurement = Measurement(client)
        made = client.submit(big, seed, workers=[a], pure=False)
        found = digests(client, made, others)
        wait_until(lambda: lies_in_arena(client, made, a), "the publisher adopts the value")
        return measurement.growth(found)

    growth = undisturbed(measure, Growth.is_one_copy)
    assert growth.digests == {digest(big(seed))}
    assert growth.is_one_copy(), growth


def test_a_result_reaches_the_client_without_the_wire(client: Client) -> None:
    """Gathering 64 MiB, with `gather` and with `result`, adds one copy for the worker and the client together."""
    a, *_ = addresses(client)
    seed = fresh()

    def measure() -> Growth:
        begin_anew(client)
        measurement = Measurement(client)
        made = client.submit(big, seed, workers=[a], pure=False)
        before = private_memory()
        values = [made.result(), client.gather(made)]
        growth = measurement.growth([digest(value) for value in values])
        assert private_memory() - before < SIZE / 2
        return growth

    growth = undisturbed(measure, Growth.is_one_copy)
    assert growth.digests == {digest(big(seed))}
    assert growth.is_one_copy(), growth


def test_a_view_reaches_another_worker_without_the_wire_and_without_another_copy(client: Client) -> None:
    """Half of a received array, returned by a task and read on another worker, costs nothing."""
    a, b, c, _ = addresses(client)
    value = big(fresh())
    whole = client.scatter(value, workers=[a])
    digests(client, whole, [a, b])  # a page counts only after it was touched

    def measure() -> Growth:
        half = client.submit(first_half, whole, workers=[b], pure=False)
        wait(half)
        measurement = Measurement(client)
        return measurement.growth(digests(client, half, [c]))

    growth = undisturbed(measure, lambda growth: max(growth.shared, growth.private) < 0.1 and growth.wire < 0.02)
    assert growth.digests == {digest(value[: len(value) // 2])}
    assert growth.shared < 0.1
    assert growth.private < 0.1
    assert growth.wire < 0.02


def first_half(value: np.ndarray) -> np.ndarray:
    """Return a view of the first half of an array."""
    return value[: len(value) // 2]


def test_a_dropped_replica_comes_back_at_no_cost(client: Client) -> None:
    """The Active Memory Manager drops replicas of a broadcast: a late reader maps the value again."""
    value = big(fresh())
    future = client.scatter(value, broadcast=True)

    def measure() -> Growth:
        digests(client, future, addresses(client))
        for address in addresses(client)[1:]:
            drop_replica(client, future, address)
        measurement = Measurement(client)
        return measurement.growth(digests(client, future, addresses(client)))

    # Pages that are made large meanwhile are in no mapping until they are read again.
    growth = undisturbed(measure, lambda growth: growth.shared < 0.1 and growth.wire < 0.02)
    assert growth.digests == {digest(value)}
    assert growth.wire < 0.02
    assert growth.shared < 0.1


def test_the_private_memory_of_a_reader_grows_only_by_the_pages_that_it_writes(client: Client) -> None:
    """Views are copy-on-write: writing a sixteenth of an array makes a sixteenth private, in that worker alone."""
    a, b, *_ = addresses(client)
    future = client.scatter(big(fresh()), workers=[a, b], broadcast=True)
    digests(client, future, [a, b])
    before = {address: private_memory(pid) for address, pid in pids(client).items()}
    wait(client.submit(write, future, SIZE // 8 // 16, workers=[a]))
    grown = {address: private_memory(pid) - before[address] for address, pid in pids(client).items()}
    assert SIZE / 17 < grown[a] < SIZE / 4
    assert grown[b] < SIZE / 16


def write(value: np.ndarray, count: int) -> None:
    """Write to the first elements of an array that this worker keeps."""
    value[:count] += 1


def test_six_workers_share_one_copy() -> None:
    """Five workers that fetch from the sixth share one publication and one copy."""
    with local_cluster(6, OPTIONS, memory_limit="512 MiB") as client:
        a, *others = addresses(client)
        seed = fresh()

        def measure() -> Growth:
            begin_anew(client)
            measurement = Measurement(client)
            made = client.submit(big, seed, workers=[a], pure=False)
            before = totals(client)
            found = digests(client, made, others)
            wait_until(lambda: lies_in_arena(client, made, a), "the publisher adopts the value")
            counted = totals(client) - before
            assert (counted.published, counted.sent) == (1, 0)
            assert counted.attached >= len(others)
            return measurement.growth(found)

        growth = undisturbed(measure, Growth.is_one_copy)
        assert growth.digests == {digest(big(seed))}
        assert growth.is_one_copy(), growth
