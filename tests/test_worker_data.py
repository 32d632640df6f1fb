"""The data of a worker: whoever reads, replaces or drops a value is noticed, and Dask notices nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from distributed.spill import SpillBuffer

from dask_shm_plugin.worker_data import WorkerData


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


def test_changes_are_told_before_they_happen(worker: Worker) -> None:
    """There is no moment in which a key has a value that nobody was told of."""
    data, told = WorkerData.of(worker), []
    data.watch({}, lambda key, *value: told.append((key, len(value), data.in_memory(key) is None)))
    worker.data["x"] = bytearray(10)
    assert told[-1] in (("x", 1, True), ("x", 1, False))
    worker.data["y"] = bytearray(10)
    assert told[-1] == ("y", 1, True)
    del worker.data["x"]
    assert told[-1] == ("x", 0, False)
    data.stop()


def test_what_is_spilled_is_not_in_memory(tmp_path: Any) -> None:
    """It was dropped from there, and looking does not bring it back."""
    worker, told = Worker(SpillBuffer(str(tmp_path), target=1_000_000)), []
    data = WorkerData.of(worker)
    data.watch({}, lambda key, *value: told.append((key, len(value))))
    worker.data["x"] = bytearray(1000)
    worker.data.evict()
    assert told == [("x", 1), ("x", 0)]
    assert data.in_memory("x") is None
    assert "x" not in worker.data.fast
    assert len(worker.data["x"]) == 1000
    data.stop()


def test_afterwards_all_is_as_it_was(worker: Worker) -> None:
    """With what has come and gone meanwhile."""
    kind, inner = type(worker.data), getattr(getattr(worker.data, "fast", None), "d", None)
    data = WorkerData.of(worker)
    assert data.is_watched
    worker.data["y"] = bytearray(10)
    del worker.data["x"]
    data.stop()
    assert type(worker.data) is kind
    assert worker.data is worker.state.data
    assert list(worker.data) == ["y"]
    assert inner is None or worker.data.fast.d is inner


def test_a_dict_that_somebody_else_has_is_left_alone() -> None:
    """Who gave it to the worker may read it past us."""
    mine: dict[str, Any] = {}
    worker = Worker(mine)
    data = WorkerData.of(worker)
    assert not data.is_watched
    assert worker.data is mine
    data.stop()
