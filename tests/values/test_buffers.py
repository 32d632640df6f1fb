"""The blocks in which a value lies are found from its live buffers, wherever these are in the value."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from other_processes import publish

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.values.buffers import blocks_of

SIZE = 8192


class Model:
    """A user's class."""

    def __init__(self, weights: np.ndarray) -> None:
        self.layers = [{"weights": weights}]


class Slotted:
    """A class without an instance dict."""

    __slots__ = ("weights",)

    def __init__(self, weights: np.ndarray) -> None:
        self.weights = weights


KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "array": lambda x: x,
    "matrix": lambda x: x.reshape(2, -1).T,
    "backwards": lambda x: x[::-1],
    "list": lambda x: [1, [x]],
    "dict": lambda x: {"a": {"b": x}},
    "memoryview": lambda x: memoryview(x),
    "frame": lambda x: pd.DataFrame({"x": x}, copy=False),
    "series": lambda x: pd.Series(x, copy=False),
    "masked": lambda x: np.ma.array(x, copy=False),
    "table": lambda x: pa.table({"x": pa.Array.from_buffers(pa.float64(), len(x), [None, pa.py_buffer(x)])}),
    "object": Model,
    "slots": Slotted,
    "cycle": lambda x: types.SimpleNamespace(x=x, me=[]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_block_under_a_value_is_found(arena: Arena, kind: str) -> None:
    """The number of bytes that the value has in the block is found, too."""
    with publish(arena, np.arange(SIZE // 8, dtype="f8").tobytes()) as block:
        value = KINDS[kind](np.frombuffer(block.view(0, SIZE), "f8"))
        if kind == "cycle":
            value.me.append(value)
        assert blocks_of(value, arena.arena_id) == {block.row: SIZE}
        assert blocks_of(value, bytes(16)) == {}
        assert blocks_of([np.arange(9.0), "text", None, Model(np.ones(3))], arena.arena_id) == {}
        del value


def test_all_blocks_under_the_parts_of_a_value_are_found(arena: Arena) -> None:
    """Each block is found with the bytes of the value in it, and private parts are not counted."""
    with publish(arena, b"a" * SIZE) as one, publish(arena, b"b" * SIZE) as two:
        value = {"x": np.asarray(one.view(0, SIZE))[:100], "y": [np.asarray(two.view(0, SIZE)), np.ones(5)]}
        assert blocks_of(value, arena.arena_id) == {one.row: 100, two.row: SIZE}
        del value


def test_a_value_of_very_many_objects_may_count_as_private(arena: Arena) -> None:
    """The number of visited objects is bounded, so a block that is not reached in time is not found."""
    with publish(arena, b"a" * SIZE) as block:
        value = [[[number] for number in range(5000)] for _ in range(3)] + [np.asarray(block.view(0, SIZE))]
        assert blocks_of(value, arena.arena_id) in ({}, {block.row: SIZE})
        del value


class Proxy:
    """An object that pretends to be of another class, and raises when it is inspected."""

    __module__ = property(lambda self: 1 / 0)  # type: ignore[assignment]

    @property
    def __class__(self) -> type:
        raise RuntimeError("working outside of context")

    def __init__(self, value: object) -> None:
        self.value = value


def test_no_code_of_a_users_object_is_called(arena: Arena) -> None:
    """The search follows the references of an object, and asks the object itself nothing."""
    with publish(arena, b"a" * SIZE) as block:
        value = Proxy([np.asarray(block.view(0, SIZE))])
        assert blocks_of(value, arena.arena_id) == {block.row: SIZE}
        del value
