"""Values that count how often they are pickled, and types with their own serializers and deserializers."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from distributed.protocol.serialize import dask_deserialize, dask_serialize

PICKLES: dict[str, int] = {}
"""The number of times that this process has pickled the value of each name."""

CONCURRENT_PICKLES = {"now": 0, "most": 0}
"""The number of threads of this process that are pickling values: now, and the maximum so far."""

_lock = threading.Lock()


def counts() -> dict[str, int]:
    """Return how often this process has pickled the value of each name."""
    return dict(PICKLES)


def together() -> int:
    """Return the maximum number of threads of this process that have pickled values at the same time."""
    return CONCURRENT_PICKLES["most"]


class Counted:
    """A value that counts how often it is pickled.

    Parameters
    ----------
    name
        The name under which it is counted.
    size
        The number of doubles that travel as a buffer.
    items
        The number of floats that travel in the pickle stream.
    once
        Whether pickling it a second time fails.
    """

    def __init__(self, name: str, size: int, items: int = 0, *, once: bool = False) -> None:
        self.name, self.once = name, once
        self.data, self.items = np.arange(float(size)), list(map(float, range(items)))
        self.pickles = 0

    def __getstate__(self) -> dict[str, Any]:
        with _lock:
            PICKLES[self.name] = PICKLES.get(self.name, 0) + 1
            CONCURRENT_PICKLES["now"] += 1
            CONCURRENT_PICKLES["most"] = max(CONCURRENT_PICKLES.values())
        self.pickles += 1
        try:
            if self.once and self.pickles > 1:
                raise RuntimeError(f"{self.name} is pickled for the second time")
            return {**vars(self), "pickles": 0}
        finally:
            with _lock:
                CONCURRENT_PICKLES["now"] -= 1

    def total(self) -> float:
        """Return the sum of all numbers."""
        return float(self.data.sum()) + sum(self.items)


class Typed:
    """A value with a serializer that looks at the recipient and the sender in its context."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        self.told: Any = None


class Broken:
    """A value with a deserializer that always fails."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data


ATTEMPTS: list[str] = []
"""One entry for each attempt of this process to deserialize a `Broken`."""


def teach() -> None:
    """Register the serializers and deserializers of these types in this process."""

    @dask_serialize.register(Typed)
    def dump(value: Typed, context: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        told = {"recipient": context["recipient"]["address"], "sender": context["sender"]["address"]}
        return {"told": told, "protocol": context["pickle-protocol"]}, [memoryview(value.data).cast("B")]

    @dask_deserialize.register(Typed)
    def load(header: dict[str, Any], frames: list[Any]) -> Typed:
        value = Typed(np.frombuffer(frames[0]))
        value.told = header["told"]
        return value

    @dask_serialize.register(Broken)
    def dump_broken(value: Broken) -> tuple[dict[str, Any], list[Any]]:
        return {}, [memoryview(value.data).cast("B")]

    @dask_deserialize.register(Broken)
    def load_broken(header: dict[str, Any], frames: list[Any]) -> Broken:
        ATTEMPTS.append("broken")
        raise ZeroDivisionError("nobody can deserialize this")


def attempts() -> int:
    """Return how often this process has tried to deserialize a `Broken`."""
    return len(ATTEMPTS)
