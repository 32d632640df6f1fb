"""Ray's object store: the driver puts, an actor gets."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import ray
from readers import timed

FREED = 0.3


@ray.remote(num_cpus=0)
class Actor:
    """A process that gets values."""

    def attach(self, references: list[Any], is_whole: bool) -> Any:
        """Get a value, which is in a list so that Ray does not do so before this begins."""
        self._x, answer = timed(ray.get, references[0], is_whole)
        return answer

    def detach(self) -> None:
        """Let it go."""
        self._x = None


class Reader:
    """The driver's end of an actor."""

    def __init__(self, references: dict[int, Any]) -> None:
        self._references = references
        self._actor = Actor.remote()
        ray.get(self._actor.detach.remote())

    def attach(self, name: int, is_whole: bool) -> Any:
        """Let the actor get a value."""
        return ray.get(self._actor.attach.remote([self._references[name]], is_whole))

    def detach(self) -> None:
        """Let the actor forget it."""
        ray.get(self._actor.detach.remote())

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)


class Store:
    """A node of its own."""

    def __init__(self, folder: Path, capacity: int) -> None:
        ray.init(
            num_cpus=2,
            object_store_memory=capacity,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=str(folder),
        )
        self._references: dict[int, Any] = {}
        self._numbers = itertools.count()

    def reader(self) -> Reader:
        """Start an actor."""
        return Reader(self._references)

    def put(self, x: np.ndarray) -> int:
        """Put it."""
        name = next(self._numbers)
        self._references[name] = ray.put(x)
        return name

    def delete(self, name: int) -> None:
        """Drop the only reference; Ray frees the value some time after that."""
        del self._references[name]
        time.sleep(FREED)

    def close(self) -> None:
        """End the node."""
        ray.shutdown()
