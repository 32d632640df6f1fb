"""The figures that a worker sends with each of Dask's heartbeats, among its metrics, under ``shm``.

They are read without the lock of the table, on the worker's event loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import dask_shm_plugin
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.labels import Label
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.linux import usage
from dask_shm_plugin.values.kept import KeptValues

_MAX_VALUES = 5
"""Number of values that a heartbeat describes, the largest."""


class Heartbeat:
    """Makes the figures of one worker, as plain data.

    Parameters
    ----------
    arena
        The arena of the worker.
    kept
        The values that the worker keeps in the arena.
    counters
        Returns the counters of the worker's process.
    """

    def __init__(self, arena: Arena, kept: KeptValues, counters: Callable[[], dict[str, Any]]) -> None:
        self._arena, self._kept, self._counters = arena, kept, counters

    def __call__(self, worker: object) -> dict[str, Any]:
        """Return the arena's id, the package's version and the counters, and the state of the arena if it can be read."""
        arena_id, version = self._arena.arena_id.hex(), dask_shm_plugin.__version__
        said = {"arena": arena_id, "version": version, **self._counters()}
        with contextlib.suppress(SharedMemoryError, OSError):
            return {**said, **self._state()}
        return said

    def metrics(self) -> list[tuple[str, dict[str, int], dict[str, Any]]]:
        """Return the id of the arena, its figures, and the counters, for Prometheus; raises if the arena was left."""
        return [(self._arena.arena_id.hex(), self._arena.glance()._asdict(), self._counters())]

    def _state(self) -> dict[str, Any]:
        member = self._arena.member
        return {
            "process": f"{member.slot}:{member.incarnation}",
            "private": usage.read().anonymous,
            "state": self._arena.glance()._asdict(),
            "values": [self._value(*found) for found in self._kept.largest(_MAX_VALUES)],
        }

    def _value(self, label: Label, size: int) -> dict[str, Any]:
        holders = {
            f"{one.slot}:{one.incarnation}" for row in label.blocks for one in self._arena.roster.holders_of(row)
        }
        return {"key": label.key, "type": label.type, "shape": label.shape, "bytes": size, "holders": sorted(holders)}
