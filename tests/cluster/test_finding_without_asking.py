"""A published value is found in the arena without a request to its owner, unless it may have changed since."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from clusters import local_cluster
from describing import assert_descriptions_equal, describe
from distributed import Client, Event, wait
from observing import (
    addresses,
    array,
    assert_saw,
    drop_replica,
    fresh,
    lies_in_arena,
    outside,
    pids,
    see_on,
    settle,
    wait_until,
)

from dask_shm_plugin import metrics, unregister
from dask_shm_plugin.mapping import atlas
from dask_shm_plugin.node import membership
from dask_shm_plugin.transfer import adopter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def three(nothing_leaks: None) -> Iterator[Client]:
    """A client of three workers."""
    with local_cluster(3) as client:
        yield client


def made_and_read(client: Client, seed: int, **options: Any) -> Any:
    """Let the first worker make a value and the second read it; afterwards only the first one holds it."""
    a, b, _ = addresses(client)
    made = client.submit(array, seed, workers=[a], pure=False, **options)
    (seen,) = see_on(client, made, [b])
    assert_saw(seen, array(seed))
    drop_replica(client, made, b)
    wait_until_listed(client, a)
    return made


def found(client: Client, address: str) -> int:
    """Return the number of values that a worker has found without a request."""
    return client.run(lambda: metrics.COUNTERS.snapshot()["found"]["count"], workers=[address])[address]


def listed(client: Client, address: str) -> int:
    """Return the number of values that a worker lists."""
    return client.run(lambda: sum(len(arena.directory._names) for arena in membership.all_arenas()), workers=[address])[
        address
    ]


def wait_until_listed(client: Client, owner: str) -> None:
    """Wait until a worker lists one value: it does so after its answer, which may be later than the reader's result."""
    wait_until(lambda: listed(client, owner) == 1, lambda: f"one value is listed: {listed(client, owner)}")


def prune(dask_worker: Any) -> None:
    """Do the pruning that a worker does every few seconds."""
    dask_worker.plugins["dask-shm"].half._running.publisher.prune()


def negate(x: np.ndarray) -> np.ndarray:
    """Change an array in place and return it."""
    np.negative(x, out=x)
    return x


def test_a_published_value_is_read_while_its_owner_is_stopped(three: Client) -> None:
    """The owner is stopped during the read, so the reader must have found the value in the arena."""
    a, _, c = addresses(three)
    seed, victim = fresh(), pids(three)[a]
    made = made_and_read(three, seed)
    before = found(three, c)
    os.kill(victim, signal.SIGSTOP)
    try:
        (seen,) = see_on(three, made, [c])
        assert_saw(seen, array(seed))
        assert found(three, c) == before + 1
    finally:
        os.kill(victim, signal.SIGCONT)


@pytest.mark.parametrize("key", ["a name", ("tuple", 1, 2.5)])
def test_a_key_that_is_used_again_gives_the_new_value(three: Client, key: Any) -> None:
    """The listing of the old value is removed at the moment when the owner releases the key."""
    a, b, c = addresses(three)
    for _ in range(5):
        seed = fresh()
        made = made_and_read(three, seed, key=key)
        before = found(three, c)
        (seen,) = see_on(three, made, [c])
        assert_saw(seen, array(seed))
        assert found(three, c) == before + 1
        del made, seen
        settle(three)
    assert [listed(three, address) for address in (a, b, c)] == [0, 0, 0]


def test_a_value_that_is_spilled_is_not_listed(three: Client) -> None:
    """After spilling, the owner sends the value from disk, and no listing keeps its block."""
    a, _, c = addresses(three)
    seed = fresh()
    made = made_and_read(three, seed)
    assert listed(three, a) == 1
    three.run(lambda dask_worker: dask_worker.data.fast.evict(made.key) and None, workers=[a])
    assert listed(three, a) == 0
    (seen,) = see_on(three, made, [c])
    assert_saw(seen, array(seed))


def test_a_value_that_a_task_changed_is_sent_as_changed(three: Client) -> None:
    """As on stock Dask, tasks of the owner and all later readers see the change."""
    a, b, c = addresses(three)
    seed = fresh()
    made = made_and_read(three, seed)
    assert listed(three, a) == 1
    changed = three.submit(negate, made, workers=[a], pure=False)
    wait(changed)
    assert listed(three, a) == 0
    for value in (changed, made):
        for seen in see_on(three, value, [c, a, b]):
            assert_saw(seen, -array(seed), shared=seen.shared)


class Gate:
    """Stops a worker right before it maps the shared copy of a value that it is about to adopt."""

    def __init__(self, client: Client, address: str) -> None:
        self._client, self._address = client, address

    def _run(self, function: Any) -> Any:
        return self._client.run(function, workers=[self._address])[self._address]

    def __enter__(self) -> Gate:
        def close() -> None:
            reached, opened, before = threading.Event(), threading.Event(), adopter._rebuild

            def wait_there(*args: Any) -> Any:
                reached.set()
                assert opened.wait(30)
                return before(*args)

            adopter._rebuild = wait_there
            adopter._gate = reached, opened, before

        self._run(close)
        return self

    def wait(self) -> None:
        """Wait until a thread of the worker has reached the gate."""
        wait_until(lambda: self._run(lambda: adopter._gate[0].is_set()), "the gate is reached")

    def __exit__(self, *_: object) -> None:
        def leave_open() -> None:
            _, opened, adopter._rebuild = adopter._gate
            del adopter._gate
            opened.set()

        self._run(leave_open)


def test_adoption_does_not_undo_a_change_in_place(three: Client) -> None:
    """A task changes a value in place and returns it while it is published: later readers get the changed bytes."""
    a, b, c = addresses(three)
    seed = fresh()
    made = three.submit(outside, array, seed, workers=[a], pure=False)  # what is born is not adopted
    wait(made)
    with Gate(three, a) as gate:
        reading = three.submit(np.sum, made, workers=[b], pure=False)
        gate.wait()
        changed = three.submit(negate, made, workers=[a], pure=False)
        wait(changed)
    assert reading.result() in (array(seed).sum(), -array(seed).sum())
    drop_replica(three, made, b)
    for value in (changed, made):
        for seen in see_on(three, value, [a, c]):
            assert_saw(seen, -array(seed), shared=seen.shared)
    # The value has one key again and no reader, so one copy is enough.
    name = made.key
    del made, reading, value
    wait_until(
        lambda: not three.run(lambda dask_worker: name in dask_worker.data, workers=[a])[a], "the key is released"
    )
    three.run(prune, workers=[a])
    wait_until(lambda: lies_in_arena(three, changed, a), "the private copy is dropped")


def hold(x: np.ndarray, name: str, then: Any = None) -> Any:
    """Keep an input in use until an event is set."""
    Event(f"{name}-begun").set()
    Event(name).wait(60)
    return then(x) if then else None


def test_a_value_in_use_during_a_fetch_is_adopted_later(three: Client) -> None:
    """The worker must not wait for another request to adopt it: none comes, because all others have the value."""
    a, b, c = addresses(three)
    made = three.submit(outside, array, fresh(), workers=[a], pure=False)
    using = three.submit(hold, made, made.key, workers=[a], pure=False)
    Event(f"{made.key}-begun", client=three).wait(30)
    see_on(three, made, [b, c])
    assert not lies_in_arena(three, made, a)
    three.run(prune, workers=[a])
    assert not lies_in_arena(three, made, a)
    Event(made.key, client=three).set()
    wait(using)
    three.run(prune, workers=[a])
    wait_until(lambda: lies_in_arena(three, made, a), "the private copy is dropped")


def test_a_value_that_a_cancelled_task_changes_is_sent_as_changed(three: Client) -> None:
    """The task runs on with a value that is left under another key only, and changes it: readers get the change."""
    a, b, c = addresses(three)
    seed = fresh()
    made = three.submit(array, seed, workers=[a], pure=False)
    same = three.submit(lambda x: x, made, workers=[a], pure=False)
    wait(same)
    name = made.key
    changing = three.submit(hold, made, name, negate, workers=[a], pure=False)
    Event(f"{name}-begun", client=three).wait(30)
    changing.cancel()
    del changing, made
    wait_until(
        lambda: not three.run(lambda dask_worker: name in dask_worker.data, workers=[a])[a], "the key is released"
    )
    see_on(three, same, [b])
    drop_replica(three, same, b)
    Event(name, client=three).set()
    idle = "no task is running"
    wait_until(lambda: not three.run(lambda dask_worker: len(dask_worker.state.executing), workers=[a])[a], idle)
    for seen in see_on(three, same, [a, c]):
        assert_saw(seen, -array(seed), shared=seen.shared)


def test_a_value_that_is_changed_during_unregister_is_sent_as_changed() -> None:
    """Dask reports no more tasks to a plugin that it removes, so no listing may rely on such a report."""
    with local_cluster(2) as client:
        a, b = addresses(client)
        seed = fresh()
        made = client.submit(array, seed, workers=[a], pure=False)
        see_on(client, made, [b])
        drop_replica(client, made, b)
        wait_until_listed(client, a)

        def close() -> None:
            reached, opened, before = threading.Event(), threading.Event(), membership.withdraw

            def wait_there(*args: Any) -> None:
                reached.set()
                assert opened.wait(30)
                before(*args)

            membership.withdraw = wait_there
            membership._gate = reached, opened

        client.run(close)
        leaving = threading.Thread(target=unregister, args=(client,))
        leaving.start()
        try:
            stand = "all workers reach the gate"
            wait_until(lambda: all(client.run(lambda: membership._gate[0].is_set()).values()), stand)
            wait(client.submit(negate, made, workers=[a], pure=False))
            (seen,) = see_on(client, made, [b])
            assert_saw(seen, -array(seed), shared=seen.shared)
        finally:
            client.run(lambda: membership._gate[1].set())
            leaving.join()


class Negating:
    """An actor, or an object, that keeps an array and changes it later."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x

    def negate(self) -> None:
        """Change the array in place."""
        negate(self.x)


@pytest.mark.parametrize("how", ["a view", "in an object", "by an actor"])
def test_a_value_that_is_changed_through_an_alias_is_sent_as_changed(three: Client, how: str) -> None:
    """The value changes through a view, an object or an actor: no task with its key as an input makes the change."""
    a, b, c = addresses(three)
    seed = fresh()
    made = made_and_read(three, seed)
    if how == "by an actor":
        holding = three.submit(Negating, made, workers=[a], actor=True).result()
    else:
        holding = three.submit((lambda x: x[:]) if how == "a view" else Negating, made, workers=[a], pure=False)
        wait(holding)
    see_on(three, made, [b])
    drop_replica(three, made, b)
    if how == "by an actor":
        holding.negate().result()
    else:
        change = negate if how == "a view" else Negating.negate
        wait(three.submit(lambda x: change(x) is None, holding, workers=[a], pure=False))
    for address in (c, a):
        (seen,) = see_on(three, made, [address])
        assert_saw(seen, -array(seed), shared=seen.shared)


def test_results_without_memory_of_a_value_do_not_prevent_its_listing(three: Client) -> None:
    """Numbers, texts and arrays of their own are no aliases: other workers still find the value."""
    a, b, c = addresses(three)
    made = made_and_read(three, fresh())
    results = [three.submit(f, made, workers=[a], pure=False) for f in (np.sum, np.negative, lambda x: None, str)]
    wait(results)
    assert listed(three, a) == 0
    see_on(three, made, [b])
    drop_replica(three, made, b)
    wait_until_listed(three, a)
    before = found(three, c)
    see_on(three, made, [c])
    assert found(three, c) == before + 1


def test_values_that_are_not_arrays_are_found_as_well(three: Client) -> None:
    """Each shared value is listed, not only an array, and however it is nested."""
    pd = pytest.importorskip("pandas")
    a, b, c = addresses(three)
    for make in (
        lambda seed: {"x": array(seed), "name": "y"},
        lambda seed: pd.DataFrame({"x": array(seed), "y": array(seed + 1)}),
        lambda seed: pd.Series(array(seed), name="z"),
    ):
        seed = fresh()
        made = three.submit(make, seed, workers=[a], pure=False)
        see_on(three, made, [b])
        drop_replica(three, made, b)
        wait_until_listed(three, a)
        before = found(three, c)
        (seen,) = see_on(three, made, [c])
        assert_descriptions_equal(seen.description, describe(make(seed)))
        assert seen.shared
        assert found(three, c) == before + 1


def test_a_failed_fetch_releases_the_values_that_were_found_before(three: Client) -> None:
    """The owner dies during the request: the error in the reader's log must not keep the value found before it."""
    a, _, c = addresses(three)
    x, y = fresh(), fresh()
    first, second = made_and_read(three, x), three.submit(array, y, workers=[a], pure=False, allow_other_workers=True)
    wait(second)
    before, victim = found(three, c), pids(three)[a]
    os.kill(victim, signal.SIGSTOP)
    both = three.submit(lambda *both: [float(one.sum()) for one in both], first, second, workers=[c], pure=False)
    wait_until(lambda: found(three, c) == before + 1, "the first value is found")
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: len(addresses(three)) == 3 and a not in addresses(three), "the worker is replaced", seconds=60)
    del first, second, both
    wait_until(lambda: three.run(lambda: (gc.collect(), len(atlas.ATLAS))[1], workers=[c]) == {c: 0}, "no view is left")
