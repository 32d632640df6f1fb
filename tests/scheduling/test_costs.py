"""The cost of an input for a worker whose node has it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dask_shm_plugin.scheduling.costs import Costs
from dask_shm_plugin.scheduling.nodes import LARGE_BYTES, Nodes, news
from dask_shm_plugin.scheduling.placement import Placement


class Value:
    """Stands for a `TaskState`: it can be referred to weakly, and is equal only to itself."""

    def __init__(self, *holders: Any, nbytes: int = 1 << 28, waiters: int = 0, duration: float = 1.0) -> None:
        self.key, self.nbytes, self.who_has, self.run_id = "x", nbytes, set(holders), 1
        prefix = SimpleNamespace(duration_average=duration)
        self.waiters = [SimpleNamespace(prefix=prefix) for _ in range(waiters)]

    def get_nbytes(self) -> int:
        """Return the size in bytes."""
        return self.nbytes


class Worker:
    """Stands for a `WorkerState`."""

    def __init__(self, arena: str | None, limit: int = 0) -> None:
        self.nthreads, self.metrics = 1, {"shm": {"arena": arena}} if arena else {}
        self.memory_limit, self.address = limit, f"tcp://{id(self)}"


def known(*values: Value, workers: tuple[Worker, ...] = ()) -> tuple[Nodes, Costs]:
    """Return the knowledge of a scheduler, and the costs, for values and running workers."""
    scheduler = SimpleNamespace(tasks={value.key: value for value in values}, running=set(workers), bandwidth=1e8)
    nodes = Nodes(scheduler)
    return nodes, Costs(scheduler, nodes)


def test_a_published_value_costs_a_mapping() -> None:
    """256 MiB are there in some 30 ms, whatever the network does."""
    value = Value(Worker("a"))
    nodes, costs = known(value)
    assert nodes.heard(news("a", ["x"]))
    assert costs.transfer(value, Worker("a")) == pytest.approx(0.032, rel=0.1)
    assert costs.transfer(value, Worker("b")) == costs.transfer(value, Worker(None)) == value.nbytes / 1e8


@pytest.mark.parametrize(
    ("waiters", "duration", "is_worth_it"),
    [(1, 0.05, False), (1, 60, False), (2, 1, True), (40, 0.01, False), (40, 0.05, True), (40, -1, False)],
)
def test_a_private_value_costs_a_copy_if_enough_tasks_wait_for_it(
    waiters: int, duration: float, *, is_worth_it: bool
) -> None:
    """A chain of tasks stays with its data. Tasks of unknown duration count as nothing."""
    value = Value(Worker("a"), waiters=waiters, duration=duration)
    _, costs = known(value)
    if is_worth_it:
        assert costs.transfer(value, Worker("a")) == pytest.approx(0.385, rel=0.1)
    else:
        assert costs.near(value, "a") is None
        assert costs.transfer(value, Worker("a")) == value.nbytes / 1e8


def test_a_small_value_and_a_worker_that_does_not_share_cost_what_dask_says() -> None:
    """Stock Dask's cost is size over bandwidth."""
    small, foreign = Value(Worker("a"), nbytes=LARGE_BYTES - 1), Value(Worker(None), waiters=100)
    for value in (small, foreign):
        nodes, costs = known(value)
        nodes.heard(news("a", ["x"]))
        assert costs.transfer(value, Worker("a")) == value.nbytes / 1e8


def test_a_value_that_was_computed_again_is_private_until_it_is_published_again() -> None:
    """The news about a key belongs to one run of its task."""
    value = Value(Worker("a"))
    nodes, _ = known(value)
    nodes.heard(news("a", ["x"]))
    assert nodes.is_published(value, "a")
    value.run_id = 2
    assert not nodes.is_published(value, "a")
    nodes.heard(news("b", ["x"]))
    assert not nodes.is_published(value, "a")


def test_a_value_is_published_only_where_a_worker_holds_it() -> None:
    """The arena may live on, but its copy is gone with the last reference."""
    value = Value(Worker("a"))
    nodes, _ = known(value)
    nodes.heard(news("b", ["x"]))
    assert not nodes.is_published(value, "b")


def test_replicas_of_one_arena_are_one_copy() -> None:
    """Any other holder has a copy of its own, and so has each holder of a value that nobody has published."""
    a, b, c, d = Worker("a"), Worker("a"), Worker("b"), Worker(None)
    value = Value(a, b, c, d)
    nodes, _ = known(value)
    assert sorted(map(len, nodes.copies(value, value.who_has))) == [1, 1, 1, 1]
    nodes.heard(news("a", ["x"]))
    assert nodes.copies(value, value.who_has)[0] == {a, b}
    assert sorted(map(len, nodes.copies(value, value.who_has))) == [1, 1, 2]


@pytest.mark.parametrize(
    "message",
    [None, 1, "text", {}, {"arena": "a"}, {"published": ["x"]}, {"arena": "a", "published": 1, "withdrawn": []}],
)
def test_a_message_of_another_form_says_nothing(message: Any) -> None:
    """Another version of the package may use the same topic."""
    value = Value(Worker("a"))
    nodes, _ = known(value)
    assert not nodes.heard(message)
    assert not nodes.is_published(value, "a")


def test_news_about_a_key_waits_until_the_scheduler_knows_it() -> None:
    """A direct scatter registers its keys after the workers have told about them."""
    value = Value(Worker("a"))
    nodes, _ = known()
    nodes.heard(news("a", ["x"]))
    assert list(nodes.holders()) == []
    nodes._scheduler.tasks["x"] = value
    assert nodes.is_published(value, "a")
    assert [(ts, set(there)) for ts, there in nodes.holders()] == [(value, {"a"})]


def test_a_withdrawn_value_is_private_again() -> None:
    """Its owner has spilled or replaced it. It is shared again when the owner publishes it, or fetches it, again."""
    owner = Worker("a")
    value = Value(owner)
    nodes, _ = known(value)
    nodes.heard(news("a", ["x"]))
    for again in (
        lambda: nodes.heard(news("a", ["x"], holder=owner.address)),
        lambda: fetch_again(nodes, value, owner),
    ):
        nodes.heard(news("a", [], ["x", "another"], owner.address))
        assert not nodes.is_published(value, "a")
        again()
        assert nodes.is_published(value, "a")


def fetch_again(nodes: Nodes, value: Value, owner: Worker) -> None:
    """Let a holder drop a value and fetch it again, with a look at all values in between."""
    value.who_has = {Worker("a")}
    assert list(nodes.holders())
    value.who_has = {owner}


def test_a_value_that_one_holder_has_withdrawn_is_still_shared_by_the_others() -> None:
    """A holder that has spilled it has a copy of its own; one that has dropped it has none."""
    first, second, third, gone = (Worker("a") for _ in range(4))
    value = Value(first, second, third)
    nodes, _ = known(value)
    nodes.heard(news("a", ["x"]))
    for one in (first, gone):
        nodes.heard(news("a", [], ["x"], one.address))
    assert nodes.is_published(value, "a")
    assert sorted(map(len, nodes.copies(value, value.who_has))) == [1, 2]
    assert [there for _, there in nodes.holders()] == [{"a": {second, third}}]


def test_another_value_under_the_same_key_is_private() -> None:
    """A key can be forgotten, and used again for a scattered value."""
    first, second = Value(Worker("a")), Value(Worker("a"))
    nodes, _ = known(first)
    nodes.heard(news("a", ["x"]))
    assert nodes.is_published(first, "a")
    assert not nodes.is_published(second, "a")


def test_a_task_that_does_not_fit_goes_where_it_fits() -> None:
    """Dask would refuse it, or, if it is stolen, let the worker be killed."""
    here, there = Worker("a", limit=1 << 20), Worker("b", limit=1 << 20)
    value = Value(here)
    nodes, costs = known(value, workers=(here, there))
    nodes.heard(news("a", ["x"]))
    placement = Placement(nodes._scheduler, nodes, costs)
    task: Any = SimpleNamespace(dependencies={value}, actor=False)
    assert placement.fits(task, here)
    assert not placement.fits(task, there)
    assert placement.comm_cost(task, there) > 1e5
    assert placement.comm_cost(task, here) == 0
    nodes._scheduler.worker_objective = lambda ts, ws: ws is here  # prefers the other one
    nodes._scheduler.valid_workers = lambda ts: {here, there}
    assert placement.decide_worker(task) is here


@pytest.mark.parametrize("is_shared", [False, True])
def test_copies_on_workers_that_leave_are_dropped_first(*, is_shared: bool) -> None:
    """A worker that is being retired has copied its value to another one, which must keep it."""
    retiring, neighbour, other = Worker("a"), Worker("a"), Worker(None)
    value = Value(retiring, other, *([neighbour] if is_shared else []))
    nodes, _ = known(value, workers=(other,))
    nodes.heard(news("a", ["x"]))
    assert nodes.copies(value, value.who_has)[0] == {other}
