"""Whether the publisher of a value may give its private copy up for the shared one.

Only where nobody could tell the difference: types that are rebuilt exactly, in the same layout, and truly from the
block. A class of the user's may drop a cache when it is pickled; it is shared for the transport only. Whether anything else
reaches the private copy is told elsewhere (`writers`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dask_shm_plugin.writers import is_bare, is_defined_by, is_immutable

_CONTAINERS = (list, tuple, dict)
_MANY_COLUMNS = 256


def may_adopt(value: object) -> bool:
    """Tell whether a value is of a kind that is rebuilt exactly."""
    if is_immutable(value):
        return False
    seen: set[int] = set()
    return _is_exact(value, seen) and len(seen) > (type(value) in _CONTAINERS)


def is_faithful(rebuilt: object, value: object) -> bool:
    """Tell whether a rebuilt value is laid out as the private one."""
    return _same_layout(rebuilt, value)


def _is_exact(value: Any, seen: set[int]) -> bool:
    kind = type(value)
    if is_immutable(value):
        # What is not equal to itself is looked for by identity.
        return kind is tuple or bool(value == value)
    # The same object twice in a container would become two objects.
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
    """Tell whether a DataFrame or Series keeps no Python objects, whose identity would be lost."""
    kinds = list(frame.dtypes) if frame.ndim == 2 else [frame.dtype]
    return (
        len(kinds) <= _MANY_COLUMNS
        and all(kind.kind != "O" for kind in kinds if isinstance(kind, np.dtype))
        and not frame.attrs
    )


def _has_no_extras(frame: Any) -> bool:
    """Tell whether nobody has set an attribute of a DataFrame or Series: a journey would lose it."""
    own = {*vars(type(frame)([])), "_item_cache", "_cacher", "_is_copy"}
    return own.issuperset(vars(frame))


def _same_layout(rebuilt: Any, value: Any) -> bool:
    if type(value) is dict:
        return all(_same_layout(rebuilt[key], item) for key, item in value.items())
    if type(value) in _CONTAINERS:
        return all(_same_layout(one, other) for one, other in zip(rebuilt, value, strict=True))
    return bool(_layout(rebuilt) == _layout(value))


def _layout(value: Any) -> Any:
    """Describe how a value lies in memory, as far as its user can see it."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.strides, value.flags.writeable
    if type(value).__module__.partition(".")[0] == "pandas":
        columns = [value.iloc[:, n] for n in range(value.shape[1])] if value.ndim == 2 else [value]
        arrays = [getattr(column._values, "_ndarray", column._values) for column in columns]  # of dates, too
        return [_layout(array) for array in arrays if isinstance(array, np.ndarray)]
    return None
