"""The arena of this package, without Dask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dask_shm_plugin.arena import Arena
from dask_shm_plugin.block import Block


class Store:
    """An arena that keeps all freed pages warm."""

    def __init__(self, folder: Path, capacity: int) -> None:
        self._arena = Arena.create(capacity, warm=1 << 20)
        self._blocks: dict[Any, Block] = {}
        self.whereabouts = (self._arena.segment.whereabouts, self._arena.arena_id, capacity)

    def put(self, x: np.ndarray) -> Any:
        """Write and seal a block."""
        with self._arena.draft(x.nbytes) as draft:
            draft.write(0, memoryview(x))
            block = draft.seal()
        name = (block.descriptor, x.nbytes)
        self._blocks[name] = block
        return name

    def delete(self, name: Any) -> None:
        """Drop the block, and wait until it is free."""
        self._blocks.pop(name).close()
        self._arena.holdings.tidy()

    def close(self) -> None:
        """Leave the arena."""
        self._arena.close()


class Reader:
    """A member of the arena, with the settings of the first."""

    def __init__(self, whereabouts: Any) -> None:
        self._arena = Arena.attach(*whereabouts)

    def attach(self, name: Any) -> np.ndarray:
        """Map the block, copy-on-write."""
        descriptor, size = name
        return np.frombuffer(self._arena.view(descriptor, 0, size), dtype=np.float64)

    def detach(self) -> None:
        """Wait until it is known that the array is gone."""
        self._arena.holdings.tidy()
