"""Large values move between client and workers, and between workers, as handles instead of bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
from describing import assert_descriptions_equal, assert_same, describe
from distributed import Client, Event, Future, wait
from observing import (
    BIG,
    LITTLE,
    Seen,
    Totals,
    addresses,
    array,
    assert_saw,
    fresh,
    holders,
    is_shared,
    lies_in_arena,
    see,
    see_on,
    totals,
    wait_until,
)

pytestmark = pytest.mark.slow

# ------------------------------------------------------------------------------------------------ worker → worker


def test_the_first_fetch_ships_a_handle(four: Client) -> None:
    """The first worker that requests a value maps it already, and no bytes are sent."""
    seed = fresh()
    a, b, *_ = addresses(four)
    made = four.submit(array, seed, workers=[a])
    before = totals(four)
    (seen,) = see_on(four, made, [b])
    assert_saw(seen, array(seed))
    grown = totals(four) - before
    assert (grown.blocks_made, grown.attached > 0, grown.sent) == (1, True, 0)
    assert grown.bytes_made >= BIG * 8


def test_the_publisher_adopts_its_value(four: Client) -> None:
    """After the first fetch, the value in the publisher's own data lies in the arena, too."""
    seed = fresh()
    a, b, *_ = addresses(four)
    made = four.submit(array, seed, workers=[a])
    before = totals(four)
    see_on(four, made, [b])
    wait_until(lambda: lies_in_arena(four, made, a), "the publisher adopts the value")
    wait_until(lambda: (totals(four) - before).adopted >= 1, "the adoption is counted")
    (seen,) = see_on(four, made, [a])
    assert_saw(seen, array(seed))


def test_a_value_without_a_request_is_not_published(four: Client) -> None:
    """By default, a result stays private until another process needs it."""
    seed = fresh()
    a, *_ = addresses(four)
    before = totals(four)
    made = four.submit(array, seed, workers=[a])
    (seen,) = see_on(four, made, [a])
    assert_saw(seen, array(seed), shared=False)
    assert (totals(four) - before).blocks_made == 0


def test_further_fetches_need_no_further_copy(four: Client) -> None:
    """Three workers and a client map a value that was published once."""
    seed = fresh()
    a, *others = addresses(four)
    made = four.submit(array, seed, workers=[a])
    before = totals(four)
    for other in others:
        (seen,) = see_on(four, made, [other])
        assert_saw(seen, array(seed))
    assert_same(four.gather(made), array(seed))
    grown = totals(four) - before
    assert (grown.published, grown.sent) == (1, 0)
    assert grown.attached >= 4


def test_simultaneous_requests_share_one_copy(four: Client) -> None:
    """Three workers and a client that request a new value at the same time share one publication."""
    a, *others = addresses(four)
    for _ in range(6):
        seed = fresh()
        made = four.submit(array, seed, workers=[a])
        before = totals(four)
        tasks = [four.submit(see, made, workers=[other], pure=False) for other in others]
        assert_same(four.gather(made, direct=True), array(seed))
        for seen in four.gather(tasks):
            assert_saw(seen, array(seed))
        assert (totals(four) - before).blocks_made == 1


def test_a_value_below_the_threshold_travels_as_bytes(four: Client) -> None:
    """Small values stay outside of the arena, however they move."""
    seed = fresh()
    a, b, *_ = addresses(four)
    before = totals(four)
    made = four.submit(array, seed, LITTLE, workers=[a])
    scattered = four.scatter(array(2 * seed, LITTLE), broadcast=True)
    assert_saw(see_on(four, made, [b])[0], array(seed, LITTLE), shared=False)
    assert_saw(see_on(four, scattered, [b])[0], array(2 * seed, LITTLE), shared=False)
    assert not is_shared(made.result())
    grown = totals(four) - before
    assert (grown.published, grown.attached, grown.adopted, grown.used) == (0, 0, 0, 0)


def test_replicate_maps_instead_of_sending(four: Client) -> None:
    """Replicas that Dask makes by itself are mappings, too."""
    seed = fresh()
    made = four.submit(array, seed, workers=addresses(four)[:1])
    wait(made)
    before = totals(four)
    four.replicate([made])
    assert holders(four, made) == set(addresses(four))
    assert all(lies_in_arena(four, made, address) for address in addresses(four)[1:])
    assert (totals(four) - before).sent == 0


# ------------------------------------------------------------------------------------------------ worker → client


def gathered(client: Client, future: Future) -> Any:
    return client.gather(future)


def gathered_directly(client: Client, future: Future) -> Any:
    return client.gather(future, direct=True)


def gathered_in_a_dict(client: Client, future: Future) -> Any:
    return client.gather({"one": [future]})["one"][0]


def result(client: Client, future: Future) -> Any:
    return future.result()


@pytest.mark.parametrize("bring", [gathered, gathered_directly, gathered_in_a_dict, result])
def test_a_client_maps_a_gathered_result(four: Client, bring: Callable[[Client, Future], Any]) -> None:
    """A result arrives at the client as a writeable array that lies in the arena."""
    seed = fresh()
    made = four.submit(array, seed, workers=addresses(four)[:1], pure=False)
    before = totals(four)
    value = bring(four, made)
    assert_same(value, array(seed))
    assert is_shared(value)
    assert (totals(four) - before).sent == 0


def test_results_of_compute_are_mapped(four: Client) -> None:
    """Results of `dask.compute` and `Client.compute` are mapped, too."""
    (value,) = dask.compute(dask.delayed(array)(41))
    assert_same(value, array(41))
    assert is_shared(value)
    value = four.compute(dask.delayed(array)(42)).result()
    assert_same(value, array(42))
    assert is_shared(value)


def test_large_and_small_results_are_gathered_together(four: Client) -> None:
    """Each value of a mixed gather is right, and the large ones are mapped."""
    sizes = [BIG, 1, LITTLE, BIG]
    made = [four.submit(array, 43 + n, size, pure=False) for n, size in enumerate(sizes)]
    values = four.gather(made)
    for number, (value, size) in enumerate(zip(values, sizes, strict=True)):
        assert_same(value, array(43 + number, size))
        assert is_shared(value) == (size == BIG)


# ------------------------------------------------------------------------------------------------- views of blocks


def first_half(value: np.ndarray) -> np.ndarray:
    return value[: len(value) // 2]


def middle(value: np.ndarray) -> np.ndarray:
    return value[1001:-1001]


def reshaped(value: np.ndarray) -> np.ndarray:
    return value.reshape(4, -1)


def retyped(value: np.ndarray) -> np.ndarray:
    return value.view("u4")


def framed(value: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"x": value}, copy=False)


def nested(value: np.ndarray) -> dict[str, Any]:
    return {"left": [value[: len(value) // 2]], "right": value[len(value) // 2 :]}


@pytest.mark.parametrize("view", [first_half, middle, reshaped, retyped, framed, nested])
@pytest.mark.parametrize("start", ["scattered", "fetched"])
def test_a_view_of_a_shared_value_is_published_without_a_copy(
    four: Client, start: str, view: Callable[[np.ndarray], Any]
) -> None:
    """A value that lies in a block already needs no second block, also under another key."""
    seed = fresh()
    a, b, c, _ = addresses(four)
    whole = four.scatter(array(seed), workers=[b]) if start == "scattered" else four.submit(array, seed, workers=[a])
    see_on(four, whole, [b])
    part = four.submit(view, whole, workers=[b], pure=False)
    wait(part)
    before: Totals = totals(four)
    (seen,) = see_on(four, part, [c])
    assert_descriptions_equal(seen.description, describe(view(array(seed))))
    wait_until(
        lambda: (totals(four) - before).used < LITTLE * 8, "there is no second block, nor a draft of a task's array"
    )
    grown = totals(four) - before
    assert grown.sent == 0
    assert grown.attached > 0


# --------------------------------------------------------------------------------------------------- ordinary work


def test_a_blocked_computation_gives_the_right_numbers(four: Client) -> None:
    """A computation that moves many chunks gives the same numbers as without a cluster."""
    x = da.from_array(array(70, 4 * BIG).reshape(256, -1), chunks=(64, 128))
    expression = ((x + x[::-1]).T @ x).sum(axis=0) + x.mean()
    np.testing.assert_allclose(expression.compute(), expression.compute(scheduler="synchronous"))


def test_a_mapped_value_in_a_graph_travels_as_bytes(four: Client) -> None:
    """A graph holds no reference to a block: a value in it must be right even after the block's place is used again."""
    seed = fresh()
    a, b, *_ = addresses(four)
    made = four.submit(array, seed, workers=[a])
    value = four.gather(made)
    blocker = four.submit(wait_for_event, "graph", workers=[b], pure=False)
    task = four.submit(see_after, blocker, value, workers=[b], pure=False)
    del value, made
    others = [four.gather(four.submit(array, seed, workers=[a])) for seed in (fresh(), fresh())]
    Event("graph", client=four).set()
    assert_descriptions_equal(task.result().description, describe(array(seed)))
    del others


def wait_for_event(name: str) -> None:
    """Block a worker until the test sets an event."""
    assert Event(name).wait(timeout=60)


def see_after(blocker: None, value: Any) -> Seen:
    """Look at a value that was part of the graph."""
    return see(value)
