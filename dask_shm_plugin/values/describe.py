"""Describe a value in a few words, for people: its type and its shape. Runs no code of a user's class."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

_CONTAINERS = (list, tuple, dict, set, frozenset, str, bytes, bytearray, memoryview)


class Description(NamedTuple):
    """A value in words: the name of its type, and its shape, which is empty if the type has none."""

    type: str
    shape: str


def describe(value: object) -> Description:
    """Return the type and the shape of a value; never raises."""
    kind = type(value)
    module = str(kind.__module__).partition(".")[0]
    name = kind.__name__ if module == "builtins" else f"{module}.{kind.__name__}"
    try:
        return Description(name, _shape(value, module))
    except Exception:
        return Description(name, "")


def _shape(value: Any, module: str) -> str:
    if isinstance(value, np.ndarray):
        return f"{_times(value.shape)} {value.dtype}"
    if module in ("pandas", "pyarrow") and hasattr(value, "shape"):
        units = ("rows", "columns")
        return " × ".join(f"{count:,} {unit}" for count, unit in zip(value.shape, units, strict=False))
    if module == "scipy":
        return f"{_times(value.shape)} {value.dtype}, {value.nnz:,} stored"
    if type(value) in _CONTAINERS:
        return f"{len(value):,} items"
    return ""


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(f"{count:,}" for count in shape) or "scalar"
