"""Results that were born in the arena are shared without a copy, and are never anything but what stock Dask would send."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from alias_programs import KEEPERS, KINDS, LENGTH, READS, WRITES, Program
from births import library
from clusters import OPTIONS, local_cluster
from distributed import Client, Future, get_worker, wait
from observing import MIB, addresses, drop_replica, pids, settle, totals, wait_until
from scipy import sparse

from dask_shm_plugin import is_shared, stats, unregister
from dask_shm_plugin.births import switch

pytestmark = pytest.mark.slow

SIZE = 2 * MIB


@pytest.fixture(scope="module")
def cluster(nothing_leaks: None) -> Iterator[Client]:
    """A client of three workers whose arrays are born in the arena."""
    library()
    with local_cluster(3, OPTIONS | {"born": "on"}, threads_per_worker=2) as client:
        yield client


@pytest.fixture
def client(cluster: Client) -> Client:
    """The client; the arena holds no blocks of earlier tests."""
    settle(cluster)
    return cluster


def ramp(number: int = 0, size: int = SIZE) -> np.ndarray:
    return np.arange(number, number + size // 8, dtype=np.float64)


def is_born(value: np.ndarray) -> bool:
    nursery = switch._nursery
    return nursery is not None and 0 <= value.ctypes.data - nursery._area < nursery._span


def again(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns when arrays of its sizes were asked for before, and so are born."""
    for _ in range(4):
        function(*arguments)
        time.sleep(0.02)
    return function(*arguments)


def look(value: np.ndarray) -> tuple[int, bool, bool, int]:
    """Return the checksum of an array, whether it was born here, whether it is shared, and its address."""
    return zlib.crc32(value), is_born(value), is_shared(value), value.ctypes.data


def on(client: Client, worker: str, function: Callable[..., Any], *arguments: Any) -> Future:
    """Run a task on one worker, and wait for it."""
    future = client.submit(function, *arguments, workers=[worker], pure=False)
    wait(future)
    return future


def born(client: Client) -> dict[str, int]:
    """Return the counter of arrays that were sealed in place."""
    [arena] = stats(client).values()
    return dict(arena["born"])


def test_a_result_is_fetched_without_a_copy(client: Client) -> None:
    """Its owner keeps the array itself, and its neighbour maps the same memory."""
    a, b, _ = addresses(client)
    before, sealed = totals(client), born(client)["bytes"]
    future = on(client, a, again, ramp)
    expected = zlib.crc32(ramp())
    first = on(client, a, look, future).result()
    assert first[:3] == (expected, True, False)
    assert on(client, b, look, future).result()[:3] == (expected, False, True)
    assert on(client, a, look, future).result() == (expected, True, True, first[3])
    after = totals(client)
    assert (after.published_bytes, after.adopted_bytes) == (before.published_bytes, before.adopted_bytes)
    assert born(client)["bytes"] - sealed == SIZE
    wait_until(lambda: totals(client).used - before.used == SIZE, "idle chunks are given back")
    assert zlib.crc32(client.gather(future)) == expected


class Named(NamedTuple):
    """A tuple of a user."""

    data: np.ndarray


@dataclasses.dataclass
class Data:
    """A class of a user."""

    data: np.ndarray


class Sub(np.ndarray):
    """A subclass of a user."""


VALUES: dict[str, Callable[[], Any]] = {
    "array": ramp,
    "fortran": lambda: np.asfortranarray(ramp().reshape(512, -1)),
    "slice": lambda: ramp(0, 2 * SIZE)[: SIZE // 4],
    "masked": lambda: np.ma.array(x := ramp(), mask=x < 5),
    "subclass": lambda: ramp().view(Sub),
    "record": lambda: np.rec.array(ramp().view([("x", "f8"), ("y", "f8")])),
    "dates": lambda: np.arange(SIZE // 8).view("M8[ns]"),
    "dict": lambda: {"x": ramp(), "y": ramp(3)},
    "twice": lambda: [x := ramp(), x],
    "beside its view": lambda: (x := ramp(), x[5:]),
    "named tuple": lambda: Named(ramp()),
    "dataclass": lambda: Data(ramp()),
    "frame": lambda: pd.DataFrame(ramp().reshape(-1, 4), columns=list("abcd"), copy=False),
    "index": lambda: pd.Index(ramp(), copy=False),
    "categorical": lambda: pd.Categorical.from_codes(np.zeros(SIZE // 8, np.int64) + 1, categories=range(400)),
    "csr": lambda: sparse.csr_array(ramp().reshape(512, -1)),
}


def largest_parts(value: Any) -> int:
    """Return the checksum of the bytes of a value."""
    from distributed.protocol import serialize

    return zlib.crc32(b"".join(bytes(memoryview(frame)) for frame in serialize(value)[1]))


@pytest.mark.parametrize("kind", list(VALUES))
def test_values_of_many_types_are_shared_without_a_copy(client: Client, kind: str) -> None:
    """One physical copy is left: nothing is published by copying, and nothing needs to be adopted."""
    a, b, c = addresses(client)
    before = totals(client)
    future = on(client, a, again, VALUES[kind])
    sums = [on(client, worker, largest_parts, future).result() for worker in (a, b, c)]
    assert len(set(sums)) == 1
    assert totals(client).published_bytes == before.published_bytes
    assert totals(client).attached > before.attached


def add(value: np.ndarray, number: int) -> None:
    value += number


def added(value: np.ndarray, number: int) -> np.ndarray:
    value += number
    return value


def test_writes_are_read_by_those_who_ask_afterwards(client: Client) -> None:
    """A task writes to its input, or returns it; before, between and after fetches."""
    a, b, c = addresses(client)
    future = on(client, a, again, ramp)
    on(client, a, add, future, 1)
    assert on(client, b, look, future).result()[0] == zlib.crc32(ramp(1))
    on(client, a, add, future, 1)
    assert on(client, b, look, future).result()[0] == zlib.crc32(ramp(1)), "it has the value that it fetched"
    drop_replica(client, future, b)
    assert on(client, c, look, future).result()[0] == zlib.crc32(ramp(2))
    drop_replica(client, future, c)
    other = on(client, a, added, future, 1)
    assert on(client, b, look, future).result()[0] == zlib.crc32(ramp(3))
    assert on(client, c, look, other).result()[0] == zlib.crc32(ramp(3))


def own_memory(dask_worker: Any) -> int:
    return dask_worker.monitor.get_process_memory()


def test_drafts_are_a_workers_own_memory_and_blocks_are_shared(client: Client) -> None:
    """An array counts in full until it is shared, and then by its share."""
    size = 16 * MIB
    a, b, c = addresses(client)
    before = client.run(own_memory)
    future = on(client, a, again, ramp, 0, size)
    assert on(client, a, look, future).result()[1]
    wait_until(lambda: abs(client.run(own_memory)[a] - before[a] - size) < size / 4, "the draft is counted")
    for worker in (b, c):
        on(client, worker, look, future)
    wait_until(
        lambda: all(
            abs(after - before[worker] - size / 3) < size / 4 for worker, after in client.run(own_memory).items()
        ),
        "each has a third",
    )
    del future
    wait_until(lambda: totals(client).used == 0, "nothing is left")


def in_threads() -> bool:
    """Let a thread of a task free what the task has allocated, and the other way."""
    arrays = [ramp(), None]

    def work() -> None:
        arrays[1] = ramp(1)
        arrays[0] = None

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return bool((arrays[1] == ramp(1)).all())


def in_children() -> bool:
    """Let a forked child read and write an array of the task."""
    array = ramp()
    if (pid := os.fork()) == 0:
        is_right = bool((array == ramp()).all())
        array[:] = 0
        os._exit(0 if is_right else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status == 0 and bool((array == ramp()).all())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("task", [in_threads, in_children])
def test_threads_and_children_of_tasks(client: Client, task: Callable[[], bool]) -> None:
    """They use arrays of the task as with stock Dask."""
    assert on(client, addresses(client)[0], again, task).result()


async def on_the_loop() -> tuple[bool, bool]:
    """Return whether an array of a coroutine is born, and one of other code on the event loop."""
    import asyncio
    import contextvars

    loop = get_worker().loop.asyncio_loop
    other = loop.create_future()
    until = time.monotonic() + 5
    while not (was_born := is_born(ramp())) and time.monotonic() < until:
        await asyncio.sleep(0.01)
    loop.call_soon(lambda: other.set_result(is_born(ramp())), context=contextvars.Context())
    return was_born, await other


def test_only_tasks_allocate_in_the_arena(client: Client) -> None:
    """Code that is no task allocates as usual."""
    a = addresses(client)[0]
    assert on(client, a, on_the_loop).result() == (True, False)
    assert not client.run(lambda: is_born(ramp()), workers=[a])[a]


def test_readers_keep_a_value_whose_owner_is_killed(client: Client) -> None:
    """The block lives as long as any holder."""
    a, b, c = addresses(client)
    future = on(client, a, again, ramp)
    expected = on(client, b, look, future).result()[0]
    os.kill(pids(client)[a], signal.SIGKILL)
    wait_until(lambda: a not in addresses(client) and len(addresses(client)) == 3, "the worker is restarted", 60)
    assert on(client, c, look, future).result()[0] == expected == zlib.crc32(ramp())
    new = next(worker for worker in addresses(client) if worker not in (b, c))
    assert on(client, new, is_born_here).result()


def is_born_here() -> bool:
    return is_born(again(ramp))


@pytest.mark.parametrize("seed", range(6))
def test_random_programs_read_what_they_read_without_births(client: Client, off: Client, seed: int) -> None:
    """Makers, other references, writers and readers in any order, with three workers of two threads."""
    random = np.random.default_rng(seed)
    kind, keeper = random.choice(list(KINDS)), random.choice(KEEPERS)
    steps = [*random.choice([*READS, *WRITES, "by the keeper"], 6), "another worker", "client"]
    for worker in addresses(client):
        on(client, worker, again, np.ones, LENGTH)
    seen = [Program(one, kind, "own", keeper).run(steps) for one in (client, off)]
    assert seen[0] == seen[1]


@pytest.fixture(scope="module")
def off(nothing_leaks: None) -> Iterator[Client]:
    """A client of three workers whose arrays are allocated as usual."""
    with local_cluster(3, OPTIONS | {"born": "off"}, threads_per_worker=2) as client:
        yield client


def test_births_can_be_switched_off(off: Client) -> None:
    """Then results are copied when they are shared."""
    a, b, _ = addresses(off)
    before = totals(off)
    future = on(off, a, ramp)
    assert on(off, b, look, future).result()[1:3] == (False, True)
    assert not on(off, a, look, future).result()[1]
    assert totals(off).published_bytes - before.published_bytes == SIZE
    assert born(off)["count"] == 0


def test_values_stay_valid_when_sharing_is_switched_off(cluster: Client) -> None:
    """Arrays that live are used, written and sent as before; new ones are allocated as usual. Runs last."""
    settle(cluster)
    a, b, _ = addresses(cluster)
    shared, private = on(cluster, a, again, ramp), on(cluster, a, again, ramp, 5)
    on(cluster, b, look, shared)
    unregister(cluster)
    on(cluster, a, add, shared, 1)
    assert on(cluster, a, look, private).result()[0] == zlib.crc32(ramp(5))
    drop_replica(cluster, shared, b)
    assert on(cluster, b, look, shared).result()[0] == zlib.crc32(ramp(1))
    assert on(cluster, b, look, private).result()[0] == zlib.crc32(ramp(5))
    assert not on(cluster, a, is_born_here).result()
