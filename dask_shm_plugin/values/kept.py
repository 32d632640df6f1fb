"""The values that a worker keeps in the arena, in words: the labels of its blocks.

A key is noted when its value comes into memory, and when it is published. Only the words are kept, because a further
reference to a value would make it look as if something else could reach it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.labels import Label
from dask_shm_plugin.table.layout import BlockId
from dask_shm_plugin.values import buffers
from dask_shm_plugin.values.describe import describe


class KeptValues:
    """The labels of one worker's values, by key.

    Parameters
    ----------
    arena
        The arena that gets the labels.

    Notes
    -----
    To be used on the worker's event loop; the arena's housekeeping thread reads the labels.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena_id = arena.arena_id
        self._labels: dict[Any, Label] = {}

    def note(self, key: Any, value: object, rows: Iterable[BlockId] | None = None) -> None:
        """Note the value of a key, and its blocks; if they are not given, they are looked for in the value."""
        blocks = tuple(buffers.blocks_of(value, self._arena_id) if rows is None else rows)
        self.forget(key)
        if blocks:
            self._labels[key] = Label(blocks, str(key), *describe(value))

    def forget(self, key: Any) -> None:
        """Drop the label of a key; harmless if it has none."""
        self._labels.pop(key, None)

    def labels(self) -> list[Label]:
        """Return all labels; any thread may call this."""
        return list(self._labels.values())
