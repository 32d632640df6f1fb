"""The time (s) that an input takes to reach a worker whose node has it already."""

from __future__ import annotations

import itertools
from typing import Any

from dask_shm_plugin.scheduling.nodes import Nodes, arena_of, is_large

_MAPPING_S, _MAPPING_BYTES_PER_S = 0.005, 10e9
_PUBLISHING_S, _PUBLISHING_BYTES_PER_S = 0.05, 0.8e9
"""A holder that runs a task copies its value at this speed: 160 to 200 ms for 256 MiB were measured."""

_WORTH_IT = 2
"""A value is worth publishing if tasks that wait for it would wait this many times as long for its holders."""

_MAX_WAITERS = 20
"""The most waiting tasks whose durations are looked at; the others are taken to be alike."""


class Costs:
    """Estimates the cost of an input of a task at a worker.

    Parameters
    ----------
    scheduler
        A running scheduler.
    nodes
        The arenas and published values that are known.
    """

    def __init__(self, scheduler: Any, nodes: Nodes) -> None:
        self._scheduler, self._nodes = scheduler, nodes

    def near(self, ts: Any, arena_id: str | None) -> float | None:
        """Return the time (s) until a worker of an arena has mapped a value that another worker of it holds.

        Returns
        -------
        float or None
            None if no worker there holds the value, if it is small, or if it is private and not worth being published:
            then it costs as much as Dask says.
        """
        if not is_large(ts) or not self._nodes.is_held_in(ts, arena_id):
            return None
        if self._nodes.is_published(ts, arena_id):
            return float(_MAPPING_S + ts.nbytes / _MAPPING_BYTES_PER_S)
        cost = float(_PUBLISHING_S + ts.nbytes / _PUBLISHING_BYTES_PER_S)
        return cost if self._backlog(ts) >= _WORTH_IT * cost else None

    def transfer(self, ts: Any, ws: Any) -> float:
        """Return the time (s) until a worker that does not hold a value has it, from its node or by the network."""
        near = self.near(ts, arena_of(ws))
        return float(ts.get_nbytes() / self._scheduler.bandwidth) if near is None else near

    def _backlog(self, ts: Any) -> float:
        """Return for how long (s) the known tasks that wait for a value would wait for a thread of its holders.

        A task that such a thread can start at once gains nothing from another worker. Tasks of unknown duration count as
        nothing: the first one that ends tells whether more workers are needed.
        """
        waiters, threads = ts.waiters or (), sum(ws.nthreads for ws in ts.who_has or ())
        if len(waiters) <= threads:
            return 0.0
        some = [max(0.0, waiter.prefix.duration_average) for waiter in itertools.islice(waiters, _MAX_WAITERS)]
        return float(sum(some) / len(some) * (len(waiters) - threads) / max(1, threads))
