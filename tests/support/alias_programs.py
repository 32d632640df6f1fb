"""Programs that reach a value by other ways than its key. They run on stock Dask and with the plugin alike."""

from __future__ import annotations

import functools
import itertools
import tempfile
import uuid
import weakref
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from distributed import Client, Future, get_client, get_worker, wait
from observing import addresses, drop_replica, wait_until
from scipy import sparse

LENGTH = 1 << 14
"""Doubles in a value: twice the threshold, and 32 pages."""

# -- the memory of a value


def foreign_segment() -> np.ndarray:
    """Return an array in memory of another library: this process can write to the segment by another mapping, too."""
    memory = SharedMemory(create=True, size=8 * LENGTH)
    memory.unlink()
    array = np.ndarray(LENGTH, buffer=memory.buf)
    FOREIGN_SEGMENTS.append(memory)
    return array


FOREIGN_SEGMENTS: list[SharedMemory] = []
"""Kept for good, because the finalizer of a `SharedMemory` cannot close a buffer that an array uses."""


def mapped_file() -> np.memmap:
    """Return an array that maps a file."""
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype="f8", shape=(LENGTH,))


MEMORY: dict[str, Callable[[], np.ndarray]] = {
    "own": lambda: np.zeros(LENGTH),
    "a part": lambda: np.zeros(2 * LENGTH)[LENGTH // 2 : -LENGTH // 2],
    "a file": mapped_file,
    "an array over a file": lambda: np.asarray(mapped_file()),
    "foreign": foreign_segment,
    "a bytearray": lambda: np.frombuffer(bytearray(8 * LENGTH)),
}


# -- the value that is made of this memory


class Box:
    """An object of a user's class."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data


KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "array": lambda x: x,
    "matrix": lambda x: x.reshape(4, -1),
    "frame": lambda x: pd.DataFrame({"x": pd.Series(x, copy=False)}, copy=False),
    "wide frame": lambda x: pd.DataFrame(x.reshape(-1, 4), columns=list("abcd"), copy=False),
    "series": lambda x: pd.Series(x, copy=False),
    "table": lambda x: pa.table({"x": pa.array(np.asarray(x))}),
    "sparse": lambda x: sparse.csr_array((x, np.arange(LENGTH), np.array([0, LENGTH])), shape=(1, LENGTH)),
    "dict": lambda x: {"x": x, "name": "x", "more": [1, 2]},
    "list": lambda x: [x, x[:8]],
    "object": Box,
    "masked": lambda x: np.ma.array(x, mask=False, copy=False),
}


def data_of(value: Any) -> np.ndarray:
    """Return the data of a value as an array on the same memory."""
    if isinstance(value, pd.DataFrame):
        return value._mgr.blocks[0].values.ravel("K")
    if isinstance(value, pd.Series):
        return value._mgr.blocks[0].values
    if isinstance(value, pa.Table):
        return np.frombuffer(value.column("x").chunk(0).buffers()[1], "f8")
    if isinstance(value, (dict, list)):
        return value["x" if isinstance(value, dict) else 0]
    return np.asarray(value.data) if isinstance(value, (Box, sparse.csr_array, np.ma.MaskedArray)) else value


def summary(value: Any) -> tuple[float, float, float]:
    """Return the first number, the last number and the sum of a value."""
    array = np.ravel(data_of(value))
    return float(array[0]), float(array[-1]), float(array.sum())


def write(array: np.ndarray, number: int) -> None:
    """Change some numbers of an array in place."""
    flat = array.reshape(-1)
    flat[:: max(1, len(flat) // 7)] = number


# -- the other reference to its memory

KEPT: dict[str, Any] = {}


@functools.lru_cache(maxsize=64)
def cached_list(name: str) -> list[Any]:
    """Return a list in a cache, such as user code may have."""
    return []


class Keeper:
    """An actor that keeps its argument."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def write(self, number: int) -> None:
        """Change the kept value in place."""
        write(data_of(self.value), number)


def make(name: str, kind: str, memory: str, keeper: str) -> Any:
    """Make a value, and keep another reference to its memory in the way that ``keeper`` names."""
    array = MEMORY[memory]()
    value = KINDS[kind](array)
    if keeper == "global":
        KEPT[name] = array
    elif keeper == "a view in a global":
        KEPT[name] = array[: LENGTH // 2]
    elif keeper == "a memoryview":
        KEPT[name] = memoryview(array)
    elif keeper == "cache":
        cached_list(name).append(array)
    elif keeper == "attribute":
        setattr(get_worker(), name, array)
    elif keeper == "weak reference":
        KEPT[name] = weakref.ref(array)
    elif keeper == "the value in a global":
        KEPT[name] = value
    elif keeper == "scattered part":
        KEPT[name] = get_client().scatter({name: array[: LENGTH // 2]})
    return value


KEEPERS = (
    "nobody",
    "global",
    "a view in a global",
    "a memoryview",
    "cache",
    "attribute",
    "weak reference",
    "the value in a global",
    "scattered part",
    "a part under another key",
    "actor",
)


def write_kept(name: str, keeper: str, number: int) -> None:
    """Change a value in place through the reference that was kept."""
    if keeper == "cache":
        write(cached_list(name)[0], number)
    elif keeper == "attribute":
        write(getattr(get_worker(), name), number)
    elif keeper == "weak reference":
        array = KEPT[name]()
        if array is not None:
            write(array, number)
    elif keeper == "the value in a global":
        write(data_of(KEPT[name]), number)
    else:
        write(np.asarray(KEPT[name]), number)


def drop_references(name: str) -> None:
    """Drop all references that were kept."""
    KEPT.pop(name, None)
    cached_list(name).clear()
    vars(get_worker()).pop(name, None)


def write_input(value: Any, number: int) -> None:
    """Change the input of a task in place."""
    write(data_of(value), number)


def write_in_worker(key: str, number: int, dask_worker: Any) -> None:
    """Change a value in a worker's data in place, without Dask's knowledge."""
    write(data_of(dask_worker.data[key]), number)


def replace_in_worker(key: str, kind: str, number: int, dask_worker: Any) -> None:
    """Replace a value in a worker's data, without Dask's knowledge."""
    array = np.full(LENGTH, float(number))
    dask_worker.data[key] = KINDS[kind](array)


def first_half(value: Any) -> Any:
    """Return a view of the first half of the input."""
    return data_of(value)[: LENGTH // 2]


WRITES = ("by the keeper", "as an input", "in the data", "another value")
READS = ("another worker", "a third worker", "the same worker", "client", "directly")


class Program:
    """One value on the first worker of a cluster, another reference to its memory, and steps that read and write it.

    Parameters
    ----------
    client
        A client of a cluster with three workers.
    kind, memory, keeper
        See `KINDS`, `MEMORY` and `KEEPERS`.
    """

    def __init__(self, client: Client, kind: str, memory: str, keeper: str) -> None:
        self._client, self._kind, self._keeper = client, kind, keeper
        # For a moment after a lost connection to the scheduler, a client knows of no workers.
        self._a, self._b, self._c = wait_until(lambda: addresses(client), "the workers are known")
        self._name = f"alias-{uuid.uuid4().hex}"
        self._numbers = itertools.count(1)
        self._value = self._submit_to_first(make, self._name, kind, memory, keeper, key=f"value-{self._name}")
        self._part: Any = None
        if keeper == "a part under another key":
            self._part = self._submit_to_first(first_half, self._value)
        elif keeper == "scattered part":
            self._part = Future(self._name, client)
        elif keeper == "actor":
            self._actor = client.submit(Keeper, self._value, workers=[self._a], actor=True)
            self._part = self._actor.result()

    def _submit_to_first(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        future = self._client.submit(function, *args, workers=[self._a], pure=False, **options)
        wait(future)
        return future

    def run(self, steps: list[str]) -> list[Any]:
        """Do the steps, and return the result of each."""
        try:
            return [self._read(step) if step in READS else self._write(step) for step in steps]
        finally:
            self._submit_to_first(drop_references, self._name).result()

    def _read(self, who: str) -> tuple[float, float, float]:
        if who == "client":
            return summary(self._client.gather(self._value))
        if who == "directly":
            return summary(self._client.gather(self._value, direct=True))
        address = {"another worker": self._b, "a third worker": self._c, "the same worker": self._a}[who]
        seen = self._client.submit(summary, self._value, workers=[address], pure=False).result()
        if address != self._a:
            drop_replica(self._client, self._value, address)
        return seen

    def _write(self, how: str) -> None:
        number = next(self._numbers)
        key = self._value.key
        if how == "as an input":
            self._submit_to_first(write_input, self._value, number).result()
        elif how == "in the data":
            self._client.run(write_in_worker, key, number, workers=[self._a])
        elif how == "another value":
            self._client.run(replace_in_worker, key, self._kind, number, workers=[self._a])
        elif self._keeper == "actor":
            self._part.write(number).result()
        elif self._part is not None:
            self._submit_to_first(write_input, self._part, number).result()
        elif self._keeper != "nobody":
            self._submit_to_first(write_kept, self._name, self._keeper, number).result()
