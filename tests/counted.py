"""Values that count how often they are pickled, and types with a serializer or a deserializer of their own."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from distributed.protocol.serialize import dask_deserialize, dask_serialize

PICKLES: dict[str, int] = {}
"""How often this process has pickled the values of each name."""

TOGETHER = {"now": 0, "most": 0}
"""How many threads of this process pickle values, now and at most."""

_lock = threading.Lock()


def counts() -> dict[str, int]:
    """Return what this process has counted."""
    return dict(PICKLES)


def together() -> int:
    """Return how many threads of this process have pickled at the same time."""
    return TOGETHER["most"]


class Counted:
    """A value that counts its pickles; only the first succeeds where so many are wanted.

    Parameters
    ----------
    name
        Under which it is counted.
    size
        Doubles that go as a buffer.
    items
        Floats that go in the stream.
    """

    def __init__(self, name: str, size: int, items: int = 0, *, once: bool = False) -> None:
        self.name, self.once = name, once
        self.data, self.items = np.arange(float(size)), list(map(float, range(items)))
        self.pickles = 0

    def __getstate__(self) -> dict[str, Any]:
        with _lock:
            PICKLES[self.name] = PICKLES.get(self.name, 0) + 1
            TOGETHER["now"] += 1
            TOGETHER["most"] = max(TOGETHER.values())
        self.pickles += 1
        try:
            if self.once and self.pickles > 1:
                raise RuntimeError(f"{self.name} is pickled for the second time")
            return {**vars(self), "pickles": 0}
        finally:
            with _lock:
                TOGETHER["now"] -= 1

    def total(self) -> float:
        """Return the sum of all numbers."""
        return float(self.data.sum()) + sum(self.items)


class Typed:
    """A value whose serializer wants to know for whom it is."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        self.told: Any = None


class Broken:
    """A value that nobody can deserialize."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data


ATTEMPTS: list[str] = []
"""What this process has tried to deserialize."""


def teach() -> None:
    """Let this process know the types."""

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
    """Return how often this process has tried to deserialize what nobody can."""
    return len(ATTEMPTS)
