"""Dask without this package, over TCP or UCX: a scatter to one worker, a task on another.

This is no store: "put" is a scatter from the client straight to a worker, "attach" is a task on another worker, which
fetches the value and reads one element.
"""

# ruff: noqa: D102  (the methods are described in stores.Store and readers.Timed)

from __future__ import annotations

import os
import time
import zlib
from pathlib import Path
from typing import Any

import machine
import numpy as np
from distributed import Client, LocalCluster
from readers import Answer

PROTOCOL = os.environ["PEERS_PROTOCOL"]


def first(x: np.ndarray) -> float:
    """Read one element."""
    return float(x[0])


def pages(x: np.ndarray, is_whole: bool) -> tuple[float, int, int]:
    """Read one element of every page."""
    start = time.perf_counter()
    total = machine.read_pages(x)
    seconds = time.perf_counter() - start
    return seconds, total, zlib.crc32(x) if is_whole else 0


class Reader:
    """A worker, as seen by the client."""

    def __init__(self, client: Client, worker: str) -> None:
        self._client, self._worker = client, worker

    def attach(self, name: Any, is_whole: bool) -> Answer:
        start = time.perf_counter()
        self._client.submit(first, name, workers=[self._worker], pure=False).result()
        attached = time.perf_counter() - start
        return Answer(
            attached, *self._client.submit(pages, name, is_whole, workers=[self._worker], pure=False).result()
        )

    def detach(self) -> None:
        """Do nothing: the worker forgets the value when the client does."""


class Store:
    """A cluster of one worker, and one more for each reader."""

    def start(self, folder: Path, capacity: int) -> None:
        settings = {"threads_per_worker": 1, "dashboard_address": ":0", "local_directory": folder}
        self._cluster = LocalCluster(n_workers=1, protocol=PROTOCOL, **settings)
        self._client = Client(self._cluster)
        self._client.amm.stop()  # replicas must still be there when memory is read
        [self._owner] = self._workers()

    def _workers(self) -> set[str]:
        return set(self._client.scheduler_info(n_workers=-1)["workers"])

    def reader(self) -> Reader:
        before = self._workers()
        self._cluster.scale(len(before) + 1)
        self._client.wait_for_workers(len(before) + 1)
        [worker] = self._workers() - before
        reader = Reader(self._client, worker)
        small = self.put(np.zeros(machine.PAGE // 8))
        reader.attach(small, False)  # connections are not measured
        self.delete(small)
        return reader

    def put(self, x: np.ndarray) -> Any:
        return self._client.scatter(x, workers=[self._owner], hash=False, direct=True)

    def delete(self, name: Any) -> None:
        name.release()
        while any(self._client.run(lambda dask_worker: len(dask_worker.data)).values()):
            time.sleep(0.02)

    def stop(self) -> None:
        self._client.close()
        self._cluster.close()
