"""Shards are copied into one block, and become the same shards wherever the parcel is unpickled."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from distributed.shuffle._arrow import deserialize_table
from other_processes import wait_until_empty

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import ArenaFull
from dask_shm_plugin.node import membership
from dask_shm_plugin.shuffling import parcels
from dask_shm_plugin.shuffling.parcels import ParcelLost, is_plain, pack_arrays, pack_table

DTYPES = ["f8", ">i4", "?", "c16", "M8[ns]", "m8[D]", "S5", "U3", "V6", [("a", "i2"), ("b", "f8", 2)]]


@pytest.fixture(autouse=True)
def found(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> Arena:
    """Let this process find its arena, as a worker does."""
    monkeypatch.setattr(membership, "find", lambda arena_id: arena if arena_id == arena.arena_id else None)
    return arena


def shards_of(array: np.ndarray) -> list[Any]:
    """Return shards of an array: a strided one, an empty one, a contiguous one."""
    return [((0, 1), ((2, 3), array[::2, 1:])), ((1, 0), ((0, 0), array[:0])), ((1, 1), ((0, 1), array[:1]))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_arrive_as_they_were_packed(arena: Arena, dtype: Any) -> None:
    """Indices, shapes, types and bytes are the same; nothing of the arena is left when the shards are gone."""
    random = np.random.default_rng(0).integers(0, 100, (6, 5))
    array = random.astype("u1").astype(dtype) if dtype != "V6" else np.zeros((6, 5), dtype)
    shards = shards_of(array)
    parcel = pack_arrays(arena, shards)
    assert arena.stats().blocks == 1
    blob = pickle.dumps([("id", parcel)])
    [(_, arrived)] = pickle.loads(blob)
    for (chunk, (index, sent)), (chunk_too, (index_too, got)) in zip(shards, arrived, strict=True):
        assert (chunk, index) == (chunk_too, index_too)
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
        np.testing.assert_array_equal(got, sent)
        assert not got.flags.writeable
    del parcel
    arena.holdings.tidy()
    assert arena.stats().blocks == 1
    del arrived, got, blob
    wait_until_empty(arena)


def test_a_table_arrives_as_it_was_serialized(arena: Arena) -> None:
    """Arrow reads it from the block; as Dask would send it, it is bytes."""
    table = pa.table({"a": list(range(1000)), "s": ["x", None] * 500})
    parcel = pack_table(arena, table, 1)
    assert parcel is not None
    assert deserialize_table(pickle.loads(pickle.dumps(parcel))).equals(table)
    assert type(parcel.as_sent()) is bytes
    assert deserialize_table(parcel.as_sent()).equals(table)
    assert sys.getsizeof(parcel) >= parcel.size == len(parcel.as_sent())


def test_a_small_table_takes_no_block(arena: Arena) -> None:
    """Many of these are sent in one message."""
    assert pack_table(arena, pa.table({"a": [1]}), 64 << 10) is None
    assert arena.stats().blocks == 0


def test_a_parcel_whose_block_is_gone_is_lost(arena: Arena) -> None:
    """The receiver raises an error that Dask returns to the sender."""
    parcel = pack_arrays(arena, shards_of(np.zeros((4, 4))))
    blob = pickle.dumps(parcel)
    del parcel
    wait_until_empty(arena)
    with pytest.raises(ParcelLost, match="not there any more"):
        pickle.loads(blob)


def test_a_parcel_is_lost_in_a_process_outside_the_arena(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that has left, or was restarted without the plugin, tells the sender."""
    parcel = pack_arrays(arena, shards_of(np.zeros((4, 4))))
    monkeypatch.setattr(membership, "find", lambda arena_id: None)
    with pytest.raises(ParcelLost, match="left"):
        pickle.loads(pickle.dumps(parcel))
    assert pickle.loads(pickle.dumps(ParcelLost("text"))).args == ("text",)


def test_a_full_arena_refuses_and_keeps_nothing(arena: Arena) -> None:
    """The sender then sends copies."""
    with pytest.raises(ArenaFull):
        pack_arrays(arena, [((0,), ((0,), np.zeros(2 << 20, "u1")))])
    wait_until_empty(arena)


def test_only_arrays_that_are_nothing_but_bytes_are_plain() -> None:
    """Objects, subclasses, other arrays and elements without bytes go Dask's way."""
    assert is_plain(np.zeros(3))
    assert is_plain(np.zeros(0))
    assert not is_plain(np.zeros(3, object))
    assert not is_plain(np.zeros(3, [("a", "O")]))
    assert not is_plain(np.ma.zeros(3))
    assert not is_plain(np.zeros(3, "V0"))
    assert not is_plain([1, 2])


def test_sizes_are_those_of_the_block(arena: Arena) -> None:
    """Each shard begins at a multiple of 64 bytes."""
    shards = shards_of(np.zeros((3, 3), "u1"))
    assert parcels.size_of(shards) == 128
    assert pack_arrays(arena, shards).size == 128
