"""The arenas of a cluster over the last minutes, kept by the scheduler."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from distributed.metrics import time
from tornado.ioloop import PeriodicCallback

from dask_shm_plugin.monitor.clients import CountersOfClients
from dask_shm_plugin.monitor.nodes import Node, nodes

_INTERVAL_S, _MAX_MOMENTS = 1.0, 600


class Moment(NamedTuple):
    """The arenas at one time, in seconds since 1970."""

    at: float
    nodes: list[Node]


class History:
    """The arenas at the last ten minutes' seconds, from its creation to :meth:`close`.

    Parameters
    ----------
    scheduler
        A running scheduler. Only the last heartbeats of its workers and the counters that clients tell are read.

    Notes
    -----
    To be used on the scheduler's event loop. A moment of 64 workers takes about half a millisecond (November 2026).
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler, self._clients = scheduler, CountersOfClients()
        self.moments: deque[Moment] = deque(maxlen=_MAX_MOMENTS)
        self._look()
        self._looking = PeriodicCallback(self._look, _INTERVAL_S * 1000)
        self._looking.start()

    @property
    def last(self) -> Moment:
        """The arenas at the last look."""
        return self.moments[-1]

    def close(self) -> None:
        """Stop looking."""
        self._looking.stop()

    def metrics(self) -> list[tuple[str, dict[str, int], dict[str, Any]]]:
        """Return the name of each arena, its figures, and its counters, for Prometheus."""
        return [(node.name, node.state, node.counters) for node in self.last.nodes]

    def _look(self) -> None:
        self._clients.read(self._scheduler)
        self.moments.append(Moment(time(), nodes(self._scheduler, self._clients)))
