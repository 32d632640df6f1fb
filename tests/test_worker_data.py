"""The data of a worker: whoever reads, replaces or drops a value is noticed, and Dask notices nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from distributed.spill import SpillBuffer

from dask_shm_plugin.worker_data import WatchedMapping, WorkerData


class Reader:
    """Counts how often a value was handed out."""

    def __init__(self) -> None:
        self.times = 0

    def handed_out(self) -> None:
        """Count."""
        self.times += 1


class Worker:
    """What a worker has of its data: two attributes of others."""

    def __init__(self, data: Any) -> None:
        self.memory_manager, self.state = SimpleNamespace(data=data), SimpleNamespace(data=data)

    @property
    def data(self) -> Any:
        """The mapping, as Dask gives it."""
        return self.memory_manager.data


@pytest.fixture(params=["dict", "spilling"])
def worker(request: pytest.FixtureRequest, tmp_path: Any) -> Worker:
    """A worker that holds a value in one of the two ways that Dask has."""
    made = Worker({}) if request.param == "dict" else Worker(SpillBuffer(str(tmp_path), target=1_000_000))
    made.data["x"] = bytearray(1000)
    return made


READS: dict[str, Callable[[Any], Any]] = {
    "by key": lambda data: data["x"],
    "get": lambda data: data.get("x"),
    "values": lambda data: list(data.values()),
    "items": lambda data: list(data.items()),
    "a dict of it": dict,
    "the state's": lambda data: data["x"],
}


@pytest.mark.parametrize("how", READS)
def test_whoever_reads_a_value_is_noticed(worker: Worker, how: str) -> None:
    """By whichever method of a mapping; who only asks whether it is there is not."""
    data, reader = WorkerData.of(worker), Reader()
    data.watch({"x": reader}, lambda key, *value: None)
    assert "x" in worker.data
    assert len(worker.data) == 1
    assert list(worker.data) == ["x"]
    assert data.in_memory("x") is not None
    assert reader.times == 0
    READS[how](worker.state.data if how == "the state's" else worker.data)
    assert reader.times == 1
    data.stop()


def test_a_view_of_the_values_tells_when_it_is_walked_through(worker: Worker) -> None:
    """Not when it is made: somebody may keep it."""
    data, reader = WorkerData.of(worker), Reader()
    values = iter(worker.data.values())
    data.watch({"x": reader}, lambda key, *value: None)
    next(values)
    assert reader.times == 1
    data.stop()


def test_changes_are_told_before_they_happen_and_after(worker: Worker) -> None:
    """There is no moment in which a key has a value that nobody was told of."""
    data, told = WorkerData.of(worker), []
    data.watch({}, lambda key, *value: told.append((key, len(value), data.in_memory(key) is None)))
    worker.data["y"] = bytearray(10)
    assert [one for one in told if one[1]] == [("y", 1, True), ("y", 1, False)]
    told.clear()
    del worker.data["x"]
    assert told == [("x", 0, False), ("x", 0, True)]
    data.stop()


def test_what_is_spilled_is_not_in_memory(tmp_path: Any) -> None:
    """It was dropped from there, and looking does not bring it back."""
    worker, told = Worker(SpillBuffer(str(tmp_path), target=1_000_000)), []
    data = WorkerData.of(worker)
    data.watch({}, lambda key, *value: told.append((key, len(value))))
    worker.data["x"] = bytearray(1000)
    assert told[-1] == ("x", 1)
    worker.data.evict()
    assert told[-1] == ("x", 0)
    assert data.in_memory("x") is None
    assert "x" not in worker.data.fast
    assert len(worker.data["x"]) == 1000
    data.stop()


def test_a_user_may_do_with_it_what_one_does_with_a_dict(worker: Worker) -> None:
    """Copy it, send it, merge it: what comes out is a dict, and reading was noticed."""
    data, reader = WorkerData.of(worker), Reader()
    data.watch({"x": reader}, lambda key, *value: None)
    ours = worker.data if isinstance(worker.data, WatchedMapping) else worker.data.fast.d
    made = [copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours | {}, {} | ours, ours.copy()]
    assert all(type(one) is dict and list(one) == ["x"] for one in made)
    assert reader.times == len(made)
    assert list(reversed(ours)) == ["x"]
    for n, _ in enumerate(ours.items()):
        ours[f"more {n}"] = n
    assert ours.popitem() == ("more 0", 0)
    ours.clear()
    assert not ours
    with pytest.raises(KeyError):
        ours.popitem()
    data.stop()


def test_what_reads_while_another_value_takes_the_place_gets_that(worker: Worker) -> None:
    """It has taken the value, and not told yet; afterwards it has no other than the worker."""
    data = WorkerData.of(worker)
    other = bytearray(b"another")

    class Swapping(Reader):
        def handed_out(self) -> None:
            super().handed_out()
            if self.times == 1:
                data.swap("x", other)

    reader = Swapping()
    data.watch({"x": reader}, lambda key, *value: None)
    assert worker.data["x"] is other
    assert reader.times == 2
    data.stop()


def test_a_buffer_of_a_class_of_its_own_is_left_alone(tmp_path: Any) -> None:
    """What it keeps need not be what it returns."""

    class Stamped(SpillBuffer):
        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, (1, value))

        def __getitem__(self, key: Any) -> Any:
            return super().__getitem__(key)[1]

    data = WorkerData.of(Worker(Stamped(str(tmp_path), target=1_000_000)))
    assert not data.is_watched
    data.stop()


def test_a_buffer_whose_values_somebody_else_has_is_left_alone(tmp_path: Any) -> None:
    """A view that was made before reads past us."""
    worker = Worker(SpillBuffer(str(tmp_path), target=1_000_000))
    values = worker.data.fast.values()
    assert not WorkerData.of(worker).is_watched
    assert not list(values)


def test_it_can_be_watched_anew(worker: Worker) -> None:
    """After it was put back."""
    WorkerData.of(worker).stop()
    data = WorkerData.of(worker)
    assert data.is_watched
    data.stop()


def test_afterwards_all_is_as_it_was(worker: Worker) -> None:
    """With what has come and gone meanwhile."""
    kind, inner = type(worker.data), id(getattr(getattr(worker.data, "fast", None), "d", None))
    data = WorkerData.of(worker)
    assert data.is_watched
    worker.data["y"] = bytearray(10)
    del worker.data["x"]
    data.stop()
    assert type(worker.data) is kind
    assert worker.data is worker.state.data
    assert list(worker.data) == ["y"]
    assert kind is dict or id(worker.data.fast.d) == inner


def test_a_dict_that_somebody_else_has_is_left_alone() -> None:
    """Who gave it to the worker may read it past us."""
    mine: dict[str, Any] = {}
    worker = Worker(mine)
    data = WorkerData.of(worker)
    assert not data.is_watched
    assert worker.data is mine
    data.stop()
