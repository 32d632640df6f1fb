"""Descriptions of values as plain data, which can be compared across processes.

`describe` returns all properties of a value that a user could notice, recursively: type, content, dtype, shape,
strides and flags. Two values are the same for these tests if their descriptions are equal. A description does not
depend on addresses or on the process.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import hashlib
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import sparse

Description = dict[str, Any]

#: A list of more plain scalars than this is described by a hash.
LONG = 64

SCALARS = (type(None), bool, int, float, complex, str, np.generic, pd.Timestamp, pd.Timedelta)


def assert_same(actual: Any, expected: Any) -> None:
    """Fail and list the differences, unless a user could not tell the two values apart."""
    assert_descriptions_equal(describe(actual), describe(expected))


def assert_descriptions_equal(actual: Any, expected: Any) -> None:
    """Fail and list the differences, unless two descriptions are equal."""
    found = list(differences(actual, expected))
    assert not found, "\n".join(["the values differ:", *found[:20]])


def differences(actual: Any, expected: Any, path: str = "value") -> Iterator[str]:
    """Yield one line for each place where two descriptions differ."""
    if isinstance(actual, dict) and isinstance(expected, dict):
        for key in [*expected, *(k for k in actual if k not in expected)]:
            if key not in actual or key not in expected:
                yield f"{path}.{key}: only in the {'expected' if key in expected else 'actual'} value"
            else:
                yield from differences(actual[key], expected[key], f"{path}.{key}")
    elif isinstance(actual, list) and isinstance(expected, list) and len(actual) == len(expected):
        for number, pair in enumerate(zip(actual, expected, strict=True)):
            yield from differences(*pair, f"{path}[{number}]")
    elif actual != expected:
        yield f"{path}: {actual!r}, expected {expected!r}"


def digest(content: bytes) -> str:
    """Return a short hash of some bytes."""
    return hashlib.sha256(content).hexdigest()[:20]


def type_name(value: Any) -> str:
    """Return the full name of a value's type."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


@functools.singledispatch
def describe(value: Any) -> Any:
    """Return all properties of a value that a user could notice, as plain data."""
    if isinstance(value, SCALARS):
        text = hex(value) if isinstance(value, int) else repr(value)  # Python refuses to write long integers in decimal
        return f"{type_name(value)} {text if len(text) < LONG else digest(text.encode())}"
    if isinstance(value, types.FunctionType):
        return describe_function(value)
    if sparse.issparse(value):
        return describe_sparse(value)
    if isinstance(value, pd.api.extensions.ExtensionArray):
        return describe_extension(value)
    return describe_instance(value)


def describe_instance(value: Any) -> Description:
    """Describe an object by its type and its attributes, which may be in a ``__dict__`` or in slots."""
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    state = {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})
    return {"type": type_name(value), "state": {name: describe(state[name]) for name in sorted(state)}}


def describe_function(value: types.FunctionType) -> Description:
    """Describe a function by its code, its defaults and its closure."""
    return {
        "type": type_name(value),
        "name": value.__qualname__,
        "code": digest(value.__code__.co_code),
        "defaults": describe(value.__defaults__),
        "closure": [describe(cell.cell_contents) for cell in value.__closure__ or ()],
    }


@describe.register
def _(value: functools.partial) -> Description:  # type: ignore[type-arg]
    return {
        "type": type_name(value),
        "func": describe(value.func),
        "args": describe(value.args),
        "keywords": describe(value.keywords),
    }


# ------------------------------------------------------------------------------------------------------- builtins


@describe.register(bytes)
@describe.register(bytearray)
def _(value: bytes | bytearray) -> Description:
    return {"type": type_name(value), "size": len(value), "content": digest(bytes(value))}


@describe.register
def _(value: memoryview) -> Description:
    layout = {name: getattr(value, name) for name in ("format", "shape", "strides", "readonly", "c_contiguous")}
    return {"type": type_name(value), **layout, "content": digest(value.tobytes())}


@describe.register
def _(value: array.array) -> Description:  # type: ignore[type-arg]
    return {"type": type_name(value), "typecode": value.typecode, "content": digest(value.tobytes())}


@describe.register(list)
@describe.register(tuple)
def _(value: Sequence[Any]) -> Description:
    items = describe_items(value)
    return {
        "type": type_name(value),
        "size": len(value),
        "items": items,
        "aliases": aliases(value),
        **attributes(value),
    }


@describe.register(set)
@describe.register(frozenset)
def _(value: Set[Any]) -> Description:
    return {"type": type_name(value), "size": len(value), "items": describe(sorted(value, key=repr))}


@describe.register(dict)
def _(value: Mapping[Any, Any]) -> Description:
    return {
        "type": type_name(value),
        "keys": describe_items(list(value)),
        "values": describe_items(list(value.values())),
        "aliases": aliases(list(value.values())),
        **attributes(value),
    }


def describe_items(items: Sequence[Any]) -> Any:
    """Describe each item, or return one hash if there are many."""
    if len(items) > LONG and all(isinstance(item, (bool, int, float, str)) for item in items):
        return digest(repr([(type(item).__name__, item) for item in items]).encode())
    described = [describe(item) for item in items]
    return described if len(items) <= LONG else digest(repr(described).encode())


def aliases(items: Sequence[Any]) -> list[str]:
    """List the pairs of arrays in a container that are one object, or that overlap in memory."""
    arrays = [(place, item) for place, item in enumerate(items) if isinstance(item, (np.ndarray, bytearray))]
    found = []
    for (i, a), (j, b) in combinations(arrays[:LONG], 2):
        if a is b:
            found.append(f"{i} is {j}")
        elif isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.may_share_memory(a, b):
            found.append(f"{i} overlaps {j}")
    return found


def attributes(value: Any) -> Description:
    """Describe the additional attributes of an instance of a subclass, if there are any."""
    if dataclasses.is_dataclass(value) or not getattr(value, "__dict__", None):
        return {}
    return {"attributes": {name: describe(item) for name, item in sorted(vars(value).items())}}


# ---------------------------------------------------------------------------------------------------------- NumPy


@describe.register
def _(value: np.ndarray) -> Description:
    if value.dtype.names:
        content: Any = {name: describe(value[name]) for name in value.dtype.names}  # padding is not content
    elif value.dtype.hasobject or value.dtype.char in "TgG":  # nor are padding bits and string headers
        content = describe_items(value.ravel().tolist())
    else:
        content = digest(np.ascontiguousarray(value).tobytes())
    return {
        "type": type_name(value),
        "dtype": repr(value.dtype),
        "aligned_struct": value.dtype.isalignedstruct,
        "shape": value.shape,
        "strides": value.strides,
        "c_order": value.flags.c_contiguous,
        "f_order": value.flags.f_contiguous,
        "writeable": value.flags.writeable,
        "content": content,
        **attributes(value),
    }


@describe.register
def _(value: np.ma.core.MaskedConstant) -> str:
    return f"{type_name(value)} {value is np.ma.masked}"


@describe.register
def _(value: np.ma.MaskedArray) -> Description:  # type: ignore[type-arg]
    return {
        "type": type_name(value),
        "data": describe(value.data),
        "mask": describe(value.mask),
        "fill_value": describe(value.fill_value),
        "hard": value.hardmask,
    }


# --------------------------------------------------------------------------------------------------------- pandas


@describe.register
def _(value: pd.DataFrame) -> Description:
    return {
        "type": type_name(value),
        "columns": describe(value.columns),
        "index": describe(value.index),
        "dtypes": [repr(dtype) for dtype in value.dtypes],
        "blocks": describe_blocks(value),
        "attrs": describe(value.attrs),
        "duplicate_labels": value.flags.allows_duplicate_labels,
    }


@describe.register
def _(value: pd.Series) -> Description:
    return {
        "type": type_name(value),
        "name": describe(value.name),
        "index": describe(value.index),
        "blocks": describe_blocks(value),
        "attrs": describe(value.attrs),
    }


def describe_blocks(value: Any) -> list[Any]:
    """Describe the arrays inside a DataFrame or Series: their order and flags determine the effect of a write."""
    return [
        [block.mgr_locs.as_array.tolist() if value.ndim == 2 else "all", describe(block.values)]
        for block in value._mgr.blocks
    ]


@describe.register
def _(value: pd.Index) -> Description:
    described: Description = {"type": type_name(value), "names": describe(list(value.names)), "size": len(value)}
    if isinstance(value, pd.MultiIndex):
        described |= {"levels": [describe(level) for level in value.levels]}
        described |= {"codes": [describe(np.asarray(codes)) for codes in value.codes]}
    elif isinstance(value, pd.RangeIndex):
        described |= {"range": [value.start, value.stop, value.step]}
    else:
        described |= {"freq": repr(getattr(value, "freq", None)), "values": describe(value._values)}
    return described


def describe_extension(value: Any) -> Description:
    """Describe an extension array of pandas, with the NumPy or Arrow arrays that it wraps."""
    wrapped = ("_ndarray", "_data", "_mask", "_pa_array", "_codes")
    inside = {name: getattr(value, name) for name in wrapped if hasattr(value, name)}
    return {
        "type": type_name(value),
        "dtype": repr(value.dtype),
        "categories": describe(value.categories) if isinstance(value, pd.Categorical) else None,
        "content": None if inside else digest(repr(value.tolist()).encode()),
        "inside": {name: describe(item) for name, item in inside.items()},
    }


# ---------------------------------------------------------------------------------------------------------- Arrow


@describe.register(pa.Array)
def _(value: pa.Array) -> Description:
    return {
        "type": type_name(value),
        "arrow": str(value.type),
        "size": len(value),
        "offset": value.offset,
        "nulls": value.null_count,
        "content": digest(repr(value.to_pylist()).encode()),
    }


@describe.register(pa.ChunkedArray)
def _(value: pa.ChunkedArray) -> Description:
    return {"type": type_name(value), "arrow": str(value.type), "chunks": [describe(chunk) for chunk in value.chunks]}


@describe.register(pa.Table)
@describe.register(pa.RecordBatch)
def _(value: pa.Table | pa.RecordBatch) -> Description:
    return {
        "type": type_name(value),
        "schema": str(value.schema),
        "metadata": describe(value.schema.metadata),
        "rows": value.num_rows,
        "columns": [describe(column) for column in value.columns],
    }


@describe.register
def _(value: pa.Buffer) -> Description:
    return {"type": type_name(value), "size": value.size, "content": digest(value.to_pybytes())}


# ---------------------------------------------------------------------------------------------------------- SciPy


@describe.register(sparse.dok_matrix)  # a subclass of dict
def describe_sparse(value: Any) -> Description:
    """Describe a sparse matrix or array by the arrays that it consists of."""
    names = ("data", "indices", "indptr", "row", "col", "coords", "offsets", "rows")
    parts = {name: describe(getattr(value, name)) for name in names if hasattr(value, name)}
    if value.format == "dok":
        parts = {"items": digest(repr([(k, v) for k, v in value.items()]).encode())}
    return {"type": type_name(value), "shape": value.shape, "dtype": repr(value.dtype), "parts": parts}
