"""A catalogue of all kinds of values that travel between the processes of a Dask cluster.

`make` builds a value of a kind, of about a given number of eight-byte elements, always with the same content. `LARGE`
elements exceed a threshold of 16 KiB, `SMALL` ones do not.
"""

from __future__ import annotations

import array
import functools
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from describing import assert_same as assert_same
from scipy import sparse
from user_classes import Bunch, Model, Pair, Quantity, Record, Slotted

LARGE = 4_096
SMALL = 16
SIZES = {"large": LARGE, "small": SMALL}

#: Name of a kind -> function of the number of elements.
KINDS: dict[str, Callable[[int], Any]] = {}

#: Kinds that always consist of buffers: a large value that arrives through the arena lies in the arena.
BUFFERS: set[str] = set()


def add_kind(build: Callable[[int], Any]) -> Callable[[int], Any]:
    """Add a function to the catalogue under its own name."""
    KINDS[build.__name__] = build
    return build


def add_kind_of_buffers(build: Callable[[int], Any]) -> Callable[[int], Any]:
    """Add a kind that always consists of buffers."""
    BUFFERS.add(build.__name__)
    return add_kind(build)


def make(name: str, size: int) -> Any:
    """Return a new value of a kind, of about ``size`` elements."""
    return KINDS[name](size)


def numbers(size: int, seed: int = 0) -> np.ndarray:
    """Return ``size`` random doubles, the same for the same seed."""
    return np.random.default_rng(seed).random(size)


def integers(size: int, below: int = 1000) -> np.ndarray:
    """Return ``size`` random integers."""
    return np.random.default_rng(1).integers(0, below, size)


def words(size: int) -> list[str]:
    """Return ``size`` short strings, most of them not ASCII and some of them empty."""
    return [f"wörd {n}" if n % 7 else "" for n in integers(size)]


def instance_of_local_class(size: int) -> Any:
    """Return an instance of a class that only cloudpickle can send."""

    class Local:
        def __init__(self) -> None:
            self.weights = numbers(size)
            self.name = "local"

    return Local()


# ------------------------------------------------------------------------------------------------------- builtins

KINDS |= {
    "model": Model,
    "slotted": Slotted,
    "record": lambda n: Record("key", numbers(n), ["a", "b"]),
    "local_class": instance_of_local_class,
    "closure": lambda n: (lambda data: lambda x: x + data)(numbers(n)),
    "partial": lambda n: functools.partial(np.add, numbers(n)),
    "bunch": lambda n: Bunch(data=numbers(n), target=1),
    "bytes": lambda n: numbers(n).tobytes(),
    "bytearray": lambda n: bytearray(numbers(n).tobytes()),
    "text": lambda n: "".join(words(n)),
    "memoryview": lambda n: memoryview(bytearray(numbers(n).tobytes())),
    "memoryview_read_only": lambda n: memoryview(numbers(n).tobytes()),
    "memoryview_of_doubles": lambda n: memoryview(numbers(n)),
    "array_array": lambda n: array.array("d", numbers(n).tolist()),
    "big_integer": lambda n: (1 << 64 * n) + 1,
    # Dask makes a frame of each element of these, so thousands of them would only take long
    "list_of_floats": lambda n: numbers(n // 8).tolist(),
    "list_of_texts": lambda n: words(n // 8),
    "set": lambda n: set(range(n // 8)),
    "frozenset": lambda n: frozenset(f"word {i}" for i in range(n)),
    "dict_of_integers": lambda n: {f"key {i}": i for i in range(n // 8)},
    "namedtuple": lambda n: Pair(numbers(n), "right"),
    "nothing": lambda n: None,
    "empty_containers": lambda n: [{}, [], (), set(), b"", "", np.empty(0)],
    # containers that mix large and small
    "list_of_arrays": lambda n: [numbers(n, seed) for seed in range(3)],
    "tuple_mixed": lambda n: (numbers(n), "name", 3, numbers(2), numbers(n).tobytes()),
    "dict_mixed": lambda n: {"big": numbers(n), ("a", 1): numbers(3), 7: None, "text": "t" * n},
    "dict_special_keys": lambda n: {HTTPStatus.OK: numbers(n), np.str_("a"): integers(n), np.float64(0.5): numbers(n)},
    "ordered_dict": lambda n: OrderedDict(b=numbers(n), a=integers(n)),
    "deep": lambda n: {"one": [{"two": ({"three": numbers(n)}, [numbers(n, 2)])}, 5]},
    "many_arrays": lambda n: [numbers(n // 8, seed) for seed in range(12)],
    "frames_and_arrays": lambda n: {"frame": pd.DataFrame({"x": numbers(n)}), "mask": numbers(n) > 0.5},
    "same_array_twice": lambda n: [(data := numbers(n)), data],
    "whole_and_half": lambda n: {"whole": (data := numbers(n)), "half": data[: n // 2], "other": data[n // 2 :]},
    "models": lambda n: [Model(n), Record("k", numbers(n), [])],
}

# ---------------------------------------------------------------------------------------------------------- NumPy


@add_kind_of_buffers
def structured(n: int) -> np.ndarray:
    values = np.zeros(n, dtype=[("x", "f8"), ("flag", "?"), ("name", "U3")])
    values["x"], values["flag"], values["name"] = numbers(n), integers(n) > 500, "abc"
    return values


@add_kind_of_buffers
def structured_aligned(n: int) -> np.ndarray:
    values = np.zeros(n, dtype=np.dtype([("a", "u1"), ("b", "f8"), ("c", "i2", (3,))], align=True))
    values["b"] = numbers(n)
    return values


@add_kind_of_buffers
def quantity(n: int) -> np.ndarray:
    values = numbers(n).view(Quantity)
    values.unit = "km"
    return values


@add_kind_of_buffers
def memory_mapped(n: int) -> np.ndarray:
    with tempfile.TemporaryFile() as file:
        values: np.ndarray = np.memmap(file, dtype="f8", shape=(n,))
    values[:] = numbers(n)
    return values


def datetimes(n: int) -> np.ndarray:
    values = np.datetime64("2026-01-01", "us") + integers(n, 10**9).astype("m8[us]")
    values[::5] = np.datetime64("NaT")
    return values


ARRAYS: dict[str, Callable[[int], Any]] = {
    "c_order": lambda n: numbers(n).reshape(4, -1),
    "fortran_order": lambda n: np.asfortranarray(numbers(n).reshape(4, -1)),
    "strided": lambda n: numbers(2 * n).reshape(8, -1)[::2, 1:],
    "transposed": lambda n: numbers(n).reshape(2, 4, -1).transpose(1, 2, 0),
    "negative_stride": lambda n: numbers(n)[::-1],
    "negative_strides": lambda n: numbers(n).reshape(8, -1)[::-1, ::-2],
    "column": lambda n: numbers(4 * n).reshape(-1, 4)[:, 1],
    "column_vector": lambda n: numbers(n)[:, None],
    "broadcast_rows": lambda n: np.broadcast_to(numbers(n), (3, n)),
    "broadcast_columns": lambda n: np.broadcast_to(numbers(n)[:, None], (n, 3)),
    "broadcast_fortran": lambda n: np.broadcast_to(np.asfortranarray(numbers(n).reshape(4, -1)), (2, 4, n // 4)),
    "datetimes": datetimes,
    "timedeltas": lambda n: integers(n).astype("m8[s]"),
    "booleans": lambda n: np.resize(integers(n) > 500, 8 * n),
    "float16": lambda n: np.resize(numbers(n), 4 * n).astype("f2"),
    "complex": lambda n: numbers(n) + 1j,
    "long_double": lambda n: numbers(n).astype("g"),
    "big_endian": lambda n: numbers(n).astype(">f8"),
    "unicode": lambda n: np.array(words(n), dtype="U12"),
    "byte_strings": lambda n: np.array([b"abc", b"de"] * n, dtype="S5"),
    "voids": lambda n: numbers(n).view("V8"),
    "not_a_number": lambda n: np.where(numbers(n) > 0.5, np.nan, -0.0),
    "read_only_fortran": lambda n: np.broadcast_to(np.asfortranarray(numbers(n).reshape(4, -1)), (4, n // 4)),
    "matrix": lambda n: np.asmatrix(numbers(n).reshape(4, -1)),
    "record_array": lambda n: structured(n).view(np.recarray),
    "read_only": lambda n: np.broadcast_to(numbers(n), n),
    "masked_hard": lambda n: np.ma.array(numbers(n), mask=numbers(n) < 0.5, hard_mask=True),
    "masked": lambda n: np.ma.masked_less(numbers(n).reshape(4, -1), 0.5),
    "masked_without_mask": lambda n: np.ma.array(numbers(n), fill_value=7.0),
    "masked_fortran": lambda n: np.ma.array(np.asfortranarray(numbers(n).reshape(4, -1)), mask=False),
}
KINDS |= ARRAYS
BUFFERS |= ARRAYS.keys()
KINDS |= {
    "zero_size": lambda n: np.empty((0, n), dtype="f4"),
    "zero_size_fortran": lambda n: np.empty((n, 0, 3), order="F"),
    "zero_dimensional": lambda n: np.array(float(n)),
    "zero_dimensional_wide": lambda n: np.array("x" * 2 * n),
    "objects": lambda n: np.array([str(x) for x in integers(n)] + [None], dtype=object),
    "objects_2d": lambda n: np.array([[x, str(x)] for x in integers(n).tolist()], dtype=object),
    "structured_objects": lambda n: np.array([(x, str(x)) for x in range(n // 2)], dtype=[("a", "i8"), ("b", "O")]),
    "masked_structured": lambda n: np.ma.array(structured(n), mask=False),
    "masked_constant": lambda n: np.ma.masked,
    "scalar": lambda n: np.float32(1.5),
}
IS_NUMPY_2 = np.lib.NumpyVersion(np.__version__) >= "2.0.0"
if IS_NUMPY_2:
    KINDS["variable_strings"] = lambda n: np.array(words(n), dtype=np.dtypes.StringDType())

# --------------------------------------------------------------------------------------------------------- pandas


def mixed_frame(n: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "float": numbers(n),
            "integer": integers(n),
            "flag": integers(n) > 500,
            "text": words(n),
            "object": pd.Series([None, 1, "x", 2.5] * (n // 4), dtype=object),
            "category": pd.Categorical(words(n)),
            "when": pd.to_datetime(integers(n), unit="s"),
            "zoned": pd.to_datetime(integers(n), unit="s").tz_localize("Europe/Berlin"),
            "nullable": pd.array([1, None, 3, 4] * (n // 4), dtype="Int64"),
            "span": pd.to_timedelta(integers(n), unit="s"),
        }
    )


def frame_of_datetimes(n: int) -> pd.DataFrame:
    zoned = pd.DatetimeIndex(datetimes(n), tz="UTC").tz_convert("America/Sao_Paulo")
    spans = pd.to_timedelta(integers(n), unit="s").as_unit("s")
    return pd.DataFrame({"when": datetimes(n), "zoned": zoned, "span": spans}, index=zoned.as_unit("ns"))


def multi_index(n: int) -> pd.MultiIndex:
    return pd.MultiIndex.from_product([["a", "b"], range(n // 2)], names=["letter", None])


def frame_with_attrs(n: int) -> pd.DataFrame:
    frame = pd.DataFrame({"x": numbers(n)}).set_flags(allows_duplicate_labels=False)
    frame.attrs["source"] = {"made": "here"}
    return frame


FRAMES: dict[str, Callable[[int], Any]] = {
    "frame": lambda n: pd.DataFrame(numbers(n).reshape(-1, 4), columns=list("abcd")),
    "frame_fortran": lambda n: pd.DataFrame(np.asfortranarray(numbers(n).reshape(-1, 4))),
    "frame_mixed": mixed_frame,
    "frame_of_rows": lambda n: pd.DataFrame(numbers(2 * n).reshape(-1, 4))[::2],
    "frame_multi_index": lambda n: pd.DataFrame({"x": numbers(n)}, index=multi_index(n)),
    "frame_multi_columns": lambda n: pd.DataFrame(numbers(n).reshape(-1, 8), columns=multi_index(8)),
    "frame_duplicated_columns": lambda n: pd.DataFrame(numbers(n).reshape(-1, 2), columns=["x", "x"]),
    "frame_with_attrs": frame_with_attrs,
    "frame_by_date": lambda n: pd.DataFrame({"x": numbers(n)}, index=pd.date_range("2026", periods=n, freq="s")),
    "frame_of_dates": frame_of_datetimes,
    "frame_of_one_unit": lambda n: pd.DataFrame(datetimes(n).reshape(-1, 4).astype("M8[ms]")),
    "dates": lambda n: pd.date_range("2026", periods=n, freq="h", tz="Europe/Vienna"),
    "series": lambda n: pd.Series(numbers(n), name="values"),
    "series_of_dates": lambda n: pd.Series(datetimes(n)),
}
KINDS |= FRAMES
BUFFERS |= FRAMES.keys() - {"frame_mixed"}  # its Python objects are in the pickle
if not IS_NUMPY_2:
    # NumPy 1 pickles an array in band if it is neither in C nor in Fortran order.
    BUFFERS.remove("frame_of_rows")
KINDS |= {
    "frame_texts": lambda n: pd.DataFrame({"a": pd.Series(words(n), dtype="string[pyarrow]"), "b": words(n)}),
    "frame_arrow": lambda n: pd.DataFrame({"x": numbers(n), "s": words(n)}).convert_dtypes(dtype_backend="pyarrow"),
    "frame_categories": lambda n: pd.DataFrame({"c": pd.Categorical(words(4 * n), ordered=True)}),
    "frame_objects": lambda n: pd.DataFrame(
        {"o": np.array([f"text {i}" for i in range(n - 1)] + [None], dtype=object)}
    ),
    "frame_empty": lambda n: pd.DataFrame({"x": numbers(n)}).iloc[:0],
    "series_texts": lambda n: pd.Series(words(n), name=("a", 1)),
    "series_of_column": lambda n: pd.DataFrame(numbers(4 * n).reshape(-1, 4))[2],
    "range_index": lambda n: pd.RangeIndex(3, n, 2, name="r"),
    "index": lambda n: pd.Index(integers(n), name="i"),
    "index_texts": lambda n: pd.Index(words(n)),
    "index_categories": lambda n: pd.CategoricalIndex(words(4 * n)),
    "index_dates": lambda n: pd.date_range("2026", periods=n, freq="h", tz="UTC"),
    "index_intervals": lambda n: pd.interval_range(0, n),
    "index_periods": lambda n: pd.period_range("2000", periods=min(n, 9999), freq="D"),
    "multi_index": lambda n: multi_index(4 * n),
    "categorical": lambda n: pd.Categorical(words(4 * n)),
    "nullable_integers": lambda n: pd.array([1, None] * n, dtype="Int32"),
}

# ------------------------------------------------------------------------------------------------- Arrow and SciPy


def table(n: int) -> pa.Table:
    columns = {"x": pa.array(numbers(n)), "s": pa.array(words(n)), "n": pa.array([None, 1] * (n // 2))}
    return pa.table(columns).replace_schema_metadata({"made": "here"})


def dense(n: int) -> np.ndarray:
    values = numbers(2 * n).reshape(-1, 8)
    return np.where(values > 0.5, values, 0.0)


def sparse_kind(cls: type, n: int) -> Any:
    if "dia" in cls.__name__:
        return cls((numbers(n).reshape(4, -1), [-1, 0, 2, 5]), shape=(n // 4, n // 4))
    return cls(dense(n // 4 if "dok" in cls.__name__ else n // 2))


ARROW: dict[str, Callable[[int], Any]] = {
    "table": table,
    "table_chunked": lambda n: pa.concat_tables([table(n), table(n // 2)]),
    "table_sliced": lambda n: table(2 * n)[n // 2 :],
    "table_from_pandas": lambda n: pa.Table.from_pandas(mixed_frame(n // 4).drop(columns=["object"])),
    "record_batch": lambda n: table(n).to_batches()[0],
}
KINDS |= ARROW
BUFFERS |= ARROW.keys()
KINDS |= {
    "table_dictionary": lambda n: pa.table({"d": pa.array(words(2 * n)).dictionary_encode()}),
    "table_nested": lambda n: pa.table({"l": [[1, i] for i in range(n // 2)], "s": [{"a": 1}, None] * (n // 4)}),
    "arrow_array": lambda n: pa.array(numbers(n)),
    "arrow_array_sliced": lambda n: pa.array(words(2 * n))[3:-5],
    "arrow_chunked_array": lambda n: pa.chunked_array([numbers(n), numbers(n // 2)]),
    "arrow_buffer": lambda n: pa.py_buffer(numbers(n).tobytes()),
}
for _format in ("csr", "csc", "coo", "dia", "bsr", "lil", "dok"):
    for _form in ("matrix", "array"):
        _name = f"{_format}_{_form}"
        KINDS[_name] = functools.partial(sparse_kind, getattr(sparse, _name))
        if _format in ("csr", "csc", "coo"):
            BUFFERS.add(_name)
