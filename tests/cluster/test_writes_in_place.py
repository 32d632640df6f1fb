"""Writes stay in the process that made them, and each reader gets the bytes of the value that it asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from clusters import local_cluster
from describing import assert_descriptions_equal, assert_same, describe
from distributed import Client, get_worker, wait
from observing import (
    BIG,
    MIB,
    addresses,
    array,
    drop_replica,
    fresh,
    holders,
    kept,
    see,
    see_on,
    settle,
    totals,
    wait_until,
)


@pytest.fixture(scope="module")
def cramped_cluster(nothing_leaks: None) -> Iterator[Client]:
    """A client of two workers whose arena has room for one array of 16 MiB, but not for two.

    Freed pages stay: space is not free while its pages are given back, and then a value is sent after a short wait.
    """
    with local_cluster(2, {"threshold": "64 KiB", "capacity": "24 MiB", "warm": "1h"}) as client:
        yield client


@pytest.fixture
def cramped(cramped_cluster: Client) -> Client:
    """The same client with an empty arena."""
    settle(cramped_cluster)
    return cramped_cluster


def overwrite(value: np.ndarray, number: float = 7.0) -> float:
    """Write to all of an array that was received, as a careless task does."""
    value[:] = number
    return float(value.sum())


def written(value: np.ndarray) -> np.ndarray:
    """Change the input in place and return it."""
    value[0] = 42.0
    return value


def written_slice(value: np.ndarray) -> np.ndarray:
    """Change the input in place and return the changed half."""
    value[0] = 42.0
    return value[: len(value) // 2]


def written_beyond_the_slice(value: np.ndarray) -> np.ndarray:
    """Change the input in place and return the half that was not changed."""
    value[-1] = 42.0
    return value[: len(value) // 2]


def written_at_the_end(value: np.ndarray) -> np.ndarray:
    """Change the last element only: a single byte of the last page."""
    value.view("u1")[-1] ^= 1
    return value


def written_inside_a_frame(value: np.ndarray) -> pd.DataFrame:
    """Change the input in place and return a DataFrame that holds it."""
    value[len(value) // 2] = 42.0
    return pd.DataFrame({"x": value}, copy=False)


def written_among_others(value: np.ndarray) -> dict[str, Any]:
    """Change the input in place, and return changed and unchanged parts side by side."""
    value[0] = 42.0
    quarter = len(value) // 4
    return {"changed": value[:quarter], "clean": value[2 * quarter :], "number": 1}


def written_through_a_view(value: np.ndarray) -> np.ndarray:
    """Change the input by way of a view of another type, and return yet another view."""
    value.view("i8").reshape(2, -1)[1, 5] = 12345
    return value.reshape(4, -1)


CHANGES = [
    written,
    written_slice,
    written_beyond_the_slice,
    written_at_the_end,
    written_inside_a_frame,
    written_among_others,
    written_through_a_view,
]


@pytest.mark.parametrize("start", ["scattered", "fetched"])
def test_a_write_to_a_received_array_stays_in_that_process(four: Client, start: str) -> None:
    """One worker overwrites its array: the other workers and the client still read the original."""
    a, b, c, d = addresses(four)
    seed = fresh()
    original = array(seed)
    scattered = start == "scattered"
    future = four.scatter(original, broadcast=True) if scattered else four.submit(array, seed, workers=[a])
    see_on(four, future, [a, b, c, d])
    assert four.submit(overwrite, future, workers=[b]).result() == 7.0 * BIG
    for seen in see_on(four, future, [a, c, d]):
        assert_descriptions_equal(seen.description, describe(array(seed)))
    assert_same(original, array(seed))


def test_among_the_tasks_of_one_worker_a_write_is_seen_as_in_stock_dask(four: Client) -> None:
    """A worker hands the same object to all of its tasks, with the plugin as without."""
    b = addresses(four)[1]
    future = four.scatter(array(fresh()), workers=[b])
    wait(four.submit(overwrite, future, workers=[b]))
    (seen,) = see_on(four, future, [b])
    assert_descriptions_equal(seen.description, describe(np.full(BIG, 7.0)))


def test_the_client_may_write_to_a_gathered_array(four: Client) -> None:
    """The array is the client's own: neither the worker's value nor later results change."""
    a, b, *_ = addresses(four)
    seed = fresh()
    future = four.submit(array, seed, workers=[a])
    first = four.gather(future)
    first[:] = -1
    assert_same(four.gather(future), array(seed))
    for seen in see_on(four, future, [a, b]):
        assert_descriptions_equal(seen.description, describe(array(seed)))
    assert first.sum() == -BIG


def test_the_client_may_write_to_a_scattered_array(four: Client) -> None:
    """A write to the array after the scatter must not reach any worker."""
    seed = fresh()
    original = array(seed)
    future = four.scatter(original, broadcast=True)
    original[:] = 0
    for seen in see_on(four, future, addresses(four)):
        assert_descriptions_equal(seen.description, describe(array(seed)))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("start", ["scattered", "fetched"])
def test_a_task_that_changes_its_input_and_returns_it_gives_the_changed_bytes(
    four: Client, start: str, change: Callable[[np.ndarray], Any]
) -> None:
    """A written page is private, though its address is in a view: readers get the bytes that the task returned."""
    a, b, c, _ = addresses(four)
    seed = fresh()
    whole = four.scatter(array(seed), workers=[b]) if start == "scattered" else four.submit(array, seed, workers=[a])
    see_on(four, whole, [b])
    changed = four.submit(change, whole, workers=[b], pure=False)
    expected = describe(change(array(seed)))
    assert_descriptions_equal(see_on(four, changed, [c])[0].description, expected)
    assert_descriptions_equal(describe(four.gather(changed)), expected)
    assert_descriptions_equal(see_on(four, changed, [b])[0].description, expected)


class Box:
    """An object of a class that is not adopted: its publisher keeps the private copy."""

    def __init__(self, seed: int) -> None:
        self.data = array(seed)


def overwrite_box(box: Box) -> None:
    """Write to the array inside of a box."""
    box.data[:] = 7.0


@pytest.mark.parametrize(("build", "change"), [(array, overwrite), (Box, overwrite_box)])
def test_a_later_write_of_the_publisher_reaches_only_new_readers(
    four: Client, build: Callable[[int], Any], change: Callable[[Any], Any]
) -> None:
    """Earlier readers keep the published bytes; a new fetch gets the changed bytes, as on stock Dask."""
    a, b, c, _ = addresses(four)
    seed = fresh()
    made = four.submit(build, seed, workers=[a])
    see_on(four, made, [b])
    wait(four.submit(change, made, workers=[a]))
    assert_descriptions_equal(see_on(four, made, [b])[0].description, describe(build(seed)))
    drop_replica(four, made, b)
    expected = build(seed)
    change(expected)
    assert_descriptions_equal(see_on(four, made, [c])[0].description, describe(expected))
    assert_descriptions_equal(describe(four.gather(made)), describe(expected))


def test_a_second_fetch_after_a_dirty_view_gives_the_sealed_bytes(four: Client) -> None:
    """A worker overwrites a value and drops it; when it fetches the value again, it gets the published bytes."""
    a, b, *_ = addresses(four)
    seed = fresh()
    made = four.submit(array, seed, workers=[a])
    for number in (1.0, 2.0, 3.0):
        assert four.submit(overwrite, made, number, workers=[b]).result() == number * BIG
        drop_replica(four, made, b)
        (seen,) = see_on(four, made, [b])
        assert_descriptions_equal(seen.description, describe(array(seed)))


def hold(value: np.ndarray) -> None:
    """Overwrite an array, and keep it outside of Dask, as a cache of a user would."""
    value[:] = -7
    get_worker().held = value  # type: ignore[attr-defined]


def held() -> float:
    """Return the sum of the array that this worker keeps outside of Dask, and drop the array."""
    return float(vars(get_worker()).pop("held").sum())


def test_a_dirty_view_that_is_still_held_is_not_handed_out_again(four: Client) -> None:
    """While one view of a block is dirty and alive, the same process gets a clean view beside it."""
    a, b, *_ = addresses(four)
    seed = fresh()
    made = four.submit(array, seed, workers=[a])
    wait(four.submit(hold, made, workers=[b]))
    drop_replica(four, made, b)
    (seen,) = see_on(four, made, [b])
    assert_descriptions_equal(seen.description, describe(array(seed)))
    assert four.submit(held, workers=[b], pure=False).result() == -7 * BIG


@pytest.mark.parametrize("way", ["submit", "scatter"])
def test_a_key_used_again_never_yields_the_old_contents(four: Client, way: str) -> None:
    """A key is released and gets other contents, many times: each reader sees the contents of its time."""
    a, b, *_ = addresses(four)
    key = f"again-{way}"
    for _ in range(20):
        seed = fresh()
        if way == "submit":
            future = four.submit(array, seed, key=key, workers=[a])
        else:
            future = four.scatter({key: array(seed)}, workers=[a])[key]
        (seen,) = see_on(four, future, [b])
        assert_descriptions_equal(seen.description, describe(array(seed)))
        assert_same(four.gather(future), array(seed))
        where = holders(four, future)
        probe = future
        del future
        probe.release()
        wait_until(lambda where=where, f=probe: not any(kept(four, f, w) for w in where), "the key is released")


LARGE = 16 * MIB // 8


@pytest.mark.parametrize("touch", [overwrite, see, hold])
def test_the_reader_of_a_reused_place_sees_the_new_bytes(cramped: Client, touch: Callable[..., Any]) -> None:
    """A reader touches a value that is then released; the next value takes its place in the segment."""
    a, b = addresses(cramped)
    before = totals(cramped)
    for number in range(1, 7):
        seed = fresh()
        value, workers = array(seed, LARGE), [a]
        future = (
            cramped.submit(array, seed, LARGE, workers=workers)
            if number % 2
            else cramped.scatter(value, workers=workers)
        )
        (seen,) = see_on(cramped, future, [b])
        assert_descriptions_equal(seen.description, describe(value))
        wait(cramped.submit(touch, future, workers=[b], pure=False))
        if touch is hold:
            assert cramped.submit(held, workers=[b], pure=False).result() == -7 * LARGE
        assert (totals(cramped) - before).published == number, "otherwise no place was used again"
        del future
        wait_until(lambda: totals(cramped).used == 0, "the value is released")


def test_a_place_that_is_still_viewed_is_not_reused(cramped: Client) -> None:
    """A view that outlives its key keeps its block: the next value is sent as bytes, and both are right."""
    a, b = addresses(cramped)
    seed = fresh()
    future = cramped.submit(array, seed, LARGE, workers=[a])
    view = cramped.gather(future)
    del future
    other = fresh()
    future = cramped.submit(array, other, LARGE, workers=[a])
    (seen,) = see_on(cramped, future, [b])
    assert_descriptions_equal(seen.description, describe(array(other, LARGE)))
    assert not seen.shared
    assert_same(view, array(seed, LARGE))


@pytest.mark.parametrize("build", [pd.DataFrame, pa.table, dict])
def test_frames_tables_and_containers_are_isolated_too(four: Client, build: Callable[[Any], Any]) -> None:
    """A write to a DataFrame, an Arrow table or a dict stays in its process, like a write to an array."""
    a, b, c, _ = addresses(four)
    data = {"x": array(fresh()), "y": array(fresh())}
    made = four.submit(build, data, workers=[a], pure=False)
    expected = see_on(four, made, [a])[0].description
    see_on(four, made, [b, c])
    wait(four.submit(write_column, made, workers=[b], pure=False))
    for seen in see_on(four, made, [c, a]):
        assert_descriptions_equal(seen.description, expected)


def write_column(value: Any) -> None:
    """Write to the memory of one column, in each of these types."""
    if isinstance(value, pd.DataFrame):
        value.iloc[:, 0] = 0.0
        value._mgr.blocks[0].values[:] = 0.0
    elif isinstance(value, pa.Table):
        column = value.column("x").chunk(0).buffers()[1]
        if column.is_mutable:
            np.frombuffer(column, dtype="f8")[:] = 0.0
    else:
        value["x"][:] = 0.0
