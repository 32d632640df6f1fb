"""The values that a worker keeps in the arena, in words: the labels of its blocks.

A key is noted when its value comes into memory, and when it is published. Only the words are kept, because a further
reference to a value would make it look as if something else could reach it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, NamedTuple

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.labels import Label
from dask_shm_plugin.table.layout import BlockId
from dask_shm_plugin.values import buffers
from dask_shm_plugin.values.describe import describe


class Kept(NamedTuple):
    """A value in the arena: its label, and its bytes there."""

    label: Label
    size: int


class KeptValues:
    """The labels of one worker's values, by key.

    Parameters
    ----------
    arena
        The arena that gets the labels.

    Attributes
    ----------
    placed
        Called with the key and the value whenever a value is noted that lies in blocks, or has a copy there.

    Notes
    -----
    To be used on the worker's event loop; the arena's housekeeping thread reads the labels.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena_id = arena.arena_id
        self._kept: dict[Any, Kept] = {}
        self.placed: Callable[[Any, object], object] = lambda key, value: None

    def note(self, key: Any, value: object, blocks: dict[BlockId, int] | None = None) -> None:
        """Note the value of a key, and its bytes in each block; if these are not given, they are looked for."""
        found = buffers.blocks_of(value, self._arena_id) if blocks is None else blocks
        self.forget(key)
        if found:
            self._kept[key] = Kept(Label(tuple(found), str(key), *describe(value)), sum(found.values()))
            self.placed(key, value)

    def forget(self, key: Any) -> None:
        """Drop the label of a key; harmless if it has none."""
        self._kept.pop(key, None)

    def largest(self, count: int) -> list[Kept]:
        """Return the largest values, the largest first."""
        return heapq.nlargest(count, self._kept.values(), key=lambda kept: kept.size)

    def labels(self) -> list[Label]:
        """Return all labels; any thread may call this."""
        return [kept.label for kept in list(self._kept.values())]
