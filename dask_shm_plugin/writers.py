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
import types
import weakref
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from dask_shm_plugin.views import Exporter

_MOST_PARTS = 1_000
"""Parts that are visited, about 1 µs each; a value of more is not alone."""

_IMMUTABLE = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    slice,
    type,
    types.BuiltinFunctionType,
)
_MANAGED_BUFFER = type(gc.get_referents(memoryview(b""))[0])
_CONTAINERS = (list, tuple, dict)
_MEMORY = (np.ndarray, memoryview, pickle.PickleBuffer, _MANAGED_BUFFER, bytearray)
_FOLLOWED = (memoryview, pickle.PickleBuffer, _MANAGED_BUFFER, *_CONTAINERS)
_LEAVES = (Exporter, bytearray, weakref.ReferenceType)


class _OutOfSight(Exception):
    """A part of a value whose memory others may reach without a reference that is counted."""


class _Part(NamedTuple):
    """An object that a value consists of, and the objects to which it holds references, one entry for each."""

    item: object
    holds: list[Any]
    counts: bool
    """Whether it matters who else refers to it."""


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
    except _OutOfSight:
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
    for n, (identity, part) in enumerate(parts.items()):
        references = strong[n] - _OWN - 2 * expected[identity]
        if part.counts and references != (of_root if n == 0 else 0):
            return False
    return True


def _parts_of(box: list[Any]) -> dict[int, _Part]:
    """Visit all parts of a value; the first is the value itself."""
    parts: dict[int, _Part] = {}
    waiting: list[tuple[list[Any], bool]] = [(box[:], True)]
    while waiting:
        items, counts = waiting.pop()
        while items:
            item = items.pop()
            if _is_immutable(item):
                continue
            found = parts.get(id(item))
            if found is not None and (found.counts or not counts):
                continue
            part = _visit(item, counts)
            if part is None:
                continue
            parts[id(item)] = part
            if len(parts) > _MOST_PARTS:
                raise _OutOfSight
            waiting.append((part.holds[:], part.counts or type(item) in _MEMORY))
    return parts


def _shape(parts: dict[int, _Part]) -> list[tuple[int, list[int]]]:
    return [(identity, list(map(id, part.holds))) for identity, part in parts.items()]


def _is_immutable(item: Any) -> bool:
    kind = type(item)
    # Not isinstance: a proxy of a user's would be asked for its class, and may do anything.
    if kind in _IMMUTABLE or issubclass(kind, (np.generic, np.dtype, type)):
        return True
    return kind is tuple and all(map(_is_immutable, item))


def _visit(item: Any, counts: bool) -> _Part | None:
    """Return a part, or None for what cannot be seen and need not be."""
    kind = type(item)
    if kind is np.ndarray:
        return _visit_array(item, counts)
    if kind in _LEAVES:
        return _Part(item, [], counts or kind is bytearray)
    if kind in _FOLLOWED:
        return _Part(item, gc.get_referents(item), counts or kind in _MEMORY)
    if not counts:
        return _Part(item, gc.get_referents(item), False) if is_defined_by(kind, "pandas") else None
    if is_defined_by(kind, "scipy"):
        return _Part(item, gc.get_referents(item), True)
    if is_defined_by(kind, "pandas"):
        return _visit_pandas(item)
    raise _OutOfSight


def _visit_array(array: Any, counts: bool) -> _Part | None:
    if array.dtype.hasobject:
        if counts:
            raise _OutOfSight
        return None
    if array.base is None and not array.flags.owndata:
        raise _OutOfSight
    return _Part(array, [] if array.base is None else [array.base], True)


def _visit_pandas(item: Any) -> _Part | None:
    import pandas

    if isinstance(item, (pandas.Index, pandas.api.extensions.ExtensionDtype)):
        # Frames share them, for nobody may change one: only their memory must be out of reach.
        return _Part(item, gc.get_referents(item), False)
    if type(item).__module__.startswith("pandas._libs.tslibs") or type(item).__name__ == "BlockPlacement":
        return None
    if type(item).__name__ in ("BlockManager", "SingleBlockManager"):
        # Which column lies in which block: frames share these arrays, too, and hand them to nobody.
        private = {id(getattr(item, name, None)) for name in ("_blknos", "_blklocs")}
        return _Part(item, [held for held in gc.get_referents(item) if id(held) not in private], True)
    return _Part(item, gc.get_referents(item), True)


def is_defined_by(kind: type, library: str) -> bool:
    """Tell whether a library has defined a class: what a class says of itself anybody can write."""
    module = kind.__module__
    if type(module) is not str or module.partition(".")[0] != library:
        return False
    return getattr(sys.modules.get(module), kind.__name__, None) is kind


def _references_of_this_module() -> int:
    """Return how many references to a part this module itself holds when it counts."""
    item = [_Part(bytearray(), [], True)]
    parts = {id(part.item): part for part in item}
    del item
    items = [part.item for part in parts.values()]
    seen = list(itertools.chain(map(sys.getrefcount, items), map(weakref.getweakrefcount, items)))
    return seen[0]


_COUNTS_ARE_EXACT = hasattr(sys, "getrefcount") and getattr(sys, "_is_gil_enabled", lambda: True)()
_OWN = _references_of_this_module() if _COUNTS_ARE_EXACT else 0
