"""Ray's object store: the driver puts, an actor gets."""

# ruff: noqa: D102  (the methods are described in stores.Store and readers.Timed)

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import ray
from readers import Answer, Timed

FREED = 0.3
"""Seconds after which Ray has freed a value that nothing refers to."""


@ray.remote(num_cpus=0)
class Actor:
    """A process that gets values. They come in lists, so that Ray does not get them before the clock starts."""

    def __init__(self) -> None:
        self._timed = Timed(lambda references: ray.get(references[0]))

    def attach(self, references: list[Any], is_whole: bool) -> Answer:
        return self._timed.attach(references, is_whole)

    def detach(self) -> None:
        self._timed.detach()


class Reader:
    """An actor, as seen by the driver."""

    def __init__(self, references: dict[int, Any]) -> None:
        self._references, self._actor = references, Actor.remote()
        self.detach()  # waits for the actor's start

    def attach(self, name: int, is_whole: bool) -> Answer:
        return ray.get(self._actor.attach.remote([self._references[name]], is_whole))

    def detach(self) -> None:
        ray.get(self._actor.detach.remote())


class Store:
    """A node of its own."""

    def start(self, folder: Path, capacity: int) -> None:
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init(num_cpus=2, object_store_memory=capacity, _temp_dir=str(folder), **quiet)
        self._references, self._numbers = {}, itertools.count()

    def reader(self) -> Reader:
        return Reader(self._references)

    def put(self, x: np.ndarray) -> int:
        name = next(self._numbers)
        self._references[name] = ray.put(x)
        return name

    def delete(self, name: int) -> None:
        del self._references[name]
        time.sleep(FREED)

    def stop(self) -> None:
        ray.shutdown()
