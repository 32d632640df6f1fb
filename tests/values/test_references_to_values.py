"""A value is alone if only its key reaches its memory; this is decided for each kind of value and of alias."""

from __future__ import annotations

import functools
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import sparse

from dask_shm_plugin.values import aliases

LENGTH = 1000


class Held:
    """An object that refers to a value, besides the dict that contains it."""

    def __init__(self, value: Any) -> None:
        self.value = value


KEPT: list[Any] = []


def keep(item: Any) -> Any:
    """Keep a reference to an object, as other code would, and return the object."""
    KEPT.append(item)
    return item


@pytest.fixture(autouse=True)
def nothing_kept() -> Any:
    """Drop all kept references after each test."""
    yield
    KEPT.clear()


def is_alone(make: Callable[[], Any]) -> bool:
    """Return whether a value that is in one dict and one object is alone."""
    data = {"key": make()}
    held = Held(data["key"])
    return aliases.is_alone([held.value], 2)


def numbers() -> np.ndarray:
    """Return an array."""
    return np.random.default_rng(0).random(LENGTH)


def frame(**options: Any) -> pd.DataFrame:
    """Return a frame of two columns."""
    return pd.DataFrame({"x": numbers(), "y": numbers()}, **options)


def received(value: Any) -> Any:
    """Return a value as it is received after a pickle with out-of-band buffers."""
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(stream, buffers=[bytearray(buffer.raw()) for buffer in buffers])


def tap(use: Callable[[Any], Any], value: Any) -> Any:
    """Call a function with a value, and return the value."""
    use(value)
    return value


ALONE: dict[str, Callable[[], Any]] = {
    "array": numbers,
    "array in two dimensions": lambda: numbers().reshape(10, -1),
    "transposed": lambda: numbers().reshape(10, -1).T,
    "a part": lambda: numbers()[10:20],
    "structured": lambda: np.zeros(10, dtype=[("a", "f8"), ("b", "i4", (3,))]),
    "pickled": lambda: pickle.loads(pickle.dumps(numbers(), protocol=5)),
    "received": lambda: received(numbers()),
    "over a bytearray": lambda: np.frombuffer(bytearray(800)),
    "list": lambda: [numbers(), numbers(), "text", 5],
    "dict": lambda: {"a": numbers(), ("b", 1): [1, 2, (3, numbers())], "c": None},
    "one array twice": lambda: (lambda x: [x, x, x[:5]])(numbers()),
    "cycle": lambda: (lambda x: tap(x.append, x) and x)([numbers()]),
    "frame": frame,
    "frame that was looked at": lambda: tap(lambda x: (x["x"], x.loc[5], x.x.sum(), x.describe()), frame()),
    "a few objects that nobody can change": lambda: np.array([1, "a", None], dtype=object),
    "received frame": lambda: received(frame()),
    "merged": lambda: frame().merge(frame(), left_index=True, right_index=True),
    "grouped": lambda: frame().assign(k=np.arange(LENGTH) % 3).groupby("k").sum(),
    "assigned": lambda: frame().assign(z=1.0),
    "sorted": lambda: frame().sort_values("x"),
    "concatenated": lambda: pd.concat([frame(), frame()]),
    "reset": lambda: frame().reset_index(),
    "categories": lambda: pd.DataFrame({"c": pd.Categorical(["a", "b"] * 50)}),
    "dates": lambda: pd.DataFrame({"c": pd.Series(pd.date_range("2020", periods=9)).to_numpy().copy()}),
    "nullable": lambda: pd.DataFrame({"c": pd.array([1, None] * 50, dtype="Int64"), "x": np.ones(100)}),
    "series": lambda: pd.Series(numbers()),
    "several levels": lambda: pd.DataFrame(
        {"x": numbers()}, index=pd.MultiIndex.from_product([["a", "b"], range(500)])
    ),
    "csr": lambda: sparse.random(100, 100, 0.1, format="csr"),
    "coo array": lambda: sparse.coo_array(np.eye(10)),
}


class Box:
    """An object of a user's class."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data


class Liar(Box):
    """An object of a class that pretends to come from a library."""


Liar.__module__, Liar.__qualname__, Liar.__name__ = "scipy.sparse._csr", "csr_matrix", "csr_matrix"


def foreign() -> np.ndarray:
    """Return an array over shared memory that another process may write to."""
    memory = SharedMemory(create=True, size=8 * LENGTH)
    memory.unlink()
    return np.ndarray(LENGTH, buffer=keep(memory).buf)


NOT_ALONE: dict[str, Callable[[], Any]] = {
    "kept": lambda: keep(numbers()),
    "base kept": lambda: keep(numbers())[:10],
    "a view kept": lambda: tap(lambda x: keep(x[:5]), numbers()),
    "a view of a view kept": lambda: tap(lambda x: keep(x[5:][:2]), numbers()),
    "a memoryview kept": lambda: tap(lambda x: keep(memoryview(x)[5:]), numbers()),
    "a buffer kept": lambda: tap(lambda x: keep(pickle.PickleBuffer(x)), numbers()),
    "a weak reference": lambda: tap(lambda x: keep(weakref.ref(x)), numbers()),
    "a weak reference to a block": lambda: tap(lambda x: keep(weakref.ref(x._mgr)), frame()),
    "a weak cache": lambda: tap(lambda x: keep(weakref.WeakValueDictionary(x=x)), frame()),
    "an item kept": lambda: {"a": keep(numbers())},
    "a container in it kept": lambda: [keep([1]), numbers()],
    "a frame over an array": lambda: pd.DataFrame(keep(numbers().reshape(-1, 4)), copy=False),
    "a series over an array": lambda: pd.Series(keep(numbers()), copy=False),
    "a column kept": lambda: tap(lambda x: keep(x["x"]), frame()),
    "the values kept": lambda: tap(lambda x: keep(x.values), pd.DataFrame(numbers().reshape(-1, 4))),
    "rows kept": lambda: tap(lambda x: keep(x[5:]), frame()),
    "a shallow copy kept": lambda: tap(lambda x: keep(x.copy(deep=False)), frame()),
    "an index over an array": lambda: frame(index=pd.Index(keep(np.arange(LENGTH)), copy=False)),
    "an array of a matrix kept": lambda: tap(lambda x: keep(x.data), sparse.random(100, 100, 0.1, format="csr")),
    "objects": lambda: np.array([1, []], dtype=object),
    "a frame of objects": lambda: pd.DataFrame({"x": pd.Series([1, []], dtype=object)}),
    "a range kept": lambda: tap(lambda x: keep(x.index), frame()),
    "attributes kept": lambda: tap(lambda x: keep(vars(x)), frame()),
    "attributes of a matrix kept": lambda: tap(lambda x: keep(vars(x)), sparse.random(100, 100, 0.1, format="csr")),
    "a type with something attached": lambda: [numbers(), np.dtype("f8", metadata={"m": keep([1])})],
    "an index kept": lambda: tap(lambda x: keep(x.index), frame(index=np.arange(LENGTH))),
    "labels that change": lambda: pd.DataFrame({Box(numbers()): numbers()}),
    "categories kept": lambda: tap(lambda x: keep(x.c.cat.categories), pd.DataFrame({"c": pd.Categorical([1, 2] * 9)})),
    "a row of an array": lambda: [numbers(), keep(np.zeros(9, "f8,f8"))[0]],
    "a method of an array": lambda: [numbers(), keep(numbers()).sum],
    "a slice of an array": lambda: [numbers(), slice(keep(numbers()))],
    "a class": lambda: [numbers(), type("Local", (), {})],
    "a number of a class of its own": lambda: [numbers(), type("Local", (np.float64,), {})(1.0)],
    "many numbers": lambda: {"rows": list(range(5_000))},
    "deep tuples": lambda: functools.reduce(lambda inner, _: (inner, 1), range(5_000), numbers()),
    "Arrow": lambda: pa.table({"x": numbers()}),
    "a frame of texts in Arrow": lambda: pd.DataFrame({"s": pd.array(["a", "b"], dtype="string[pyarrow]")}),
    "foreign": foreign,
    "foreign, a part": lambda: foreign()[5:],
    "a bytearray kept": lambda: np.frombuffer(keep(bytearray(800))),
    "a subclass": lambda: np.ma.array(numbers()),
    "an object": lambda: Box(numbers()),
    "an object in a list": lambda: [Box(numbers())],
    "a liar": lambda: Liar(numbers()),
    "too many parts": lambda: [np.zeros(1) for _ in range(2_000)],
}


@pytest.mark.parametrize("kind", ALONE)
def test_a_value_without_aliases_is_alone(kind: str) -> None:
    """Most results of tasks are such values."""
    assert is_alone(ALONE[kind])


@pytest.mark.parametrize("kind", NOT_ALONE)
def test_a_value_that_may_have_aliases_is_not_alone(kind: str) -> None:
    """A value for which it cannot be decided counts as not alone."""
    assert not is_alone(NOT_ALONE[kind])


def test_a_mapped_file_is_not_alone(tmp_path: Path) -> None:
    """Another process may write to the file, even if a plain array was made over it."""
    np.memmap(tmp_path / "file", dtype="f8", mode="w+", shape=(LENGTH,)).flush()
    assert not is_alone(lambda: np.memmap(tmp_path / "file", dtype="f8", mode="r+"))
    assert not is_alone(lambda: np.asarray(np.memmap(tmp_path / "file", dtype="f8", mode="r+")))


def test_the_number_of_references_must_be_exactly_the_known_one() -> None:
    """If there is one reference more or less than known, other code may reach the value."""
    data = {"key": numbers()}
    assert [aliases.is_alone([data["key"]], known) for known in range(4)] == [False, True, False, False]


@pytest.mark.parametrize("take", [lambda x: x[:5], memoryview, lambda x: x.reshape(2, -1)])
def test_a_thread_that_passes_a_value_on_is_detected_at_every_moment(take: Callable[[Any], Any]) -> None:
    """The thread always has a reference to the memory, and drops one only after it has the next."""
    data = {"key": [numbers(), numbers()]}
    stop = threading.Event()

    def pass_on(held: Any) -> None:
        while not stop.is_set():
            item = held[0]
            del held
            part = take(item)
            del item
            held = [part.obj if isinstance(part, memoryview) else part.base]
            del part

    thread = threading.Thread(target=pass_on, args=([data["key"][0]],))
    before, _ = sys.getswitchinterval(), sys.setswitchinterval(1e-6)
    thread.start()
    try:
        assert not any(aliases.is_alone([data["key"]], 1) for _ in range(2_000))
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)
    assert aliases.is_alone([data["key"]], 1)
