"""Peer-to-peer shuffles and rechunks, with the plugin and with stock Dask: processor time, time, and memory.

    pip install -e '.[benchmark]'
    python benchmarks/shuffles.py [--quick] [--pairs 7] [--only NAME ...] [--json PATH]

Each round has a fresh cluster, which first does the same work twice with hardly any data: once so that all workers have
loaded their modules, and once to measure what Dask takes for the tasks themselves, "own". The input is made before, and held
until the end, so input and result are both in memory. Then 2 GiB are written and freed. Under a virtual machine, the host may
have to make pages that the machine uses for the first time, or has not used for seconds; that takes up to 13 times as long as
to clear them, and is charged to whichever cluster meets them.

rechunk-2MiB, rechunk-512KiB, rechunk-32KiB
    An array changes from rows to columns, in shards of that size.
shuffle
    A DataFrame with a column of texts is shuffled by a key.
set-index
    The same is sorted by a column, with known divisions.
merge
    Two DataFrames are joined by a key.
...-memory
    The same without Dask's files (``distributed.p2p.storage.disk``).

"cpu" is the processor time of all workers; an idle worker takes some, too, so a slow machine makes the ratios worse. "net" is
that without "own". "peak" is the highest growth of ``Shmem`` of the machine and of the private memory of the client and all
workers together, read every 20 ms. The ratios are those with the plugin over those without it: medians of all pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import machine
import numpy as np
import pairs
import pandas as pd
import report
from clusters import Site
from distributed import Client, wait
from pairs import ARMS, SPEC, Pair, Round, Work
from remote import remote

#: Dask merges chunks that are smaller than ``array.chunk-size`` before it rechunks them; here, they are as they are named.
P2P = {"dataframe.shuffle.method": "p2p", "array.rechunk.method": "p2p", "array.chunk-size": "1 B"}
FIGURES = ("cpu", "net", "seconds", "together")
KEYS = 1 << 22
TINY = {"side": 256, "rows": 64}
"""Sizes of hardly any data, in as many chunks or partitions."""
TARGETS = {"rechunk": 0.5, "shuffle": 0.75, "merge": 0.8}
"""The highest wanted ratios of processor time."""


def array(client: Client, seed: int, disk: bool, side: int, chunks: int) -> da.Array:
    """Make a square array of small integers on the workers, in chunks of rows."""
    size = {"size": (side, side), "chunks": (side // chunks, side)}
    return da.random.default_rng(seed).integers(0, 1000, dtype=np.int64, **size)


def rechunk(x: da.Array) -> da.Array:
    """Change from rows to columns."""
    return x.rechunk((x.shape[0], x.chunksize[0]))


def column_sums(x: da.Array) -> list[int]:
    """Return sums that depend on the place of every element."""
    weights = np.arange(1, x.shape[0] + 1)[:, np.newaxis]
    return (x * weights).sum(axis=0).compute().tolist()


def part(number: int, seed: int, rows: int, texts: bool) -> pd.DataFrame:
    """Return random rows of integers, so that the order of additions does not matter; and a column of texts."""
    random = np.random.default_rng((seed, number))
    columns = {"key": random.integers(0, KEYS, rows), **{name: random.integers(0, 1000, rows) for name in "abcdef"}}
    if texts:
        columns["text"] = pd.Series(random.integers(0, 10**9, rows)).astype("string[pyarrow]")
    return pd.DataFrame(columns)


def frame(client: Client, seed: int, disk: bool, rows: int, partitions: int, texts: bool = True) -> Any:
    """Make a DataFrame on the workers."""
    meta = part(0, 0, 0, texts)
    return dd.from_map(part, range(partitions), seed=seed, rows=rows // partitions, texts=texts, meta=meta)


def two_frames(client: Client, seed: int, disk: bool, rows: int, partitions: int) -> tuple[Any, Any]:
    """Make two DataFrames on the workers."""
    return tuple(frame(client, 2 * seed + n, disk, rows, partitions, texts=False) for n in range(2))


def shuffle(x: Any) -> Any:
    """Shuffle by the key."""
    return x.shuffle("key")


def set_index(x: Any) -> Any:
    """Sort by the key."""
    return x.set_index("key", divisions=np.linspace(0, KEYS, x.npartitions + 1).astype(int).tolist())


def merge(prepared: tuple[Any, Any]) -> Any:
    """Join by the key."""
    return prepared[0].merge(prepared[1], on="key")


def signature(rows: pd.DataFrame) -> pd.DataFrame:
    """Return sums of a partition that do not depend on the order of its rows."""
    numbers = rows.reset_index().select_dtypes("number")
    return pd.DataFrame({"rows": [len(rows)], "sum": [int((numbers.sum(axis=1) ** 2).sum())]})


def signatures(x: Any) -> list[list[int]]:
    """Return the signatures of all partitions."""
    return x.map_partitions(signature, meta=signature(x._meta)).compute().to_numpy().tolist()


def measured(cluster: pairs.Arm, work: Work, seed: int) -> tuple[Round, Any]:
    """Do a piece of work, and return its figures and its answer, which is not measured."""
    site: Site = cluster._site
    own = [tasks_alone(site, work) for _ in range(2)][-1]
    private, shared = machine.private(site.processes), machine.shared()
    move, check = work.do
    with dask.config.set({**P2P, "distributed.p2p.storage.disk": work.sizes["disk"]}):
        prepared = dask.persist(work.prepare(site.client, seed, **work.sizes))[0]
        wait(prepared)
        machine.touch_memory()
        watch = machine.Watch(
            lambda: (machine.shared() - shared, machine.private(site.processes) - private), pairs.EVERY
        )
        before = site.processor_time()
        result = move(prepared).persist()
        wait(result)
        spent = site.processor_time() - before
    looks = watch.stop()
    figures = {"cpu": spent, "own": own, "net": spent - own}
    figures |= {"seconds": looks[-1, 0] - looks[0, 0], "together": looks[:, 1:].sum(axis=1).max()}
    return {name: float(value) for name, value in figures.items()}, check(result)


def tasks_alone(site: Site, work: Work) -> float:
    """Do the same tasks with hardly any data, and return the processor time that they take."""
    sizes = {name: TINY.get(name, size) for name, size in work.sizes.items()}
    with dask.config.set({**P2P, "distributed.p2p.storage.disk": work.sizes["disk"]}):
        prepared = dask.persist(work.prepare(site.client, 0, **sizes))[0]
        wait(prepared)
        before = site.processor_time()
        result = work.do[0](prepared).persist()
        wait(result)
        spent = site.processor_time() - before
    del prepared, result
    site.settle(blocks_too=True)
    return spent


def both_ways(name: str, do: Any, prepare: Callable[..., Any], **sizes: tuple[Any, Any]) -> list[tuple[Work, Work]]:
    """Return a work with Dask's files and one without, each of the usual size and a quick one."""
    return [
        pairs.work(name + suffix, do, prepare, disk=(disk, disk), **sizes)
        for suffix, disk in (("", True), ("-memory", False))
    ]


PARTITIONS = {"partitions": (32, 8)}
WORKS = (
    *both_ways("rechunk-2MiB", (rechunk, column_sums), array, side=(8192, 1024), chunks=(16, 8)),
    *both_ways("rechunk-512KiB", (rechunk, column_sums), array, side=(8192, 1024), chunks=(32, 8)),
    *both_ways("rechunk-32KiB", (rechunk, column_sums), array, side=(8192, 1024), chunks=(128, 16)),
    *both_ways("shuffle", (shuffle, signatures), frame, rows=(8_000_000, 20_000), **PARTITIONS),
    *both_ways("set-index", (set_index, signatures), frame, rows=(8_000_000, 20_000), **PARTITIONS),
    *both_ways("merge", (merge, signatures), two_frames, rows=(4_000_000, 20_000), **PARTITIONS),
)


def one_round(arm: str, work: Work, seed: int) -> tuple[Round, Any]:
    """Measure a piece of work in a fresh cluster."""
    with remote(pairs.arm, SPEC._replace(with_plugin=arm == "plugin"), False) as cluster:
        return cluster.ask(measured, work, seed)


def compared(done: list[Pair]) -> dict[str, Any]:
    """Return the medians, and the ratios within pairs."""
    return {**pairs.medians(done), **{f"{f}_over": report.spread(pairs.ratios(done, *ARMS[::-1], f)) for f in FIGURES}}


def main() -> None:
    """Read the arguments, measure, print."""
    asked, chosen = pairs.arguments(__doc__, WORKS, 7)
    sizes = {work.name: work.sizes for work in chosen}
    result = report.head(asked, "distributed", "numpy", "pandas", pairs=asked.pairs, sizes=sizes, summary={})
    rows = []
    for each in chosen:
        one = compared([pairs.both(number, each, one_round) for number in range(asked.pairs)])
        result["summary"][each.name] = one
        medians = [f"{one[arm]['cpu']['median']:.2f}" for arm in ARMS]
        medians += [report.mib(one[arm]["together"]["median"]) for arm in ARMS]
        target = TARGETS.get(each.name.partition("-")[0], "")
        rows.append([each.name, *medians, *(f"{one[f'{f}_over']['median']:.2f}" for f in FIGURES), str(target)])
        print(*rows[-1], sep=", ", file=sys.stderr)
    report.write(asked.json, result)
    head = [
        "medians",
        "stock cpu, s",
        "plugin cpu, s",
        "stock, MiB",
        "plugin, MiB",
        "cpu",
        "net",
        "time",
        "peak",
        "cpu target",
    ]
    report.table(head, rows)


if __name__ == "__main__":
    main()
