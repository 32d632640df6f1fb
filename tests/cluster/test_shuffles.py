"""Shuffles and rechunks through the arena give the results of stock Dask, and leave nothing behind."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from clusters import local_cluster
from distributed import Client, futures_of, wait
from distributed.shuffle._scheduler_plugin import ShuffleSchedulerPlugin
from observing import MIB, settle, totals, wait_until
from surroundings import sent

from dask_shm_plugin import SharedMemoryPlugin, stats, unregister
from dask_shm_plugin.births import switch as births

pytestmark = pytest.mark.slow

#: Dask merges chunks that are smaller than ``array.chunk-size`` before it rechunks them.
P2P = {"dataframe.shuffle.method": "p2p", "array.rechunk.method": "p2p", "array.chunk-size": "1 B"}
DTYPES = ["f8", "i2", "?", ">c16", "M8[ns]", "S3", "U2", "f4", [("a", "u1"), ("b", "f8")]]


@pytest.fixture(scope="module", autouse=True)
def peer_to_peer() -> Iterator[None]:
    """Use P2P, where small data would be moved by tasks."""
    with dask.config.set(P2P):
        yield


@pytest.fixture(scope="module")
def cluster(nothing_leaks: None) -> Iterator[Client]:
    """Yield a client of three workers that pack even the smallest shards, for the whole module."""
    with local_cluster(3) as client:
        client.run(pack_all)
        yield client


@pytest.fixture
def client(cluster: Client) -> Iterator[Client]:
    """Return the client, which is Dask's default, with an empty arena, and check that a test leaves it empty."""
    settle(cluster)
    with cluster.as_current():
        yield cluster
    assert_empty(cluster)


def assert_empty(client: Client) -> None:
    """Fail unless the arena empties, and no worker keeps shards or a reader of some.

    Dask's runs of shuffles, and their errors, are in reference cycles. An idle worker that had no failed task looks for
    these only when it is told to.
    """
    wait_until(lambda: is_empty(client), lambda: f"the arena empties: {stats(client)}", 60)
    wait_until(lambda: not any(client.run(kept_bytes).values()), "no shards are kept")


def is_empty(client: Client) -> bool:
    """Return whether nothing is in the arena; if something is, let the workers look for cycles."""
    if totals(client).used:
        client.run(gc.collect)
    return totals(client).used == 0


def kept_bytes(dask_worker: Any) -> int:
    """Return the bytes and readers of kept shards of a worker."""
    shuffles = dask_worker.plugins["dask-shm"].half._running._shuffles
    return sum(one._kept for one in shuffles._allowances.values()) + len(shuffles._readers)


def pack_all() -> None:
    """Let this worker put shards of any size into the arena."""
    from dask_shm_plugin.shuffling import sending

    sending._MIN_PARCEL_BYTES = 1


def shuffled(client: Client) -> int:
    """Return how many messages of shuffles the workers have sent through the arena."""
    return sum(arena["shuffled"]["count"] for arena in stats(client).values())


# ------------------------------------------------------------------------------------------------------- rechunks


def random_array(random: np.random.Generator, dtype: Any) -> np.ndarray:
    """Return an array of random shape and elements."""
    shape = tuple(random.integers(1, 40, random.integers(1, 4)).tolist())
    numbers = random.integers(0, 250, shape)
    if isinstance(dtype, list):
        return np.rec.fromarrays([numbers, numbers], dtype=dtype).view(np.dtype(dtype)).view(np.ndarray)
    return numbers.astype("u1").astype(dtype)


def random_chunks(random: np.random.Generator, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return random chunks of a shape."""
    chunks = []
    for side in shape:
        cuts = np.unique(random.integers(0, side + 1, random.integers(0, 5)))
        edges = [0, *(cut for cut in cuts.tolist() if 0 < cut < side), side]
        chunks.append(tuple(b - a for a, b in itertools.pairwise(edges)))
    return tuple(chunks)


@pytest.mark.parametrize("disk", [True, False])
@pytest.mark.parametrize("seed", range(9))
def test_a_rechunked_array_is_that_of_stock_dask(client: Client, stock: Client, seed: int, disk: bool) -> None:
    """Of any shape, type and chunks."""
    random = np.random.default_rng(seed)
    whole = random_array(random, DTYPES[seed])
    x = da.from_array(whole, random_chunks(random, whole.shape), name=f"x-{seed}-{disk}")
    with dask.config.set({"distributed.p2p.storage.disk": disk}):
        y = x.rechunk(random_chunks(random, whole.shape))
        got, expected = y.compute(scheduler=client), y.compute(scheduler=stock)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(got, whole)


@pytest.mark.parametrize("disk", [True, False])
def test_a_rechunk_goes_through_the_arena(client: Client, disk: bool) -> None:
    """The messages are counted, and nothing was refused."""
    before, refused = shuffled(client), sum(sent(client).values())
    whole = np.random.default_rng(1).random((600, 600))
    with dask.config.set({"distributed.p2p.storage.disk": disk}):
        y = da.from_array(whole, (100, 600), name=f"arena-{disk}").rechunk((600, 100)).persist()
        wait(y)
        assert client.submit(lambda block: block.flags.writeable, futures_of(y)[0]).result()
        np.testing.assert_array_equal(y.compute(), whole)
    assert shuffled(client) > before
    assert sum(sent(client).values()) == refused


@pytest.mark.parametrize("kind", ["objects", "masked"])
def test_arrays_that_are_not_plain_go_dasks_way(client: Client, kind: str) -> None:
    """Objects are pickled, and so they are copies; a mask stays."""
    before = shuffled(client)
    whole: Any = np.array([[{n} for n in range(12)] for _ in range(12)], object)
    if kind == "masked":
        whole = np.ma.masked_greater(np.arange(144.0).reshape(12, 12), 50)
    y = da.from_array(whole, (3, 12), name=kind, asarray=False).rechunk((12, 3)).compute()
    assert type(y) is type(whole)
    np.testing.assert_array_equal(y, whole)
    assert shuffled(client) == before


def test_several_rechunks_and_a_shuffle_at_once_do_not_mix(client: Client) -> None:
    """They share the limit of what is kept."""
    arrays = [np.random.default_rng(n).random((200, 200)) for n in range(4)]
    lazy = [da.from_array(x, (20, 200), name=f"at-once-{n}").rechunk((200, 20)) for n, x in enumerate(arrays)]
    frame = pd.DataFrame({"k": np.arange(2000) % 37, "v": np.arange(2000)})
    *got, rows = dask.compute(*lazy, dd.from_pandas(frame, npartitions=9).shuffle("k"))
    for x, y in zip(arrays, got, strict=True):
        np.testing.assert_array_equal(x, y)
    pd.testing.assert_frame_equal(rows.sort_index(), frame)


def test_what_is_kept_and_what_is_in_files_is_read_together(client: Client) -> None:
    """With a small limit, some outputs are put together in memory, and the others made from Dask's files."""
    limits = client.run(lambda dask_worker: set_limit(dask_worker, 400_000))
    try:
        whole = np.random.default_rng(2).random((512, 512))
        y = da.from_array(whole, (32, 512), name="joined").rechunk((512, 32)).compute()
        np.testing.assert_array_equal(y, whole)
    finally:
        client.run(lambda dask_worker: set_limit(dask_worker, limits[dask_worker.address]))


def set_limit(dask_worker: Any, limit: int) -> int:
    """Set a worker's limit of what waits to be written to files, and return the one before."""
    limiter = dask_worker.extensions["shuffle"].memory_limiter_disk
    before, limiter.limit = limiter.limit, limit
    return int(before)


# ------------------------------------------------------------------------------------------------------ DataFrames


def part(number: int, rows: int) -> pd.DataFrame:
    """Return rows of many types; every fourth partition is empty."""
    random = np.random.default_rng(number)
    rows = 0 if number % 4 == 3 else rows
    keys = random.integers(0, 50, rows)
    return pd.DataFrame(
        {
            "k": keys,
            "f": random.random(rows),
            "s": pd.Series([f"text {n}" if n % 5 else None for n in keys], dtype="string[pyarrow]"),
            "c": pd.Categorical.from_codes(keys % 3, ["x", "y", "z"]),
            "t": pd.Timestamp("2026-01-01") + pd.to_timedelta(keys, unit="h"),
            "n": pd.array(np.where(keys % 7 == 0, None, keys), dtype="Int64"),
        }
    )


def frame(parts: int, rows: int = 60) -> Any:
    """Return a DataFrame of many types."""
    return dd.from_map(part, range(parts), rows=rows, meta=part(3, 0))


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "shuffle": lambda one: one.shuffle("k", npartitions=5),
    "shuffle in one": lambda one: one.shuffle("s", npartitions=1),
    "set_index": lambda one: one.set_index("f", divisions=[0, 0.2, 0.5, 0.9, 1]),
    "merge": lambda one: one.merge(one[["k", "f"]], on="k", how="left"),
    "merge of the index": lambda one: one.merge(one[["t", "n"]], left_on="k", right_on="n", how="inner"),
}


def partitions(collection: Any) -> list[pd.DataFrame]:
    """Return the partitions of a collection as they are, each by itself."""
    return list(dask.compute(*collection.to_delayed(optimize_graph=True)))


@pytest.mark.parametrize("disk", [True, False])
@pytest.mark.parametrize("name", OPERATIONS)
def test_partitions_are_those_of_stock_dask(client: Client, name: str, disk: bool, expected: dict[str, Any]) -> None:
    """In their order, with their types, row by row."""
    before = shuffled(client)
    with dask.config.set({"distributed.p2p.storage.disk": disk}):
        got = partitions(OPERATIONS[name](frame(7)))
    assert len(got) == len(expected[name])
    for one, other in zip(got, expected[name], strict=True):
        # In a merge, the order of rows is that in which Dask's hash join meets them, which is the same for equal inputs.
        pd.testing.assert_frame_equal(one, other)
    assert shuffled(client) > before


@pytest.fixture(scope="module")
def expected(nothing_leaks: None, peer_to_peer: None) -> dict[str, list[pd.DataFrame]]:
    """Return the results of stock Dask."""
    with local_cluster(3, options=None):
        return {name: partitions(operation(frame(7))) for name, operation in OPERATIONS.items()}


# ------------------------------------------------------------------------------------------------- when things fail


@contextmanager
def patched(client: Client, patch: Callable[[], Callable[[], None]]) -> Iterator[None]:
    """Let a function change all workers; the function that it returns undoes the change."""

    def do() -> None:
        import distributed

        distributed._undo_of_the_test = patch()

    def undo() -> None:
        import distributed

        distributed._undo_of_the_test()

    client.run(do)
    yield
    client.run(undo)


def refuse_now_and_then() -> Callable[[], None]:
    """Let the arena be full for every third draft."""
    from dask_shm_plugin.arena.arena import Arena
    from dask_shm_plugin.exceptions import ArenaFull

    draft, count = Arena.draft, itertools.count()

    def refuse(self: Any, size: int) -> Any:
        if next(count) % 3 == 0:
            raise ArenaFull("for the test")
        return draft(self, size)

    Arena.draft = refuse
    return lambda: setattr(Arena, "draft", draft)


def lose_now_and_then() -> Callable[[], None]:
    """Let every third parcel be lost on its way."""
    from dask_shm_plugin.arena.arena import Arena
    from dask_shm_plugin.exceptions import StaleBlock

    attach, count = Arena.attach_block, itertools.count()

    def refuse(self: Any, descriptor: Any) -> Any:
        if next(count) % 3 == 0:
            raise StaleBlock("for the test")
        return attach(self, descriptor)

    Arena.attach_block = refuse
    return lambda: setattr(Arena, "attach_block", attach)


def miss_the_module_now_and_then() -> Callable[[], None]:
    """Let every third parcel arrive where the package is of another version."""
    from dask_shm_plugin.arena.arena import Arena

    attach, count = Arena.attach_block, itertools.count()

    def refuse(self: Any, descriptor: Any) -> Any:
        if next(count) % 3 == 0:
            raise ModuleNotFoundError("for the test")
        return attach(self, descriptor)

    Arena.attach_block = refuse
    return lambda: setattr(Arena, "attach_block", attach)


def fail_each_read_once() -> Callable[[], None]:
    """Let each task that makes an output of a rechunk fail after it has read the shards for the first time."""
    from distributed.shuffle._rechunk import ArrayRechunkRun

    original, seen = ArrayRechunkRun._get_output_partition, set()

    def fail(self: Any, partition_id: Any, key: Any, **kwargs: Any) -> Any:
        result = original(self, partition_id, key, **kwargs)
        if key not in seen:
            seen.add(key)
            raise ValueError("for the test")
        return result

    ArrayRechunkRun._get_output_partition = fail
    return lambda: setattr(ArrayRechunkRun, "_get_output_partition", original)


def drop_a_first_output_at_once() -> Callable[[], None]:
    """Let the shards of an output be dropped when they are read for the first time, and its task fail."""
    from dask_shm_plugin.shuffling.kept import KeptShards

    original, seen = KeptShards.read, set()

    def read(self: Any, name: str) -> Any:
        result = original(self, name)
        if not seen and name in self._shards:
            seen.add(name)
            self._run._loop.add_callback(self.drop, name)
            while name not in self._dropped:
                pass
            raise ValueError("for the test")
        return result

    KeptShards.read = read
    return lambda: setattr(KeptShards, "read", original)


def leave_few_rows() -> Callable[[], None]:
    """Let the arena's table have as few rows as a run of very many workers would leave."""
    from dask_shm_plugin.shuffling import sending

    rows, sending.BLOCKS = sending.BLOCKS, 8
    return lambda: setattr(sending, "BLOCKS", rows)


WAYS = [leave_few_rows, refuse_now_and_then, lose_now_and_then, miss_the_module_now_and_then]


@pytest.mark.parametrize("patch", WAYS, ids=lambda patch: patch.__name__)
@pytest.mark.parametrize("disk", [True, False])
def test_shards_that_find_no_way_through_the_arena_are_sent(client: Client, patch: Any, disk: bool) -> None:
    """A full arena in the middle, or a block that is gone: the same run goes on with bytes."""
    whole = np.random.default_rng(3).random((300, 300))
    rows = pd.DataFrame({"k": np.arange(3000) % 41, "v": np.arange(3000)})
    with patched(client, patch), dask.config.set({"distributed.p2p.storage.disk": disk}):
        y = da.from_array(whole, (30, 300), name=f"{patch.__name__}-{disk}").rechunk((300, 30)).compute()
        got = dd.from_pandas(rows, npartitions=8).shuffle("k").compute()
    np.testing.assert_array_equal(y, whole)
    pd.testing.assert_frame_equal(got.sort_index(), rows)


def test_an_output_of_a_rechunk_that_is_made_again_is_right(client: Client) -> None:
    """Its task has got the output, and failed: the shuffle starts again."""
    whole = np.random.default_rng(4).random((1024, 1024))
    x = da.from_array(whole, (128, 1024), name="again")
    with patched(client, fail_each_read_once):
        y = x.rechunk((1024, 128)).persist(retries=3)
        np.testing.assert_array_equal(y.compute(), whole)


def test_an_output_of_a_shuffle_that_is_made_again_is_right(client: Client) -> None:
    """Its shards were dropped, so the shuffle starts again: it never looks like an empty one."""
    rows = pd.DataFrame({"k": np.arange(3000) % 41, "v": np.arange(3000)})
    with patched(client, drop_a_first_output_at_once):
        (persisted,) = dask.persist(dd.from_pandas(rows, npartitions=8).shuffle("k"), retries=3)
        pd.testing.assert_frame_equal(persisted.compute().sort_index(), rows)


def test_two_computations_that_share_a_rechunk_are_right(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has tasks of its own that read the outputs. A worker starts the shuffle again once at most."""
    restarts, restart = [], ShuffleSchedulerPlugin._restart_shuffle
    monkeypatch.setattr(
        ShuffleSchedulerPlugin,
        "_restart_shuffle",
        lambda self, id, *args, **kwargs: (restarts.append(id), restart(self, id, *args, **kwargs)),
    )
    whole = np.random.default_rng(8).random((1024, 1024))
    y = da.from_array(whole, (128, 1024), name="shared").map_blocks(slow).rechunk((1024, 128))
    results = [client.compute(reduced) for reduced in (y.sum(), y.mean(), y.max())]
    expected = [whole.sum(), whole.mean(), whole.max()]
    np.testing.assert_allclose([result.result(120) for result in results], expected)
    assert len(restarts) <= 3


def slow(block: np.ndarray) -> np.ndarray:
    """Return a copy of a block after some time."""
    import time

    time.sleep(0.05)
    return block.copy()


def under_way(client: Client, name: str) -> da.Array:
    """Start a rechunk of 4 MiB, and return it when a part of it has been sent."""
    before = shuffled(client)
    x = da.from_array(np.arange(1 << 19, dtype="f8").reshape(512, 1024), (8, 1024), name=name).map_blocks(slow)
    y = x.rechunk((512, 64)).persist()
    wait_until(lambda: shuffled(client) > before, "shards are sent through the arena")
    return y


def test_a_shuffle_that_is_cancelled_leaves_nothing(client: Client) -> None:
    """Its files and what is kept go when Dask closes it."""
    y = under_way(client, "cancelled")
    client.cancel(y)
    del y
    assert_empty(client)


def test_a_restarted_cluster_shuffles_on(client: Client) -> None:
    """The shuffle under way is lost, as with stock Dask."""
    y = under_way(client, "restarted")
    client.restart()
    client.run(pack_all)
    del y
    whole = np.arange(4096.0).reshape(64, 64)
    y = da.from_array(whole, (8, 64), name="after-restart").rechunk((64, 8)).compute()
    np.testing.assert_array_equal(y, whole)


def test_switching_off_in_the_middle_completes_the_shuffle(nothing_leaks: None) -> None:
    """And a switched-off plugin leaves later shuffles alone."""
    with local_cluster(2) as client:
        client.run(pack_all)
        y = under_way(client, "switched-off")
        unregister(client)
        whole = np.arange(1 << 19, dtype="f8").reshape(512, 1024)
        np.testing.assert_array_equal(y.compute(), whole)
        np.testing.assert_array_equal(y.rechunk((64, 1024)).compute(), whole)
        assert client.run(original_refresh) == dict.fromkeys(client.run(original_refresh), True)
        client.register_plugin(SharedMemoryPlugin(threshold="64 KiB", capacity="256 MiB"))
        np.testing.assert_array_equal(y.rechunk((64, 1024)).compute(), whole)


def original_refresh() -> bool:
    """Return whether this process makes runs of shuffles as stock Dask does."""
    from distributed.shuffle._worker_plugin import _ShuffleRunManager

    return _ShuffleRunManager._refresh.__module__.startswith("distributed")


def test_a_small_arena_is_no_obstacle(nothing_leaks: None) -> None:
    """From half of its room on, shards go Dask's way."""
    with local_cluster(2, {"capacity": "2 MiB"}) as client:
        whole = np.random.default_rng(5).random((1024, 1024))
        y = da.from_array(whole, (64, 1024), name="small-arena").rechunk((1024, 64)).persist()
        np.testing.assert_array_equal(y.compute(), whole)
        assert shuffled(client) > 0
        del y
        assert_empty(client)


def test_shuffles_can_be_left_to_dask(nothing_leaks: None) -> None:
    """``shm.shuffle`` is "off": values are shared, shuffles are not."""
    with local_cluster(2, {"shuffle": "off"}) as client:
        whole = np.random.default_rng(6).random((512, 512))
        y = da.from_array(whole, (64, 512), name="left-to-dask").rechunk((512, 64)).compute()
        np.testing.assert_array_equal(y, whole)
        assert shuffled(client) == 0
        assert all(client.run(original_refresh).values())


def test_a_large_rechunk_takes_no_more_memory_of_the_arena_than_what_is_on_its_way(client: Client) -> None:
    """Blocks are given back while the rechunk goes on."""
    x = da.random.default_rng(7).random((2048, 2048), chunks=(64, 2048)).persist()
    wait(x)
    y = x.rechunk((2048, 64)).persist()
    wait(y)
    wait_until(lambda: totals(client).used == in_chunks(client), "the arena has only arrays that were born there")
    assert totals(client).resident < 64 * MIB + in_chunks(client)
    np.testing.assert_array_equal(y[:, :64].compute(), x[:, :64].compute())


def in_chunks(client: Client) -> int:
    """Return the bytes of all chunks of the workers, in which their arrays lie if `shm.born` is on."""
    found = [figures for figures in client.run(births.figures).values() if figures is not None]
    return sum(one.used + one.idle + one.bare + one.private for one in found)
