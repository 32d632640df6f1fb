"""Options and their sources, the refusal of invalid ones, counters, and the complete removal by `unregister`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import dask
import numpy as np
import pytest
from clusters import OPTIONS, local_cluster, register
from describing import assert_descriptions_equal, assert_same, describe
from distributed import Client, wait
from observing import (
    BIG,
    MIB,
    addresses,
    array,
    fresh,
    known_workers,
    lies_in_arena,
    outside,
    see,
    see_on,
    totals,
    wait_until,
)

pytestmark = pytest.mark.slow

INVALID: list[dict[str, Any]] = [
    {"capacity": "lots"},
    {"capacity": -1},
    {"capacity": "-1 MiB"},
    {"capacity": "150%"},
    {"capacity": ...},
    {"threshold": -1},
    {"threshold": "many"},
    {"threshold": "64 parsecs"},
    {"threshold": []},
    {"publish": "sometimes"},
    {"publish": 1},
    {"views": "writeable"},
    {"warm": "-1s"},
    {"warm": "hot"},
    {"warm": "1 GiB"},
]

VALID: list[dict[str, Any]] = [
    {},
    {"capacity": "256 MiB"},
    {"capacity": 2**28},
    {"capacity": "50%"},
    {"threshold": 0},
    {"threshold": "64 KiB"},
    {"publish": "on-request"},
    {"publish": "on-completion"},
    {"views": "copy-on-write"},
    {"views": "read-only"},
    {"warm": 0},
    {"warm": "500 ms"},
    {"warm": 1.5},
]


def plugin(**options: Any) -> Any:
    """Construct the plugin."""
    from dask_shm_plugin import SharedMemoryPlugin

    return SharedMemoryPlugin(**options)


@pytest.mark.parametrize("options", INVALID, ids=str)
def test_an_invalid_option_is_an_error_at_construction(options: dict[str, Any]) -> None:
    """The message names the option and its value."""
    ((name, value),) = options.items()
    with pytest.raises((ValueError, TypeError)) as error:
        plugin(**options)
    assert name in str(error.value)
    assert str(value) in str(error.value) or repr(value) in str(error.value)


@pytest.mark.parametrize("options", INVALID, ids=str)
def test_an_invalid_setting_in_the_configuration_is_an_error_at_construction(options: dict[str, Any]) -> None:
    """A value that the constructor refuses is refused in `dask.config`, too."""
    ((name, value),) = options.items()
    with dask.config.set({f"shm.{name}": value}), pytest.raises((ValueError, TypeError), match=name):
        plugin()


@pytest.mark.parametrize("options", VALID, ids=str)
def test_valid_options_are_accepted(options: dict[str, Any]) -> None:
    """Sizes are numbers or strings, and a capacity may be a fraction of the node's memory."""
    plugin(**options)
    with dask.config.set({f"shm.{name}": value for name, value in options.items()}):
        plugin()


def test_an_unknown_option_is_an_error() -> None:
    """A misspelt option must not be ignored in silence."""
    with pytest.raises(TypeError, match="treshold"):
        plugin(treshold="1 MiB")


def test_a_constructor_argument_wins_over_the_configuration() -> None:
    """The threshold of the constructor holds, on workers and on the client."""
    with dask.config.set({"shm.threshold": "1 GiB"}), local_cluster(2) as client:
        a, b = addresses(client)
        made = client.submit(array, fresh(), workers=[a])
        assert see_on(client, made, [b])[0].shared
        assert see_on(client, client.scatter(array(fresh()), workers=[a]), [a])[0].shared


def test_the_configuration_holds_for_missing_arguments() -> None:
    """Nannies pass `dask.config` on to their workers, so its threshold holds on workers and client."""
    with dask.config.set({"shm.threshold": "64 KiB", "shm.capacity": "64 MiB"}), local_cluster(2, {}) as client:
        a, b = addresses(client)
        made = client.submit(array, fresh(), workers=[a])
        assert see_on(client, made, [b])[0].shared
        assert see_on(client, client.scatter(array(fresh()), workers=[a]), [a])[0].shared


def test_on_completion_publishes_before_any_request() -> None:
    """With `publish="on-completion"`, a large result lies in the arena as soon as its task is done."""
    with local_cluster(2, OPTIONS | {"publish": "on-completion"}) as client:
        a, b = addresses(client)
        seed = fresh()
        made = client.submit(array, seed, workers=[a])
        wait(made)
        wait_until(partial(lies_in_arena, client, made, a), "the result is published")
        assert totals(client).used >= BIG * 8
        little = client.submit(array, seed, 16, workers=[a])
        for seen in see_on(client, made, [a, b]):
            assert_descriptions_equal(seen.description, describe(array(seed)))
            assert seen.shared
            assert seen.writeable
        assert not see_on(client, little, [b])[0].shared
        del made, little
        wait_until(lambda: totals(client).used == 0, "the arena empties")


def test_read_only_views_cannot_be_written() -> None:
    """With `views="read-only"`, a write to a received array is an error; content and type are as ever."""
    with local_cluster(2, OPTIONS | {"views": "read-only"}) as client:
        a, b = addresses(client)
        seed = fresh()
        made = client.submit(array, seed, workers=[a])
        (seen,) = see_on(client, made, [b])
        assert seen.shared
        assert not seen.writeable
        value = client.gather(made)
        np.testing.assert_array_equal(value, array(seed))
        with pytest.raises(ValueError, match="read-only"):
            value[0] = 1


# ------------------------------------------------------------------------------------------------- stats and metrics


def test_stats_describe_the_arena_of_the_node(four: Client) -> None:
    """`stats` shows one arena, all workers, and sizes that add up."""
    from dask_shm_plugin import stats

    a, b, *_ = addresses(four)
    made = four.submit(outside, array, fresh(), workers=[a])
    see_on(four, made, [b])
    # The owner adopts the value after it has answered, which may be later than the reader's result.
    wait_until(lambda: lies_in_arena(four, made, a), "the publisher adopts the value")
    ((name, arena),) = stats(four).items()
    assert isinstance(name, str)
    assert sorted(arena["workers"]) == sorted(addresses(four))
    assert arena["capacity"] == 256 * MIB
    assert BIG * 8 <= arena["used"] <= arena["resident"] <= arena["capacity"]
    assert arena["blocks"] == 1
    assert (arena["room"], arena["bound_by"]) == (arena["capacity"] - arena["used"], "shm.capacity")
    for counter in ("published", "attached", "adopted"):
        assert arena[counter].keys() == {"count", "bytes"}
        assert arena[counter]["count"] >= 1
        assert arena[counter]["bytes"] >= BIG * 8
    assert isinstance(arena["sent"], dict)
    assert all(reason.keys() == {"count", "bytes"} for reason in arena["sent"].values())


def test_each_worker_has_its_counters_in_its_metrics(four: Client) -> None:
    """The counters travel with the heartbeat, from which the dashboard and Prometheus read them."""
    a, b, *_ = addresses(four)
    made = four.submit(outside, array, fresh(), workers=[a])
    see_on(four, made, [b])

    def counted(address: str, counter: str) -> bool:
        metrics = known_workers(four)[address]["metrics"]
        return "shm" in metrics and metrics["shm"][counter]["count"] >= 1

    wait_until(lambda: counted(a, "published"), "the publisher reports its publications")
    wait_until(lambda: counted(b, "attached"), "the reader reports its mappings")
    wait_until(lambda: counted(a, "adopted"), "the publisher reports its adoptions")


def test_a_new_cluster_counts_from_zero(four: Client) -> None:
    """Values that this process moved in an earlier cluster are not counted in a new one."""
    future = four.scatter(array(fresh()), broadcast=True)
    four.gather(future)
    with local_cluster(1) as client:
        counted = totals(client)
        assert (counted.published, counted.attached, counted.adopted, counted.sent) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda value: value, True),
        (lambda value: value[10:20], True),
        (lambda value: value.reshape(2, -1).T, True),
        (lambda value: value.copy(), False),
        (lambda value: value.tobytes(), False),
        (lambda value: None, False),
        (lambda value: "text", False),
        (lambda value: np.empty(0), False),
    ],
    ids=["value", "slice", "transposed", "copy", "bytes", "none", "text", "empty"],
)
def test_is_shared_tells_where_a_value_lies(four: Client, build: Callable[[Any], Any], expected: bool) -> None:
    """A view of a shared value is shared, and a copy of it is not."""
    from dask_shm_plugin import is_shared

    value = four.gather(four.scatter(array(fresh())))
    assert is_shared(build(value)) is expected


# ------------------------------------------------------------------------------------------------------ unregister


def traces(target: Any) -> list[str]:
    """Return the attributes and items of a Dask object that come from the package."""

    def foreign(value: Any) -> bool:
        value = getattr(value, "__func__", getattr(value, "func", value))
        module = getattr(value, "__module__", None) or ""
        return f"{module} {type(value).__module__}".find("dask_shm_plugin") >= 0

    found = [name for name, value in vars(target).items() if foreign(value)]
    found += [f"class {name}" for cls in type(target).__mro__ for name, value in vars(cls).items() if foreign(value)]
    for name in ("handlers", "stream_handlers", "plugins", "periodic_callbacks", "metrics", "extensions"):
        found += [f"{name}[{key}]" for key, value in (getattr(target, name, None) or {}).items() if foreign(value)]
    for name in ("monitor", "memory_manager", "data", "rpc", "loop", "scheduler", "state"):
        inner = getattr(target, name, None)
        found += [f"{name}.{key}" for key, value in (getattr(inner, "__dict__", None) or {}).items() if foreign(value)]
    callbacks = getattr(target, "periodic_callbacks", {})
    return found + [f"callback {key}" for key, value in callbacks.items() if foreign(value.callback)]


def all_traces(client: Client) -> dict[str, Any]:
    """Return the package's traces in all processes of a cluster."""
    found: dict[str, Any] = {
        "workers": client.run(lambda dask_worker: traces(dask_worker)),
        "nannies": client.run(lambda dask_worker: traces(dask_worker), nanny=True),
        "scheduler": client.run_on_scheduler(lambda dask_scheduler: traces(dask_scheduler)),
        "client": traces(client),
    }
    return {where: what for where, what in found.items() if (any(what.values()) if isinstance(what, dict) else what)}


def test_unregister_puts_everything_back_and_living_values_stay_valid() -> None:
    """Workers, nannies, scheduler and client are as before, and shared values can still be read and moved."""
    from dask_shm_plugin import is_shared, unregister

    with local_cluster(2, options=None) as client:
        a, b = addresses(client)
        before = all_traces(client)
        register(client, **OPTIONS)
        seed = fresh()
        scattered = client.scatter(array(seed), broadcast=True)
        made = client.submit(array, 2 * seed, workers=[a])
        see_on(client, made, [b])
        view = client.gather(scattered)
        assert is_shared(view)
        assert all_traces(client) != before, "otherwise this test could not see that anything was left"

        unregister(client)
        assert all_traces(client) == before
        assert_same(view, array(seed))
        for address in (a, b):
            assert_descriptions_equal(see_on(client, scattered, [address])[0].description, describe(array(seed)))
            assert_descriptions_equal(see_on(client, made, [address])[0].description, describe(array(2 * seed)))
        assert_same(client.gather(made), array(2 * seed))
        later = client.submit(array, 3 * seed, workers=[a])
        (seen,) = see_on(client, later, [b])
        assert_descriptions_equal(seen.description, describe(array(3 * seed)))
        assert not seen.shared
        assert not is_shared(client.gather(later))
        client.cluster.scale(3)
        client.wait_for_workers(3)
        assert not client.submit(see, later, workers=addresses(client)[2:]).result().shared

        register(client, **OPTIONS)
        again = client.submit(array, 4 * seed, workers=[b])
        assert see_on(client, again, [a])[0].shared


@pytest.mark.parametrize("direct", [False, True])
def test_unregister_lets_a_scatter_under_way_arrive(direct: bool) -> None:
    """Whenever sharing is switched off, each worker gets the value itself, and no handle that it cannot resolve."""
    from dask_shm_plugin import SharedMemoryPlugin, unregister

    async def scatter_and_unregister(address: str, turns: int) -> None:
        async with Client(address, asynchronous=True, set_as_default=False) as client:
            await client.register_plugin(SharedMemoryPlugin(**OPTIONS))
            seed = fresh()
            under_way = asyncio.ensure_future(client.scatter(array(seed), broadcast=True, direct=direct))
            for _ in range(turns):
                await asyncio.sleep(0)
            await unregister(client)
            future = await under_way
            assert_same(await client.gather(future), array(seed))
            seen = await client.gather(client.map(see, [future] * 2, workers=workers, pure=False))
            for one in seen:
                assert_descriptions_equal(one.description, describe(array(seed)))

    with local_cluster(2, options=None) as client:
        workers = addresses(client)
        before = all_traces(client)
        for turns in (1, 4, 16, 32, 64, 128, 512):
            asyncio.run(scatter_and_unregister(client.scheduler.address, turns))
            assert all_traces(client) == before
