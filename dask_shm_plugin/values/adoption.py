"""Decide whether a worker may replace its private copy of a published value by the shared one.

It may if no user of the value can tell the two apart. So the value must be of a type that deserialization rebuilds
exactly, in the same layout, over the bytes of the block. An instance of a user's class may drop a cache when it is
pickled, so it is shared for transport only. Whether anything else reaches the private copy is decided in `aliases`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dask_shm_plugin.values.aliases import is_bare, is_defined_by, is_immutable

_CONTAINERS = (list, tuple, dict)
_MAX_COLUMNS = 256


def may_adopt(value: object) -> bool:
    """Return whether deserialization rebuilds a value exactly; False for immutable values and containers of these."""
    if is_immutable(value):
        return False
    seen: set[int] = set()
    return _is_exact(value, seen) and len(seen) > (type(value) in _CONTAINERS)


def is_faithful(rebuilt: object, value: object) -> bool:
    """Return whether a rebuilt value has the dtypes, shapes, strides and writeable flags of the private one."""
    return _same_layout(rebuilt, value)


def _is_exact(value: Any, seen: set[int]) -> bool:
    kind = type(value)
    if is_immutable(value):
        # An item that is not equal to itself (NaN) is found in a container by identity, which a copy does not have.
        return all(_is_exact(item, seen) for item in value) if kind is tuple else bool(value == value)
    # An object that occurs twice in a container would become two objects.
    if id(value) in seen:
        return False
    seen.add(id(value))
    if kind is dict:
        return all(is_immutable(key) and _is_exact(key, seen) and _is_exact(item, seen) for key, item in value.items())
    if kind in _CONTAINERS:
        return all(_is_exact(item, seen) for item in value)
    if kind is np.ndarray:
        return not value.dtype.hasobject and is_bare(value.dtype)
    if is_defined_by(kind, "pandas"):
        return kind.__name__ in ("DataFrame", "Series") and _has_no_objects(value) and _has_no_extras(value)
    return is_defined_by(kind, "scipy.sparse")


def _has_no_objects(frame: Any) -> bool:
    """Return whether a DataFrame or Series holds no Python objects: a rebuilt value would have other objects."""
    kinds = list(frame.dtypes) if frame.ndim == 2 else [frame.dtype]
    return (
        len(kinds) <= _MAX_COLUMNS
        and all(kind.kind != "O" for kind in kinds if isinstance(kind, np.dtype))
        and not frame.attrs
    )


def _has_no_extras(frame: Any) -> bool:
    """Return whether a DataFrame or Series has no attributes but those of pandas: serialization would lose them."""
    own = {*vars(type(frame)([])), "_item_cache", "_cacher", "_is_copy"}
    return own.issuperset(vars(frame))


def _same_layout(rebuilt: Any, value: Any) -> bool:
    if type(value) is dict:
        return all(_same_layout(rebuilt[key], item) for key, item in value.items())
    if type(value) in _CONTAINERS:
        return all(_same_layout(one, other) for one, other in zip(rebuilt, value, strict=True))
    return bool(_layout(rebuilt) == _layout(value))


def _layout(value: Any) -> Any:
    """Return the memory layout of a value, as far as its user can see it."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.strides, value.flags.writeable
    if type(value).__module__.partition(".")[0] == "pandas":
        columns = [value.iloc[:, n] for n in range(value.shape[1])] if value.ndim == 2 else [value]
        # Datetime columns keep their NumPy array in `_ndarray`.
        arrays = [getattr(column._values, "_ndarray", column._values) for column in columns]
        return [_layout(array) for array in arrays if isinstance(array, np.ndarray)]
    return None
