"""Data of pandas and Arrow that their usual serializers copy, with the bytes beside the pickle stream and not in it.

NumPy cannot export arrays of ``datetime64`` and ``timedelta64`` as buffers, and so copies them into the stream: each reader of a
DataFrame with dates would have these as its own. Here such an array is pickled as a view of its integers and its dtype, in
terms of NumPy alone: whoever unpickles it needs nothing of ours.

Dask writes a ``pyarrow.Table`` to a stream, which copies it; pandas (2.2 to 3.1) calls ``combine_chunks`` when it pickles
an Arrow column, which copies even a single chunk. So Arrow data that came out of the arena would look private each time it is
sent on. Here it is pickled with its buffers out of band. What is rebuilt is the same: what lies in the arena has been
through its usual serializer once, and is aligned and compact since.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
from collections.abc import Callable, Container
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
from distributed.protocol.serialize import Serialized

from dask_shm_plugin.reach import address_of

_MANY = 1000
SMALL = 1024
"""Bytes up to which a buffer is not worth a place of its own."""

IsMapped = Callable[[int, int], bool]


def keep_out_of_band(value: Any, is_mapped: IsMapped) -> Any:
    """Replace Arrow data that is mapped, and pandas data with dates, by its serialized form, which Dask passes through.

    Parameters
    ----------
    value
        Anything; looked at are a table or pandas object, and those directly in a list, tuple or dict of not too many, if
        Dask serializes their items one by one.
    is_mapped
        Tells whether an address and a length lie in the arena.
    """
    if sys.modules.keys().isdisjoint(("pandas", "pyarrow")):
        return value
    if type(value) in (list, tuple, dict) and len(value) > _MANY:
        return value
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, is_mapped) for item in value)
    if type(value) is dict and _is_taken_apart(value):
        return {key: _replaced(item, is_mapped) for key, item in value.items()}
    return _replaced(value, is_mapped)


def _is_taken_apart(value: dict[Any, Any]) -> bool:
    """Tell whether Dask serializes the items of a dict one by one, or pickles it whole, with what we put into it."""
    try:
        msgpack.dumps(list(value))
    except Exception:
        return False
    return True


def _replaced(value: Any, is_mapped: IsMapped) -> Any:
    library = type(value).__module__.partition(".")[0]
    if library == "pyarrow":
        return _table(value, is_mapped)
    if library == "pandas":
        return _pandas(value, is_mapped)
    return value


def _table(value: Any, is_mapped: IsMapped) -> Any:
    import pyarrow

    if not isinstance(value, (pyarrow.Table, pyarrow.RecordBatch)):
        return value
    columns = [getattr(column, "chunks", [column]) for column in value.columns]
    aligned = len({tuple(map(len, chunks)) for chunks in columns}) == 1
    if not aligned or not _are_mapped([chunk for chunks in columns for chunk in chunks], is_mapped):
        return value
    buffers: list[pickle.PickleBuffer] = []
    return _serialized(pickle.dumps(value, protocol=5, buffer_callback=buffers.append), buffers)


def _pandas(value: Any, is_mapped: IsMapped) -> Any:
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    try:
        # Looked for before anything is pickled: what has neither is pickled once, as without us.
        if not any(_has_dates(column) or _is_whole_and_mapped(column, is_mapped) for column in _columns(value)):
            return value
        pickler = _Pickler(file, is_mapped, buffers.append)
        pickler.dump(value)
    except Exception:
        return value
    # Dask turns to cloudpickle for what is defined in __main__.
    if b"__main__" in file.getvalue():
        return value
    return _serialized(file.getvalue(), buffers, pickler.dates)


def _columns(value: Any) -> list[Any]:
    """Return the arrays of a pandas object, those of its index too."""
    manager = getattr(value, "_mgr", None)
    if manager is None:
        levels = getattr(value, "levels", None)  # of a MultiIndex
        return (
            [value._values] if levels is None and hasattr(value, "_values") else [one._values for one in levels or ()]
        )
    return [*manager.arrays, *_columns(value.index)]


def _has_dates(column: Any) -> bool:
    return getattr(column.dtype, "kind", "") in ("M", "m") and column.nbytes > SMALL


def _is_whole_and_mapped(column: Any, is_mapped: IsMapped) -> bool:
    import pandas

    if "pyarrow" not in sys.modules or not isinstance(column, pandas.arrays.ArrowExtensionArray):
        return False
    chunks = column._pa_array.chunks
    return len(chunks) == 1 and _are_mapped(chunks, is_mapped)


class _Pickler(pickle.Pickler):
    """Pickles pandas objects, their mapped Arrow columns by the chunk, and dates as integers.

    Attributes
    ----------
    dates
        Addresses of the buffers of dates. What is in a stream is always rebuilt as a writeable array.
    """

    def __init__(self, file: io.BytesIO, is_mapped: IsMapped, buffer: Callable[[Any], Any]) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffer)
        self._is_mapped = is_mapped
        self.dates: set[int] = set()

    def reducer_override(self, item: Any) -> Any:
        if type(item) is np.ndarray:
            return self._dates(item) if _has_dates(item) else NotImplemented
        if not _is_whole_and_mapped(item, self._is_mapped):
            return NotImplemented
        # typeshed does not know this function, which pickle itself names.
        return copyreg.__newobj__, (type(item),), {**item.__dict__, "_pa_array": item._pa_array.chunks[0], "_cache": {}}  # type: ignore[attr-defined]

    def _dates(self, array: npt.NDArray[Any]) -> Any:
        integers = array.view(np.int64)
        if not (integers.flags.c_contiguous or integers.flags.f_contiguous):
            integers = integers.copy()
        self.dates.add(integers.ctypes.data)
        return np.ndarray.view, (integers, array.dtype)


def _are_mapped(arrays: list[Any], is_mapped: IsMapped) -> bool:
    """Tell whether all large buffers, at least one, are mapped; small ones travel with the stream."""
    buffers = [buffer for array in arrays for buffer in array.buffers() if buffer and buffer.size > SMALL]
    return bool(buffers) and all(is_mapped(buffer.address, buffer.size) for buffer in buffers)


def _serialized(
    stream: bytes, buffers: list[pickle.PickleBuffer], writeable: Container[int] = frozenset()
) -> Serialized:
    frames = [buffer.raw() for buffer in buffers]
    flags = tuple(not frame.readonly or address_of(frame) in writeable for frame in frames)
    header = {"serializer": "pickle", "writeable": flags}
    return Serialized(header, [stream, *frames])
