"""An answer that cannot be used costs one more request, for bytes, within the same call; nobody else notices."""

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
    """A client of three workers of which the third can use no handle, as if each block were gone when it looks."""
    _, _, c = addresses(cluster)
    cluster.run(use_nothing, workers=[c])
    yield cluster
    cluster.run(use_everything, workers=[c])


def use_nothing() -> None:
    """Let this process find every block gone."""
    from dask_shm_plugin import handles
    from dask_shm_plugin.exceptions import StaleBlock

    def resolve(handle: Any, **kwargs: Any) -> Any:
        raise StaleBlock("the block is gone")

    if not hasattr(handles, "usable"):
        handles.usable, handles.resolve = handles.resolve, resolve


def use_everything() -> None:
    """Undo it."""
    from dask_shm_plugin import handles

    if hasattr(handles, "usable"):
        handles.resolve = handles.usable
        del handles.usable


def fetch(client: Client, future: Future, reader: str) -> None:
    """Let a task of the reader ask for it."""
    wait(client.submit(see, future, workers=[reader], pure=False))


def replicate(client: Client, future: Future, reader: str) -> None:
    """Let the scheduler make a replica there."""
    client.replicate([future], workers=[reader], n=1)


def let_manager_replicate(client: Client, future: Future, reader: str) -> None:
    """Let the reader acquire a replica as the Active Memory Manager does."""

    def ask(dask_scheduler: Any) -> None:
        dask_scheduler.request_acquire_replicas(reader, [future.key], stimulus_id="test")

    client.run_on_scheduler(ask)


def steal(client: Client, future: Future, reader: str) -> None:
    """Let the reader have a task whose data lies elsewhere, as work stealing does."""

    def ask(dask_scheduler: Any) -> None:
        task, thief = dask_scheduler.tasks[waiting.key], dask_scheduler.workers[reader]
        dask_scheduler.extensions["stealing"].move_task_request(task, task.processing_on, thief)

    (owner,) = holders(client, future)
    go_on = Event()
    blockers = [client.submit(go_on.wait, 30, workers=[address], pure=False) for address in (owner, reader)]
    wait_until(lambda: all(client.processing()[address] for address in (owner, reader)), "both are busy")
    waiting = client.submit(see, future, workers=[owner, reader], pure=False)
    wait_until(lambda: waiting.key in client.processing()[owner], "the task waits where its data is")
    client.run_on_scheduler(ask)
    wait_until(lambda: waiting.key in client.processing()[reader], "it is stolen")
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
    """Return what scheduler and workers have logged."""
    return [text for log in (client.get_scheduler_logs(), *client.get_worker_logs().values()) for _, text in log]


@pytest.mark.parametrize("way", WAYS)
def test_it_is_asked_for_again_as_bytes(three: Client, way: str) -> None:
    """The value is right, nothing is made again, nobody is thought dead, and no log has a traceback."""
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


def test_a_worker_that_retires_gives_its_values_to_one_that_cannot_use_them() -> None:
    """As bytes: nothing is lost."""
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
def test_a_client_that_cannot_use_it_gathers_bytes(cluster: Client, direct: bool) -> None:
    """Through the scheduler or directly."""
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
