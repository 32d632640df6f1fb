"""Each read, replacement and removal of a worker's value is reported, and Dask does not notice that."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from distributed.spill import SpillBuffer

from dask_shm_plugin.seams.worker_data import WatchedMapping, WorkerData


class Reader:
    """Counts how often a value was handed out."""

    def __init__(self) -> None:
        self.times = 0

    def handed_out(self) -> None:
        """Count a hand-out."""
        self.times += 1


class Worker:
    """The parts of a worker that refer to its data: attributes of two other objects."""

    def __init__(self, data: Any) -> None:
        self.memory_manager, self.state = SimpleNamespace(data=data), SimpleNamespace(data=data)

    @property
    def data(self) -> Any:
        """The mapping, as Dask returns it."""
        return self.memory_manager.data


@pytest.fixture(params=["dict", "spilling"])
def worker(request: pytest.FixtureRequest, tmp_path: Any) -> Worker:
    """A worker that holds one value, in a dict or in a `SpillBuffer`."""
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
def test_each_read_of_a_value_is_reported(worker: Worker, how: str) -> None:
    """Each method of a mapping that returns the value is reported; a look for the key alone is not."""
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


def test_a_view_of_the_values_reports_during_its_iteration(worker: Worker) -> None:
    """A view may be kept for later, so making it is no read."""
    data, reader = WorkerData.of(worker), Reader()
    values = iter(worker.data.values())
    data.watch({"x": reader}, lambda key, *value: None)
    next(values)
    assert reader.times == 1
    data.stop()


def test_a_change_is_reported_before_and_after_it_happens(worker: Worker) -> None:
    """At no moment does a key have a value that was not reported."""
    data, told = WorkerData.of(worker), []
    data.watch({}, lambda key, *value: told.append((key, len(value), data.in_memory(key) is None)))
    worker.data["y"] = bytearray(10)
    assert [one for one in told if one[1]] == [("y", 1, True), ("y", 1, False)]
    told.clear()
    del worker.data["x"]
    assert told == [("x", 0, False), ("x", 0, True)]
    data.stop()


def test_a_spilled_value_is_not_in_memory(tmp_path: Any) -> None:
    """Spilling is reported as a removal, and a look for the value does not read it back."""
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


def test_the_watched_mapping_can_be_used_as_a_dict(worker: Worker) -> None:
    """A user may copy, send and merge the mapping: each result is a dict, and each is reported as a read."""
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


def test_a_reader_during_a_swap_gets_the_new_value(worker: Worker) -> None:
    """A reader that has taken the old value and not yet reported it must end with the same value as the worker."""
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


def test_a_subclass_of_spill_buffer_is_not_watched(tmp_path: Any) -> None:
    """Such a class may store other objects than it returns."""

    class Stamped(SpillBuffer):
        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, (1, value))

        def __getitem__(self, key: Any) -> Any:
            return super().__getitem__(key)[1]

    data = WorkerData.of(Worker(Stamped(str(tmp_path), target=1_000_000)))
    assert data._watched is None
    data.stop()


def test_a_buffer_with_an_earlier_view_is_not_watched(tmp_path: Any) -> None:
    """Reads through the earlier view would not be reported."""
    worker = Worker(SpillBuffer(str(tmp_path), target=1_000_000))
    values = worker.data.fast.values()
    assert WorkerData.of(worker)._watched is None
    assert not list(values)


def test_data_can_be_watched_again_after_stop(worker: Worker) -> None:
    """Watching is possible again after the original mapping was put back."""
    WorkerData.of(worker).stop()
    data = WorkerData.of(worker)
    assert data._watched is not None
    data.stop()


def test_stop_puts_the_original_mapping_back(worker: Worker) -> None:
    """The mapping then has all changes that were made meanwhile."""
    kind, inner = type(worker.data), id(getattr(getattr(worker.data, "fast", None), "d", None))
    data = WorkerData.of(worker)
    assert data._watched is not None
    worker.data["y"] = bytearray(10)
    del worker.data["x"]
    data.stop()
    assert type(worker.data) is kind
    assert worker.data is worker.state.data
    assert list(worker.data) == ["y"]
    assert kind is dict or id(worker.data.fast.d) == inner


def test_a_dict_of_a_user_is_not_watched() -> None:
    """A user could read a dict that was passed as `data=` without a report."""
    mine: dict[str, Any] = {}
    worker = Worker(mine)
    data = WorkerData.of(worker)
    assert data._watched is None
    assert worker.data is mine
    data.stop()
