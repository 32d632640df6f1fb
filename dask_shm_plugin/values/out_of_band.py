"""Pickle dates and mapped Arrow data with their buffers out of band; the usual serializers copy them into the stream.

NumPy cannot export arrays of ``datetime64`` and ``timedelta64`` as buffers, so it copies them into the pickle stream:
each reader of a DataFrame with dates would get a private copy of them. Here such an array is pickled as a view of its
integers and its dtype, in terms of NumPy alone, so the reader does not need this package.

Dask writes a ``pyarrow.Table`` to a stream, which copies it. pandas (2.2 to 3.1) calls ``combine_chunks`` when it
pickles an Arrow column, which copies even a single chunk. So Arrow data that is mapped from the arena would look
private each time it is sent on. Here it is pickled with its buffers out of band. The rebuilt data is the same: data in
the arena has been through its usual serializer once, so it is aligned and compact.
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

from dask_shm_plugin.values.buffers import address_of

_MAX_ITEMS = 1000
SMALL = 1024
"""A buffer of up to this many bytes is not worth a place of its own in a block."""

IsMapped = Callable[[int, int], bool]


def keep_out_of_band(value: Any, is_mapped: IsMapped) -> Any:
    """Replace mapped Arrow data, and pandas data with dates, by its serialized form, which Dask sends as it is.

    Parameters
    ----------
    value
        Any value. An Arrow table or pandas object is replaced, also if it is an item of a list, tuple or dict of up to
        1,000 items that Dask serializes item by item.
    is_mapped
        Called with an address and a length in bytes; returns whether these bytes lie in an arena.
    """
    if sys.modules.keys().isdisjoint(("pandas", "pyarrow")):
        return value
    if type(value) in (list, tuple, dict) and len(value) > _MAX_ITEMS:
        return value
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, is_mapped) for item in value)
    if type(value) is dict and _is_taken_apart(value):
        return {key: _replaced(item, is_mapped) for key, item in value.items()}
    return _replaced(value, is_mapped)


def _is_taken_apart(value: dict[Any, Any]) -> bool:
    """Return whether Dask serializes the items of a dict one by one. If not, it would pickle our replacements, too."""
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
        # Checked before pickling: a value without dates or mapped columns is pickled only once, by Dask.
        if not any(_has_dates(column) or _is_whole_and_mapped(column, is_mapped) for column in _columns(value)):
            return value
        pickler = _Pickler(file, is_mapped, buffers.append)
        pickler.dump(value)
    except Exception:
        return value
    # Dask uses cloudpickle for objects that are defined in __main__.
    if b"__main__" in file.getvalue():
        return value
    return _serialized(file.getvalue(), buffers, pickler.dates)


def _columns(value: Any) -> list[Any]:
    """Return the arrays of a pandas object, including those of its index."""
    import pandas

    manager = getattr(value, "_mgr", None)
    if manager is not None:
        return [*manager.arrays, *_columns(value.index)]
    indexes = value.levels if isinstance(value, pandas.MultiIndex) else [value]
    # A RangeIndex would make an array, and keep it; even `hasattr` makes it.
    return [one._values for one in indexes if not isinstance(one, pandas.RangeIndex) and hasattr(one, "_values")]


def _has_dates(column: Any) -> bool:
    return getattr(column.dtype, "kind", "") in ("M", "m") and column.nbytes > SMALL


def _is_whole_and_mapped(column: Any, is_mapped: IsMapped) -> bool:
    import pandas

    if "pyarrow" not in sys.modules or not isinstance(column, pandas.arrays.ArrowExtensionArray):
        return False
    chunks = column._pa_array.chunks
    return len(chunks) == 1 and _are_mapped(chunks, is_mapped)


class _Pickler(pickle.Pickler):
    """Pickles pandas objects: mapped Arrow columns as their one chunk, and dates as integers.

    Attributes
    ----------
    dates
        Addresses of the buffers of dates. These are always sent as writeable: an array in a pickle stream, as NumPy
        would have sent the dates, is rebuilt as writeable.
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
        # typeshed does not know `copyreg.__newobj__`, to which pickle itself refers.
        return copyreg.__newobj__, (type(item),), {**item.__dict__, "_pa_array": item._pa_array.chunks[0], "_cache": {}}  # type: ignore[attr-defined]

    def _dates(self, array: npt.NDArray[Any]) -> Any:
        integers = array.view(np.int64)
        if not (integers.flags.c_contiguous or integers.flags.f_contiguous):
            integers = integers.copy()
        self.dates.add(integers.ctypes.data)
        return np.ndarray.view, (integers, array.dtype)


def _are_mapped(arrays: list[Any], is_mapped: IsMapped) -> bool:
    """Return whether there are buffers of more than 1 KiB and all of them are mapped; smaller ones do not matter."""
    buffers = [buffer for array in arrays for buffer in array.buffers() if buffer and buffer.size > SMALL]
    return bool(buffers) and all(is_mapped(buffer.address, buffer.size) for buffer in buffers)


def _serialized(
    stream: bytes, buffers: list[pickle.PickleBuffer], writeable: Container[int] = frozenset()
) -> Serialized:
    frames = [buffer.raw() for buffer in buffers]
    flags = tuple(not frame.readonly or address_of(frame) in writeable for frame in frames)
    header = {"serializer": "pickle", "writeable": flags}
    return Serialized(header, [stream, *frames])
