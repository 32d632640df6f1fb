"""Which blocks a value lies in: told by where its living buffers are.

Looks through containers, attributes and columns as the garbage collector does, and at Arrow data by its own means;
never pickles. What it does not find counts as private.
"""

from __future__ import annotations

import gc
import types
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from dask_shm_plugin.layout import Row
from dask_shm_plugin.views import ATLAS

_AT_MOST = 500
"""Objects that are looked at; who has more than that in one value has it not in few large buffers.

To look at 3,000 took 5.6 ms, for each such value that a worker stores (November 2026)."""
_NO_WAY_ON = (type, types.ModuleType, types.FunctionType, types.CodeType, types.FrameType, str, bytes, int, float)


def rows_of(value: object, arena_id: bytes) -> dict[Row, int]:
    """Return the blocks of an arena that a value lies in, and how many bytes of it lie there."""
    found: defaultdict[Row, int] = defaultdict(int)
    if len(ATLAS):
        for address, length in _buffers(value):
            place = ATLAS.locate(address, length)
            if place is not None and place.arena_id == arena_id:
                found[place.row] += length
    return dict(found)


def address_of(data: Any) -> int:
    """Return the address of flat bytes."""
    return int(np.frombuffer(data, dtype=np.uint8).__array_interface__["data"][0])


def bounds(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Return address and length of the memory that an array looks at."""
    if array.size == 0:
        return 0, 0
    reach = [(count - 1) * stride for count, stride in zip(array.shape, array.strides, strict=True)]
    low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
    return int(array.__array_interface__["data"][0]) + low, high - low + array.itemsize


def _buffers(value: object) -> Iterator[tuple[int, int]]:
    # Keeps what was seen alive, or another object might get its identity.
    seen = {id(value): value}
    waiting: list[Any] = [value]
    while waiting and len(seen) <= _AT_MOST:
        item = waiting.pop()
        # Not isinstance: a proxy of a user's would be asked for its class, and may do anything.
        kind = type(item)
        if issubclass(kind, np.ndarray) and not item.dtype.hasobject:
            yield bounds(item)
        elif kind is memoryview and item.contiguous and item.nbytes:
            yield address_of(item.cast("B") if item.c_contiguous else np.asarray(item).ravel("K")), item.nbytes
        elif str(kind.__module__).startswith("pyarrow."):
            yield from _arrow_buffers(item)
        for part in _parts(item):
            if id(part) not in seen:
                seen[id(part)] = part
                waiting.append(part)


def _parts(item: object) -> list[Any]:
    if type(item) in (np.ndarray, memoryview):
        return []
    parts = gc.get_referents(item)
    return [part for part in parts[:_AT_MOST] if not issubclass(type(part), _NO_WAY_ON) and part is not None]


def _arrow_buffers(item: Any) -> Iterator[tuple[int, int]]:
    columns = getattr(item, "columns", [item])
    for column in columns:
        for chunk in getattr(column, "chunks", [column]):
            for buffer in chunk.buffers() if hasattr(chunk, "buffers") else ():
                if buffer is not None and buffer.size:
                    yield buffer.address, buffer.size
