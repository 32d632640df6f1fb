"""Detect whether anything but a worker's own key reaches the memory of a value, by counting references.

A published copy may stand for a value only while nothing but the worker's own key reaches the value's memory. CPython
counts the references to each object. So :func:`is_alone` visits all parts of a value and adds up the references between
them. A part with more references is reached from elsewhere: by a view, a cache, a global, an attribute, an actor or a
running task. A value with parts that cannot be visited (objects of users' classes, Arrow data, memory of other
libraries) is never alone.
"""

from __future__ import annotations

import gc
import itertools
import pickle
import sys
import weakref
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from dask_shm_plugin.mapping.exporter import Exporter

_MAX_PARTS = 1_000
"""Maximum number of objects of a value that are visited, at about 1 µs each. A value of more counts as not alone."""

_IMMUTABLE = frozenset({type(None), bool, int, float, complex, str, bytes, range, object})
_MANAGED_BUFFER = type(gc.get_referents(memoryview(b""))[0])
_CONTAINERS = (list, tuple, dict)
_FOLLOWED = (memoryview, pickle.PickleBuffer, _MANAGED_BUFFER, *_CONTAINERS)
_LEAVES = (Exporter, bytearray, weakref.ReferenceType)


class _OutOfSight(Exception):
    """A value has too many parts to visit, or a part that may be reached without a counted reference."""


class _Part(NamedTuple):
    """An object that a value consists of, and the objects to which it refers: one entry for each reference."""

    item: object
    holds: list[Any]


def is_alone(box: list[Any], known: int) -> bool:
    """Return whether nothing in this process but some known references reaches the memory of a value.

    Parameters
    ----------
    box
        A list with the value as its only item. The caller must not hold the value in a variable.
    known
        The number of known references to the value, not counting that of the box.

    Notes
    -----
    Thread-safe: other threads may create and drop references meanwhile. A single call that runs no bytecode reads all
    counts, so they belong to one moment. Then the parts are visited again. This detects a thread that changed a
    container during the first visit and dropped its reference to it before the counts were read.

    Without the GIL, objects do not count all references, so no value is alone.
    """
    if not _COUNTS_ARE_EXACT:
        return False
    try:
        parts = _parts_of(box)
        return _is_closed(parts, known + 1) and _shape(parts) == _shape(_parts_of(box))
    except Exception:  # _OutOfSight, or an error from inspecting an object of another library
        return False


def _is_closed(parts: dict[int, _Part], of_root: int) -> bool:
    """Return whether no part has a reference from outside, apart from ``of_root`` references to the first part."""
    expected = Counter(map(id, itertools.chain.from_iterable(part.holds for part in parts.values())))
    weak = [weakref.getweakrefs(part.item) for part in parts.values()]
    if any(id(reference) not in parts for references in weak for reference in references):
        return False
    weak_counts = list(map(len, weak))
    del weak
    items = [part.item for part in parts.values()]
    # This module adds references to each part: one from `parts` and one from `items`, which are in `_OWN`, and one from
    # each entry of `holds` that lists it. So every reference between parts counts twice.
    seen = list(itertools.chain(map(sys.getrefcount, items), map(weakref.getweakrefcount, items)))
    strong, weak_seen = seen[: len(items)], seen[len(items) :]
    if weak_seen != weak_counts:
        return False
    return all(
        strong[n] - _OWN - 2 * expected[identity] == (of_root if n == 0 else 0) for n, identity in enumerate(parts)
    )


def _parts_of(box: list[Any]) -> dict[int, _Part]:
    """Return all parts of a value by identity; the first is the value itself."""
    parts: dict[int, _Part] = {}
    waiting, visited = box[:], 0
    while waiting:
        item = waiting.pop()
        visited += 1
        if visited > _MAX_PARTS:
            raise _OutOfSight
        if id(item) in parts or is_immutable(item):
            continue
        holds = _held_by(item)
        if holds is not None:
            parts[id(item)] = _Part(item, holds)
            waiting += holds
    return parts


def _shape(parts: dict[int, _Part]) -> list[tuple[int, list[int]]]:
    return [(identity, list(map(id, part.holds))) for identity, part in parts.items()]


def is_immutable(item: Any) -> bool:
    """Return whether an object is a scalar, a bare dtype, a library's class, or a tuple of up to 1,000 scalars."""
    kind = type(item)
    if kind is tuple:
        return len(item) <= _MAX_PARTS and all(map(_is_scalar, map(type, item)))
    if issubclass(kind, np.dtype):
        return is_bare(item)
    return _is_scalar(kind) or (issubclass(kind, type) and _is_of_a_library(item))


def is_bare(dtype: np.dtype[Any]) -> bool:
    """Return whether neither a dtype nor any of its fields has metadata, which is mutable."""
    parts = [dtype.subdtype[0]] if dtype.subdtype else [field[0] for field in (dtype.fields or {}).values()]
    return not dtype.metadata and all(map(is_bare, parts))


def _is_scalar(kind: type) -> bool:
    # Not isinstance: a user's class may inherit from any of these. Not np.void: a row of an array is a view of it.
    return kind in _IMMUTABLE or (
        issubclass(kind, np.generic) and kind is not np.void and getattr(np, kind.__name__, None) is kind
    )


def _is_of_a_library(kind: type) -> bool:
    return any(is_defined_by(kind, library) for library in ("builtins", "numpy", "pandas"))


def _held_by(item: Any) -> list[Any] | None:
    """Return the objects to which a part refers, or None for an immutable part that many values may share."""
    kind = type(item)
    if kind is np.ndarray:
        return _held_by_array(item)
    if kind in _LEAVES:
        return []
    if kind in _CONTAINERS and len(item) > _MAX_PARTS:
        raise _OutOfSight
    if kind in _FOLLOWED:
        return gc.get_referents(item)
    if is_defined_by(kind, "pandas"):
        return _held_by_pandas(item)
    if is_defined_by(kind, "scipy.sparse"):
        return _held_by_instance(item)
    raise _OutOfSight


def _held_by_instance(item: Any) -> list[Any]:
    """Return the objects to which an instance refers, except its class."""
    # From Python 3.13 on, the garbage collector may list the attributes that the instance stores inline, but not its
    # `__dict__`, to which other code may refer. Reading `__dict__` may create it.
    own = getattr(item, "__dict__", None) if sys.version_info >= (3, 13) else None
    held = [one for one in gc.get_referents(item) if one is not type(item)]
    if own is not None and all(one is not own for one in held) and sys.getrefcount(own) > _DICT_REFERENCES:
        raise _OutOfSight
    return held


def _held_by_array(array: Any) -> list[Any]:
    if array.dtype.hasobject and (array.size > _MAX_PARTS or not all(map(is_immutable, array.flat))):
        raise _OutOfSight
    if not is_bare(array.dtype) or (array.base is None and not array.flags.owndata):
        raise _OutOfSight
    return [] if array.base is None else [array.base]


def _held_by_pandas(item: Any) -> list[Any] | None:
    import pandas

    kind = type(item)
    if kind.__name__ == "BlockPlacement" or kind.__module__.startswith("pandas._libs.tslibs"):
        return None
    if issubclass(kind, pandas.api.extensions.ExtensionDtype) and kind is not pandas.CategoricalDtype:
        return None
    if kind is pandas.Index and _is_of_texts(item):
        return _held_by_labels(item)
    held = _held_by_instance(item)
    if kind.__name__ in ("BlockManager", "SingleBlockManager"):
        # These arrays map columns to blocks. Frames share them, and users do not get them.
        private = {id(getattr(item, name, None)) for name in ("_blknos", "_blklocs")}
        held = [one for one in held if id(one) not in private]
    return held


def _held_by_labels(index: Any) -> list[Any]:
    """Return the objects to which an Index of strings refers, except its Arrow array.

    Only the bare buffers of Arrow give write access to the strings.
    """
    # No variable refers to the dict here, so `_DICT_REFERENCES` means one reference too many.
    if sys.getrefcount(index.__dict__) >= _DICT_REFERENCES:
        raise _OutOfSight
    references = getattr(index, "_references", None)
    return [] if references is None else [references]


def _is_of_texts(index: Any) -> bool:
    arrow = getattr(getattr(index, "_data", None), "_pa_array", None)
    return arrow is not None and str(arrow.type) in ("string", "large_string")


def is_defined_by(kind: type, library: str) -> bool:
    """Return whether a library really defines a class; any code can set the ``__module__`` of its own classes."""
    module = kind.__module__
    if type(module) is not str or not f"{module}.".startswith(f"{library}."):
        return False
    return getattr(sys.modules.get(module), kind.__name__, None) is kind


def _references_of_this_module() -> int:
    """Return the number of references to a part that `_is_closed` itself adds when it counts."""
    item = [_Part(bytearray(), [])]
    parts = {id(part.item): part for part in item}
    del item
    items = [part.item for part in parts.values()]
    seen = list(itertools.chain(map(sys.getrefcount, items), map(weakref.getweakrefcount, items)))
    return seen[0]


def _references_to_a_dict() -> int:
    """Return the reference count of a ``__dict__`` that only its instance refers to, as `_held_by_instance` sees it."""
    item = _OutOfSight()
    own = getattr(item, "__dict__", None)
    return sys.getrefcount(own)


_COUNTS_ARE_EXACT = hasattr(sys, "getrefcount") and getattr(sys, "_is_gil_enabled", lambda: True)()
_OWN = _references_of_this_module() if _COUNTS_ARE_EXACT else 0
_DICT_REFERENCES = _references_to_a_dict() if _COUNTS_ARE_EXACT else 0
