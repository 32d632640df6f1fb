"""Which types of values end as one physical copy: the private memory that each takes, with births and without.

    pip install -e '.[benchmark]'
    python benchmarks/types_of_values.py [--quick] [--only NAME ...] [--json PATH]

One worker makes a value, and two others use it and keep it. Once everything is settled, "maker" is the growth of that
worker's own memory, and "reader" that of the worse one of the others: anonymous memory (``RssAnon``) and drafts, in
multiples of the value. So 0 is a value that lies in the arena only, and 1 a private copy. The memory of temporary objects
may show, too. Values whose libraries are not installed are left out
(``pip install sparse geopandas polars`` for those that the benchmarks need for nothing else).
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import gc
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import clusters
import machine
import numpy as np
import report
from clusters import Site, Spec
from machine import MIB
from remote import remote

SPECS = {name: Spec(workers=3, capacity="2 GiB", born=name) for name in ("off", "on")}


class Named(NamedTuple):
    """A named tuple."""

    x: np.ndarray
    name: str


@dataclasses.dataclass
class Data:
    """A dataclass."""

    x: np.ndarray


class Plain:
    """An object of a user's class."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x


class Sub(np.ndarray):
    """A subclass of an array."""


def doubles(n: int) -> np.ndarray:
    """Return ``n`` random doubles."""
    return np.random.default_rng(0).random(n)


def texts(n: int) -> list[str]:
    """Return ``n`` texts of ten digits."""
    return [f"{number:010d}" for number in range(n)]


def frame(n: int, **more: Any) -> Any:
    """Return a frame of four columns."""
    import pandas as pd

    return pd.DataFrame(doubles(n).reshape(-1, 4), columns=list("abcd"), copy=False, **more)


def pandas(make: Callable[[Any, int], Any]) -> Callable[[int], Any]:
    """Return a maker that is given pandas."""
    return lambda n: make(__import__("pandas"), n)


def arrow(make: Callable[[Any, int], Any]) -> Callable[[int], Any]:
    """Return a maker that is given pyarrow."""
    return lambda n: make(__import__("pyarrow"), n)


def sparse(kind: str) -> Callable[[int], Any]:
    """Return a maker of one of SciPy's sparse arrays."""

    def make(n: int) -> Any:
        from scipy import sparse

        return getattr(sparse.csr_array(doubles(n).reshape(-1, 256)), f"to{kind}")()

    return make


def fitted(name: str, rows: int = 32) -> Callable[[int], Any]:
    """Return a maker of a fitted estimator of scikit-learn."""

    def make(n: int) -> Any:
        from sklearn import decomposition, ensemble, linear_model, neighbors, pipeline, preprocessing

        x = doubles(n).reshape(-1, rows)
        y = (x[:, 0] > 0.5).astype(int)
        return {
            "neighbors": lambda: neighbors.KNeighborsClassifier(algorithm="brute").fit(x, y),
            "tree": lambda: neighbors.KDTree(x[:, :3].copy()),
            "ridge": lambda: linear_model.Ridge().fit(x.T, np.eye(rows)),
            "pipeline": lambda: pipeline.make_pipeline(
                preprocessing.StandardScaler(), neighbors.KNeighborsClassifier(algorithm="brute")
            ).fit(x, y),
            "pca": lambda: decomposition.PCA(2).fit(x.T),
            "forest": lambda: ensemble.RandomForestClassifier(max(1, n // 20_000), random_state=0).fit(
                x[:20_000], y[:20_000]
            ),
        }[name]()

    return make


def geometries(n: int) -> Any:
    """Return points, which are objects of a C library."""
    import geopandas

    return geopandas.GeoSeries(geopandas.points_from_xy(doubles(n // 16), doubles(n // 16)))


def xarray(kind: str) -> Callable[[int], Any]:
    """Return a maker of one of xarray's values."""

    def make(n: int) -> Any:
        import xarray

        array = xarray.DataArray(doubles(n).reshape(-1, 64), dims=("x", "y"), name="v")
        return {"DataArray": array, "Dataset": array.to_dataset(), "Variable": array.variable}[kind]

    return make


VALUES: dict[str, Callable[[int], Any]] = {
    "ndarray": doubles,
    "ndarray, Fortran order": lambda n: np.asfortranarray(doubles(n).reshape(-1, 64)),
    "ndarray, reversed": lambda n: doubles(n)[::-1],
    "ndarray, every other": lambda n: doubles(2 * n)[::2],
    "ndarray, read-only": lambda n: (x := doubles(n), x.setflags(write=False))[0],
    "ndarray of zeros": np.zeros,
    "ndarray of complex": lambda n: doubles(n).view(complex),
    "ndarray of dates": lambda n: np.arange(n).view("M8[ns]"),
    "ndarray of records": lambda n: doubles(n).view([("x", "f8"), ("y", "f8")]),
    "ndarray of texts": lambda n: np.array(texts(n // 5)),
    "ndarray of objects": lambda n: np.array(texts(n // 8), object),
    "ndarray over bytes": lambda n: np.frombuffer(doubles(n).tobytes()),
    "np.matrix": lambda n: np.asmatrix(doubles(n).reshape(-1, 64)),
    "np.recarray": lambda n: np.rec.array(doubles(n).view([("x", "f8"), ("y", "f8")])),
    "masked array": lambda n: np.ma.array(x := doubles(n), mask=x < 0.1),
    "subclass of ndarray": lambda n: doubles(n).view(Sub),
    "list of arrays": lambda n: [doubles(n // 4) for _ in range(4)],
    "tuple of arrays": lambda n: tuple(doubles(n // 4) for _ in range(4)),
    "dict of arrays": lambda n: {key: doubles(n // 4) for key in "abcd"},
    "OrderedDict of arrays": lambda n: collections.OrderedDict((key, doubles(n // 4)) for key in "abcd"),
    "one array twice in a list": lambda n: [x := doubles(n), x],
    "array beside its view": lambda n: (x := doubles(n), x[n // 2 :]),
    "named tuple": lambda n: Named(doubles(n), "x"),
    "dataclass": lambda n: Data(doubles(n)),
    "object of a user's class": lambda n: Plain(doubles(n)),
    "deque of arrays": lambda n: collections.deque([doubles(n)]),
    "bytes": lambda n: doubles(n).tobytes(),
    "bytearray": lambda n: bytearray(doubles(n).tobytes()),
    "memoryview": lambda n: memoryview(doubles(n)),
    "str": lambda n: doubles(n // 2).tobytes().hex(),
    "pd.DataFrame of floats": frame,
    "pd.DataFrame, mixed": pandas(lambda pd, n: pd.DataFrame({"x": doubles(n // 2), "i": np.arange(n // 2)})),
    "pd.DataFrame with dates": pandas(lambda pd, n: frame(n, index=pd.date_range("2026", periods=n // 4, freq="s"))),
    "pd.DataFrame with a MultiIndex": pandas(
        lambda pd, n: frame(n, index=pd.MultiIndex.from_arrays([np.arange(n // 4) // 9, np.arange(n // 4) % 9]))
    ),
    "pd.DataFrame of str": pandas(lambda pd, n: pd.DataFrame({"s": texts(n // 2)})),
    "pd.DataFrame of objects": pandas(lambda pd, n: pd.DataFrame({"s": pd.Series(texts(n // 8), dtype=object)})),
    "pd.DataFrame of nullable": pandas(lambda pd, n: pd.DataFrame({"x": pd.array(np.arange(n), dtype="Int64")})),
    "pd.Series": pandas(lambda pd, n: pd.Series(doubles(n), copy=False)),
    "pd.Series with a time zone": pandas(lambda pd, n: pd.Series(np.arange(n).view("M8[ns]")).dt.tz_localize("UTC")),
    "pd.Series of Arrow's floats": pandas(lambda pd, n: pd.Series(doubles(n), dtype="float64[pyarrow]")),
    "pd.Index": pandas(lambda pd, n: pd.Index(doubles(n), copy=False)),
    "pd.DatetimeIndex": pandas(lambda pd, n: pd.DatetimeIndex(np.arange(n).view("M8[ns]"))),
    "pd.MultiIndex": pandas(lambda pd, n: pd.MultiIndex.from_arrays([np.arange(n // 2), np.arange(n // 2)[::-1]])),
    "pd.IntervalIndex": pandas(lambda pd, n: pd.IntervalIndex.from_breaks(np.arange(n // 2))),
    "pd.Categorical": pandas(lambda pd, n: pd.Categorical.from_codes(np.arange(n) % 999, categories=range(999))),
    "pd.arrays.SparseArray": pandas(lambda pd, n: pd.arrays.SparseArray(doubles(n))),
    "pa.Array": arrow(lambda pa, n: pa.array(doubles(n))),
    "pa.Table": arrow(lambda pa, n: pa.table({"x": doubles(n // 2), "y": doubles(n // 2)})),
    "pa.Table of texts": arrow(lambda pa, n: pa.table({"s": texts(n // 2)})),
    "pa.RecordBatch": arrow(lambda pa, n: pa.record_batch({"x": doubles(n)})),
    "scipy csr_array": sparse("csr"),
    "scipy csc_array": sparse("csc"),
    "scipy coo_array": sparse("coo"),
    "scipy bsr_array": sparse("bsr"),
    "sparse COO": lambda n: __import__("sparse").COO.from_numpy(np.where((x := doubles(n // 2)) < 0.9, x, 0)),
    "geopandas GeoSeries": geometries,
    "polars DataFrame": lambda n: __import__("polars").DataFrame({"x": doubles(n)}),
    "xarray DataArray": xarray("DataArray"),
    "xarray Dataset": xarray("Dataset"),
    "xarray Variable": xarray("Variable"),
    "sklearn KNeighborsClassifier": fitted("neighbors"),
    "sklearn KDTree": fitted("tree"),
    "sklearn Ridge": fitted("ridge"),
    "sklearn Pipeline": fitted("pipeline"),
    "sklearn PCA": fitted("pca"),
    "sklearn RandomForestClassifier": fitted("forest"),
}


def make(name: str, n: int) -> Any:
    """Make a value; earlier ones of the same sizes were dropped, so that its arrays are born."""
    for _ in range(2):
        VALUES[name](n)
        time.sleep(0.1)
    return VALUES[name](n)


def keep(value: Any) -> str:
    """Use a value."""
    return type(value).__name__


def own_memory() -> int:
    """Return the private memory and the drafts of this process."""
    from dask_shm_plugin.births import switch

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    figures = switch.figures()
    return machine.field("/proc/self/status", "RssAnon") + (0 if figures is None else figures.used)


def size_of(value: Any) -> int:
    """Return the bytes of a value when it is sent."""
    from distributed.protocol import serialize

    return sum(memoryview(frame).nbytes for frame in serialize(value)[1])


def measure(site: Site, name: str, n: int) -> tuple[float, float] | None:
    """Return what the maker and the worse reader take, in multiples of the value."""
    maker, *readers = site.workers
    client = site.client
    with contextlib.suppress(ImportError):
        size = client.submit(lambda: size_of(make(name, n)), workers=[maker], pure=False).result()
        for worker in site.workers:  # imports are not measured
            client.submit(lambda: keep(make(name, 4096)), workers=[worker], pure=False).result()
        site.settle(blocks_too=True)
        before = client.run(own_memory)
        future = site.client.submit(make, name, n, workers=[maker], pure=False)
        for reader in readers:
            site.read_on(reader, future, keep)
        time.sleep(1.5)
        after = client.run(own_memory)
        grown = {worker: (after[worker] - before[worker]) / size for worker in after}
        del future
        return grown[maker], max(grown[reader] for reader in readers)
    return None


def main() -> None:
    """Measure and print."""
    parser = report.parser(__doc__, list(VALUES))
    asked = parser.parse_args()
    result = report.head(asked, "numpy", "pandas", "pyarrow", "scipy", "scikit-learn", "xarray", types={})
    n = (1 if asked.quick else 16) * MIB // 8
    with contextlib.ExitStack() as stack:
        sites = {name: stack.enter_context(remote(clusters.site, spec)) for name, spec in SPECS.items()}
        rows = []
        for name in asked.only:
            found = {arm: site.ask(measure, name, n) for arm, site in sites.items()}
            if None in found.values():
                continue
            result["types"][name] = {
                arm: dict(zip(("maker", "reader"), pair, strict=True)) for arm, pair in found.items()
            }
            rows.append([name, *(f"{max(0, part):.1f}" for arm in found for part in found[arm])])
            print(*rows[-1], sep=" | ", flush=True)
    report.write(asked.json, result)
    report.table(["× value", "maker, off", "reader, off", "maker, on", "reader, on"], rows)


if __name__ == "__main__":
    main()
