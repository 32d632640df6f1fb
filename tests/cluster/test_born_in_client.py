"""Arrays of the client that are made in a block `born()` are scattered without a copy."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import numpy as np
import pandas as pd
import pytest
from births import is_born
from clusters import OPTIONS, local_cluster
from distributed import Client, Future
from observing import MIB, addresses, settle, totals, wait_until

import dask_shm_plugin
from dask_shm_plugin import born, unregister
from dask_shm_plugin.births import switch

pytestmark = pytest.mark.slow

SIZE = 3 * MIB


def made(number: int) -> np.ndarray:
    """Make an array in a block."""
    with born():
        return np.full(SIZE, number, np.uint8)


def read(value: np.ndarray) -> tuple[int, bool]:
    """Return the sum of an array, and whether it is shared."""
    return int(value.sum()), dask_shm_plugin.is_shared(value)


def read_on_all(client: Client, future: Future) -> set[tuple[int, bool]]:
    tasks = [client.submit(read, future, workers=[worker], pure=False) for worker in addresses(client)]
    return set(client.gather(tasks))


# The first tests run before the fixture has made a default client.


@pytest.mark.parametrize("without", ["client", "plugin", "capacity"])
def test_without_an_arena_a_block_does_nothing(without: str) -> None:
    """There is no error, and arrays lie in ordinary memory."""
    with contextlib.ExitStack() as stack:
        if without != "client":
            options = None if without == "plugin" else OPTIONS | {"capacity": 0}
            stack.enter_context(local_cluster(1, options, processes=False))
        with born(), born():
            array = np.full(SIZE, 3, np.uint8)
        assert not is_born(array)
        with pytest.raises(ZeroDivisionError), born():
            1 / 0  # noqa: B018 - raises


def test_arrays_outlive_the_client_and_its_arena() -> None:
    """And no new ones are born after that."""
    with local_cluster(2) as client:
        array, dropped = made(1), made(2)
        with born():
            unregister(client)
            late = np.full(SIZE, 3, np.uint8)
        future = client.scatter(array, hash=False)
        assert client.submit(np.sum, future).result() == SIZE
        del dropped
    assert not is_born(late)
    array[:5] = 9
    assert int(array.sum()) == SIZE + 40
    with born():
        assert not is_born(np.full(SIZE, 3, np.uint8))
    del array
    nursery = switch._nursery
    assert nursery is not None
    wait_until(lambda: nursery.is_over, "the memory of the last array is given back")


def test_a_broadcast_copies_nothing(four: Client) -> None:
    """The client's array itself is sealed, and all workers map it."""
    before = totals(four)
    array = made(1)
    assert is_born(array)
    future = four.scatter(array, broadcast=True, hash=False)
    assert read_on_all(four, future) == {(SIZE, True)}
    grown = totals(four) - before
    assert (grown.published, grown.born, grown.sent) == (0, 1, 0)
    del array
    assert read_on_all(four, future) == {(SIZE, True)}
    del future
    wait_until(lambda: totals(four).used == 0, "nothing is left")


@pytest.mark.parametrize("direct", [False, True])
def test_what_the_client_writes_later_is_in_later_scatters(four: Client, direct: bool) -> None:
    """The workers keep the values that they were sent."""
    settle(four)
    array = made(1)
    futures = []
    for number in (1, 2, 3):
        array[: SIZE // 2] = number
        futures.append(four.scatter(array, broadcast=not direct, direct=direct, hash=False))
    for number, future in enumerate(futures, 1):
        assert read_on_all(four, future) == {((number + 1) * SIZE // 2, True)}
    assert int(array.sum()) == 4 * SIZE // 2


def total(value: Any) -> float:
    """Return the sum of an array, a frame, or the values of a dict."""
    return sum(map(total, value.values())) if isinstance(value, dict) else float(np.asarray(value).sum())


def test_views_and_frames_of_it_are_not_copied_either(four: Client) -> None:
    """Whatever holds the array: its memory is what is shared."""
    with born():
        array = np.arange(SIZE // 8, dtype=np.float64).reshape(-1, 4)
    before = totals(four)
    frame = pd.DataFrame(array, columns=list("abcd"), copy=False)
    for value in (array.T, {"x": array}, frame):
        future = four.scatter(value, hash=False)
        assert four.submit(total, future).result() == array.sum()
    assert (totals(four) - before).published == 0


def test_threads_have_blocks_of_their_own(four: Client) -> None:
    """Two threads make, scatter and drop arrays at the same time."""
    settle(four)
    wrong: list[Any] = []

    def work(first: int) -> None:
        for number in range(first, first + 5):
            array = made(number)
            future = four.scatter(array, hash=False)
            if (seen := four.submit(read, future).result()) != (number * SIZE, True):
                wrong.append((number, seen))

    threads = [threading.Thread(target=work, args=(first,)) for first in (1, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
