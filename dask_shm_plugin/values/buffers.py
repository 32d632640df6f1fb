"""Find the blocks in which a value lies, from the addresses of its buffers.

The search follows containers, attributes and columns as the garbage collector does, and asks Arrow objects for their
buffers. It never pickles. Buffers that it does not find count as private.
"""

from __future__ import annotations

import gc
import types
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from dask_shm_plugin.mapping.atlas import ATLAS
from dask_shm_plugin.table.layout import BlockId

_MAX_OBJECTS = 500
"""Maximum number of objects of a value that are visited. A value of more objects does not lie in a few large buffers.

Visiting 3,000 objects took 5.6 ms, for each such value that a worker stores (November 2026)."""
_NOT_FOLLOWED = (type, types.ModuleType, types.FunctionType, types.CodeType, types.FrameType, str, bytes, int, float)


def blocks_of(value: object, arena_id: bytes) -> dict[BlockId, int]:
    """Return the blocks of an arena in which a value lies, with the total size of its buffers in each, in bytes."""
    found: defaultdict[BlockId, int] = defaultdict(int)
    if len(ATLAS):
        for address, length in _buffers(value):
            place = ATLAS.locate(address, length)
            if place is not None and place.arena_id == arena_id:
                found[place.row] += length
    return dict(found)


def address_of(data: Any) -> int:
    """Return the address of a flat buffer of bytes."""
    return int(np.frombuffer(data, dtype=np.uint8).__array_interface__["data"][0])


def bounds(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Return the address and length, in bytes, of the memory that an array spans."""
    if array.size == 0:
        return 0, 0
    reach = [(count - 1) * stride for count, stride in zip(array.shape, array.strides, strict=True)]
    low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
    return int(array.__array_interface__["data"][0]) + low, high - low + array.itemsize


def _buffers(value: object) -> Iterator[tuple[int, int]]:
    # Keeps visited objects alive: otherwise a new object could get the identity of a freed one.
    seen = {id(value): value}
    waiting: list[Any] = [value]
    while waiting and len(seen) <= _MAX_OBJECTS:
        item = waiting.pop()
        # Not isinstance, which reads `__class__`: for a user's proxy object, that may run any code.
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
    return [part for part in parts[:_MAX_OBJECTS] if not issubclass(type(part), _NOT_FOLLOWED) and part is not None]


def _arrow_buffers(item: Any) -> Iterator[tuple[int, int]]:
    columns = getattr(item, "columns", [item])
    for column in columns:
        for chunk in getattr(column, "chunks", [column]):
            for buffer in chunk.buffers() if hasattr(chunk, "buffers") else ():
                if buffer is not None and buffer.size:
                    yield buffer.address, buffer.size
