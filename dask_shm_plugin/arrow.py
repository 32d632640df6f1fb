"""Arrow data that lies in the arena, serialized without the copy that its usual serializers make.

Dask writes a ``pyarrow.Table`` to a stream, which copies it; pandas (2.2 to 3.1) calls ``combine_chunks`` when it pickles
an Arrow column, which copies even a single chunk. So what came out of the arena would look private each time it is
sent on. Here it is pickled with its buffers out of band. What is rebuilt is the same: what lies in the arena has been
through its usual serializer once, and is aligned and compact since.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

import msgpack
from distributed.protocol.serialize import Serialized

SMALL = 1024
"""Bytes up to which a buffer is not worth a place of its own."""

IsMapped = Callable[[int, int], bool]


def keep_in_place(value: Any, is_mapped: IsMapped) -> Any:
    """Replace Arrow data that is mapped by its serialized form, which Dask passes through.

    Parameters
    ----------
    value
        Anything; looked at are a table or pandas object, and those directly in a list, tuple or dict, if Dask
        serializes their items one by one.
    is_mapped
        Tells whether an address and a length lie in the arena.
    """
    if "pyarrow" not in sys.modules:
        return value
    if type(value) in (list, tuple):
        return type(value)(_in_place(item, is_mapped) for item in value)
    if type(value) is dict and _is_taken_apart(value):
        return {key: _in_place(item, is_mapped) for key, item in value.items()}
    return _in_place(value, is_mapped)


def _is_taken_apart(value: dict[Any, Any]) -> bool:
    """Tell whether Dask serializes the items of a dict one by one, or pickles it whole, with what we put into it."""
    try:
        msgpack.dumps(list(value))
    except Exception:
        return False
    return True


def _in_place(value: Any, is_mapped: IsMapped) -> Any:
    library = type(value).__module__.partition(".")[0]
    if library == "pyarrow":
        return _table_in_place(value, is_mapped)
    if library == "pandas":
        return _columns_in_place(value, is_mapped)
    return value


def _table_in_place(value: Any, is_mapped: IsMapped) -> Any:
    import pyarrow

    if not isinstance(value, (pyarrow.Table, pyarrow.RecordBatch)):
        return value
    columns = [getattr(column, "chunks", [column]) for column in value.columns]
    aligned = len({tuple(map(len, chunks)) for chunks in columns}) == 1
    if not aligned or not _are_mapped([chunk for chunks in columns for chunk in chunks], is_mapped):
        return value
    buffers: list[pickle.PickleBuffer] = []
    return _serialized(pickle.dumps(value, protocol=5, buffer_callback=buffers.append), buffers)


def _columns_in_place(value: Any, is_mapped: IsMapped) -> Any:
    # Looked for before anything is pickled: what nobody asks for is pickled once, as without us.
    if not any(_is_whole_and_mapped(column, is_mapped) for column in _columns(value)):
        return value
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    try:
        _ColumnPickler(file, is_mapped, buffers.append).dump(value)
    except Exception:
        return value
    # Dask turns to cloudpickle for what is defined in __main__.
    if b"__main__" in file.getvalue():
        return value
    return _serialized(file.getvalue(), buffers)


def _columns(value: Any) -> list[Any]:
    """Return the arrays of a pandas object that Arrow may hold."""
    manager = getattr(value, "_mgr", None)
    return [value._values] if manager is None and hasattr(value, "_values") else list(getattr(manager, "arrays", []))


def _is_whole_and_mapped(column: Any, is_mapped: IsMapped) -> bool:
    import pandas

    if not isinstance(column, pandas.arrays.ArrowExtensionArray):
        return False
    chunks = column._pa_array.chunks
    return len(chunks) == 1 and _are_mapped(chunks, is_mapped)


class _ColumnPickler(pickle.Pickler):
    """Pickles pandas objects, their mapped Arrow columns by the chunk."""

    def __init__(self, file: io.BytesIO, is_mapped: IsMapped, buffer: Callable[[Any], Any]) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffer)
        self._is_mapped = is_mapped

    def reducer_override(self, item: Any) -> Any:
        if not _is_whole_and_mapped(item, self._is_mapped):
            return NotImplemented
        # typeshed does not know this function, which pickle itself names.
        return copyreg.__newobj__, (type(item),), {**item.__dict__, "_pa_array": item._pa_array.chunks[0], "_cache": {}}  # type: ignore[attr-defined]


def _are_mapped(arrays: list[Any], is_mapped: IsMapped) -> bool:
    """Tell whether all large buffers, at least one, are mapped; small ones travel with the stream."""
    buffers = [buffer for array in arrays for buffer in array.buffers() if buffer and buffer.size > SMALL]
    return bool(buffers) and all(is_mapped(buffer.address, buffer.size) for buffer in buffers)


def _serialized(stream: bytes, buffers: list[pickle.PickleBuffer]) -> Serialized:
    frames = [memoryview(buffer) for buffer in buffers]
    header = {"serializer": "pickle", "writeable": tuple(not frame.readonly for frame in frames)}
    return Serialized(header, [stream, *frames])
