"""An answer that cannot be used costs one more request, for bytes, within the same call, and has no other effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from clusters import local_cluster
from describing import assert_descriptions_equal, describe
from distributed import Client, Event, Future, wait
from observing import BIG, addresses, array, fresh, holders, pids, see, see_on, stored_type, totals, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Client]:
    """A client of three workers for the whole module."""
    with local_cluster(3) as client:
        yield client


@pytest.fixture
def three(cluster: Client) -> Iterator[Client]:
    """A client of three workers; the third cannot use any handle, as if each block were gone when it looks."""
    _, _, c = addresses(cluster)
    cluster.run(use_nothing, workers=[c])
    yield cluster
    cluster.run(use_everything, workers=[c])


def use_nothing() -> None:
    """Let this process find every block gone."""
    from dask_shm_plugin.exceptions import StaleBlock
    from dask_shm_plugin.values import handles

    def resolve(handle: Any, **kwargs: Any) -> Any:
        raise StaleBlock("the block is gone")

    if not hasattr(handles, "usable"):
        handles.usable, handles.resolve = handles.resolve, resolve


def use_everything() -> None:
    """Undo :func:`use_nothing`."""
    from dask_shm_plugin.values import handles

    if hasattr(handles, "usable"):
        handles.resolve = handles.usable
        del handles.usable


def fetch(client: Client, future: Future, reader: str) -> None:
    """Let a task of the reader need the value."""
    wait(client.submit(see, future, workers=[reader], pure=False))


def replicate(client: Client, future: Future, reader: str) -> None:
    """Let the scheduler replicate the value to the reader."""
    client.replicate([future], workers=[reader], n=1)


def let_manager_replicate(client: Client, future: Future, reader: str) -> None:
    """Let the reader acquire a replica as the Active Memory Manager does."""

    def ask(dask_scheduler: Any) -> None:
        dask_scheduler.request_acquire_replicas(reader, [future.key], stimulus_id="test")

    client.run_on_scheduler(ask)


def steal(client: Client, future: Future, reader: str) -> None:
    """Let the reader steal a task whose data lies on another worker."""

    def ask(dask_scheduler: Any) -> None:
        task, thief = dask_scheduler.tasks[waiting.key], dask_scheduler.workers[reader]
        dask_scheduler.extensions["stealing"].move_task_request(task, task.processing_on, thief)

    (owner,) = holders(client, future)
    go_on = Event()
    blockers = [client.submit(go_on.wait, 30, workers=[address], pure=False) for address in (owner, reader)]
    wait_until(lambda: all(client.processing()[address] for address in (owner, reader)), "both workers are busy")
    waiting = client.submit(see, future, workers=[owner, reader], pure=False)
    wait_until(lambda: waiting.key in client.processing()[owner], "the task waits where its data is")
    client.run_on_scheduler(ask)
    wait_until(lambda: waiting.key in client.processing()[reader], "the reader steals the task")
    go_on.set()
    wait([*blockers, waiting])
    assert reader in holders(client, waiting)


WAYS: dict[str, Callable[[Client, Future, str], None]] = {
    "a fetch": fetch,
    "replicate": replicate,
    "the Active Memory Manager": let_manager_replicate,
    "stealing": steal,
}


def logged(client: Client) -> list[str]:
    """Return the log messages of scheduler and workers."""
    return [text for log in (client.get_scheduler_logs(), *client.get_worker_logs().values()) for _, text in log]


@pytest.mark.parametrize("way", WAYS)
def test_an_unusable_value_is_requested_again_as_bytes(three: Client, way: str) -> None:
    """The value is right and not made again, no worker is thought dead, and no log has a traceback."""
    a, _, c = addresses(three)
    seed, before, processes = fresh(), totals(three), pids(three)
    made = three.submit(array, seed, workers=[a], key=f"made-{seed}")
    wait(made)
    WAYS[way](three, made, c)
    wait_until(lambda: c in holders(three, made), "the reader holds the value")
    (seen,) = see_on(three, made, [c])
    assert_descriptions_equal(seen.description, describe(array(seed)))
    assert not seen.shared
    assert (totals(three) - before).sent == 1
    assert (totals(three) - before).sent_bytes >= 8 * BIG
    assert three.run(stored_type, made.key, workers=[c])[c] == "ndarray"
    assert not [text for text in logged(three) if "Traceback" in text or "Compute Failed" in text]
    assert pids(three) == processes
    story = three.run_on_scheduler(lambda key, dask_scheduler: dask_scheduler.story(key), made.key)
    assert [event[2] for event in story if event[0] == made.key].count("memory") == 1


def test_a_retiring_worker_gives_its_values_to_a_worker_that_can_use_no_handle() -> None:
    """Dask moves the values before the worker goes: they arrive as bytes, and none is lost."""
    with local_cluster(2) as client:
        a, b = addresses(client)
        seed = fresh()
        made = client.submit(array, seed, workers=[a])
        wait(made)
        client.run(use_nothing, workers=[b])
        client.retire_workers([a])
        assert holders(client, made) == {b}
        (seen,) = see_on(client, made, [b])
        assert_descriptions_equal(seen.description, describe(array(seed)))
        assert not [text for text in logged(client) if "Traceback" in text]


@pytest.mark.parametrize("direct", [False, True])
def test_a_client_that_cannot_use_a_handle_gathers_bytes(cluster: Client, direct: bool) -> None:
    """A gather through the scheduler and a direct one both repeat the request, for bytes."""
    a, *_ = addresses(cluster)
    seed, before = fresh(), totals(cluster)
    made = cluster.submit(array, seed, workers=[a])
    wait(made)
    use_nothing()
    try:
        seen = see(cluster.gather(made, direct=direct))
    finally:
        use_everything()
    assert_descriptions_equal(seen.description, describe(array(seed)))
    assert not seen.shared
    assert (totals(cluster) - before).sent == 1
