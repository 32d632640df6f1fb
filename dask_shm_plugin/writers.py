"""Who may still write to a value: told by counting every reference to it and to the parts that hold its memory.

A published copy may stand for a value only while nothing but the worker's own key reaches the value's memory. The
interpreter knows that: each object counts its references. So all parts of a value are visited, the references between
them are added up, and any part that has more is reached from elsewhere: by a view, a cache, a global, an attribute, an
actor, a running task. What cannot be visited in full (objects of users, Arrow, memory of other libraries) is never alone.
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

from dask_shm_plugin.views import Exporter

_MOST_PARTS = 1_000
"""Objects that are visited, about 1 µs each; a value of more is not alone."""

_IMMUTABLE = frozenset({type(None), bool, int, float, complex, str, bytes, range, object})
_MANAGED_BUFFER = type(gc.get_referents(memoryview(b""))[0])
_CONTAINERS = (list, tuple, dict)
_FOLLOWED = (memoryview, pickle.PickleBuffer, _MANAGED_BUFFER, *_CONTAINERS)
_LEAVES = (Exporter, bytearray, weakref.ReferenceType)


class _OutOfSight(Exception):
    """A part of a value whose memory others may reach without a reference that is counted."""


class _Part(NamedTuple):
    """An object that a value consists of, and the objects to which it holds references, one entry for each."""

    item: object
    holds: list[Any]


def is_alone(box: list[Any], known: int) -> bool:
    """Tell whether some references, and nothing else in this process, reach the memory of a value.

    Parameters
    ----------
    box
        A list with the value as its only item. The caller must not hold the value in a variable.
    known
        References to the value besides that of the box.

    Notes
    -----
    Thread-safe. Other threads may create and drop references meanwhile. All counts are read by one call that runs no
    byte code, so they are those of one moment. The parts are visited again after it: a thread that had changed a
    container, and let it go before the counts were read, is noticed.

    Where objects do not count all references (Python without the GIL) no value is alone.
    """
    if not _COUNTS_ARE_EXACT:
        return False
    try:
        parts = _parts_of(box)
        return _is_closed(parts, known + 1) and _shape(parts) == _shape(_parts_of(box))
    except Exception:  # among others _OutOfSight, and whatever a library has against being looked at
        return False


def _is_closed(parts: dict[int, _Part], of_root: int) -> bool:
    """Tell whether no part has a reference from outside, apart from so many to the first."""
    expected = Counter(map(id, itertools.chain.from_iterable(part.holds for part in parts.values())))
    weak = [weakref.getweakrefs(part.item) for part in parts.values()]
    if any(id(reference) not in parts for references in weak for reference in references):
        return False
    weak_counts = list(map(len, weak))
    del weak
    items = [part.item for part in parts.values()]
    # Each part has, besides those that are counted here, a reference from `parts`, one from each entry of `holds`, and
    # one from `items`.
    seen = list(itertools.chain(map(sys.getrefcount, items), map(weakref.getweakrefcount, items)))
    strong, weak_seen = seen[: len(items)], seen[len(items) :]
    if weak_seen != weak_counts:
        return False
    return all(
        strong[n] - _OWN - 2 * expected[identity] == (of_root if n == 0 else 0) for n, identity in enumerate(parts)
    )


def _parts_of(box: list[Any]) -> dict[int, _Part]:
    """Visit all parts of a value; the first is the value itself."""
    parts: dict[int, _Part] = {}
    waiting, visited = box[:], 0
    while waiting:
        item = waiting.pop()
        visited += 1
        if visited > _MOST_PARTS:
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
    """Tell whether an object is of a kind that nobody can change, or a short tuple of such."""
    kind = type(item)
    if kind is tuple:
        return len(item) <= _MOST_PARTS and all(map(_is_scalar, map(type, item)))
    if issubclass(kind, np.dtype):
        return is_bare(item)
    return _is_scalar(kind) or (issubclass(kind, type) and _is_of_a_library(item))


def is_bare(dtype: np.dtype[Any]) -> bool:
    """Tell whether nothing is attached to the type of an array's elements: that might be changed."""
    parts = [dtype.subdtype[0]] if dtype.subdtype else [field[0] for field in (dtype.fields or {}).values()]
    return not dtype.metadata and all(map(is_bare, parts))


def _is_scalar(kind: type) -> bool:
    # Not isinstance: a user's class may inherit from any of these, and a row of an array (np.void) looks at the array.
    return kind in _IMMUTABLE or (
        issubclass(kind, np.generic) and kind is not np.void and getattr(np, kind.__name__, None) is kind
    )


def _is_of_a_library(kind: type) -> bool:
    return any(is_defined_by(kind, library) for library in ("builtins", "numpy", "pandas"))


def _held_by(item: Any) -> list[Any] | None:
    """Return the objects to which a part holds references, or None for what may be shared by many."""
    kind = type(item)
    if kind is np.ndarray:
        return _held_by_array(item)
    if kind in _LEAVES:
        return []
    if kind in _CONTAINERS and len(item) > _MOST_PARTS:
        raise _OutOfSight
    if kind in _FOLLOWED:
        return gc.get_referents(item)
    if is_defined_by(kind, "pandas"):
        return _held_by_pandas(item)
    if is_defined_by(kind, "scipy.sparse"):
        return _held_by_instance(item)
    raise _OutOfSight


def _held_by_instance(item: Any) -> list[Any]:
    """Return what an object of a class written in Python, or like one, refers to."""
    # From Python 3.13 on, the collector may see the attributes in the object, and not the dict of them that somebody keeps.
    # To ask for that dict may make it.
    own = getattr(item, "__dict__", None) if sys.version_info >= (3, 13) else None
    held = [one for one in gc.get_referents(item) if one is not type(item)]
    if own is not None and all(one is not own for one in held) and sys.getrefcount(own) > _DICT_REFERENCES:
        raise _OutOfSight
    return held


def _held_by_array(array: Any) -> list[Any]:
    if array.dtype.hasobject and (array.size > _MOST_PARTS or not all(map(is_immutable, array.flat))):
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
        # Which column lies in which block: frames share these arrays, and hand them to nobody.
        private = {id(getattr(item, name, None)) for name in ("_blknos", "_blklocs")}
        held = [one for one in held if id(one) not in private]
    return held


def _held_by_labels(index: Any) -> list[Any]:
    """Return what an index of texts refers to, but the texts: nobody writes to them but by the bare buffers of Arrow."""
    if sys.getrefcount(index.__dict__) >= _DICT_REFERENCES:  # one less than where a variable has the dict as well
        raise _OutOfSight
    references = getattr(index, "_references", None)
    return [] if references is None else [references]


def _is_of_texts(index: Any) -> bool:
    arrow = getattr(getattr(index, "_data", None), "_pa_array", None)
    return arrow is not None and str(arrow.type) in ("string", "large_string")


def is_defined_by(kind: type, library: str) -> bool:
    """Tell whether a library has defined a class: what a class says of itself anybody can write."""
    module = kind.__module__
    if type(module) is not str or not f"{module}.".startswith(f"{library}."):
        return False
    return getattr(sys.modules.get(module), kind.__name__, None) is kind


def _references_of_this_module() -> int:
    """Return how many references to a part this module itself holds when it counts."""
    item = [_Part(bytearray(), [])]
    parts = {id(part.item): part for part in item}
    del item
    items = [part.item for part in parts.values()]
    seen = list(itertools.chain(map(sys.getrefcount, items), map(weakref.getweakrefcount, items)))
    return seen[0]


def _references_to_a_dict() -> int:
    """Return how many references the dict of an object has that nobody keeps, as `_held_by_instance` sees it."""
    item = _OutOfSight()
    own = getattr(item, "__dict__", None)
    return sys.getrefcount(own)


_COUNTS_ARE_EXACT = hasattr(sys, "getrefcount") and getattr(sys, "_is_gil_enabled", lambda: True)()
_OWN = _references_of_this_module() if _COUNTS_ARE_EXACT else 0
_DICT_REFERENCES = _references_to_a_dict() if _COUNTS_ARE_EXACT else 0
