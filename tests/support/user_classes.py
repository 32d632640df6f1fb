"""Classes as users write them. The workers can import this module."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import numpy as np

Pair = namedtuple("Pair", "left right")


def data(size: int) -> np.ndarray:
    """Return ``size`` random doubles."""
    return np.random.default_rng(2).random(size)


class Model:
    """An estimator with arrays, settings, and a cache that is not pickled."""

    def __init__(self, size: int) -> None:
        self.coefficients = data(size).reshape(2, -1)
        self.intercept = 0.5
        self.cache: np.ndarray | None = data(4)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"cache": None}


class Slotted:
    """A class without a ``__dict__``."""

    __slots__ = ("data", "name")

    def __init__(self, size: int) -> None:
        self.data, self.name = data(size), "slotted"


@dataclasses.dataclass
class Record:
    """A dataclass that holds an array."""

    key: str
    data: np.ndarray
    tags: list[str]


class Bunch(dict):  # type: ignore[type-arg]
    """A subclass of dict, like scikit-learn's class of this name."""


class Quantity(np.ndarray):
    """A subclass of ndarray that carries an attribute."""

    unit: str

    def __array_finalize__(self, other: Any) -> None:
        self.unit = getattr(other, "unit", "")
