"""LMDB: a database in /dev/shm that is written through its mapping and never synchronised."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lmdb
import numpy as np


class Store:
    """The writer's environment."""

    def __init__(self, folder: Path, capacity: int) -> None:
        self.whereabouts = (str(folder / "data"), capacity)
        self._environment = lmdb.open(
            str(folder / "data"), map_size=capacity, writemap=True, sync=False, metasync=False, map_async=True
        )
        self._numbers = itertools.count()

    def put(self, x: np.ndarray) -> bytes:
        """Write the bytes in a transaction."""
        name = b"%d" % next(self._numbers)
        with self._environment.begin(write=True, buffers=True) as transaction:
            transaction.put(name, memoryview(x).cast("B"))
        return name

    def delete(self, name: bytes) -> None:
        """Delete the bytes in a transaction, and have one more: pages are free for the next but one."""
        with self._environment.begin(write=True) as transaction:
            transaction.delete(name)
        with self._environment.begin(write=True) as transaction:
            transaction.put(b"-", name)

    def close(self) -> None:
        """Close the environment."""
        self._environment.close()


class Reader:
    """A reader's environment."""

    def __init__(self, whereabouts: Any) -> None:
        path, size = whereabouts
        self._environment = lmdb.open(path, map_size=size, readonly=True)
        self._transaction: Any = None

    def attach(self, name: bytes) -> np.ndarray:
        """Begin to read, without a copy."""
        self._transaction = self._environment.begin(buffers=True)
        return np.frombuffer(self._transaction.get(name), dtype=np.float64)

    def detach(self) -> None:
        """End the transaction."""
        self._transaction.abort()
