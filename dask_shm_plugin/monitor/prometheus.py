"""Metrics for Prometheus, on the pages ``/metrics`` that Dask's workers and schedulers have already.

They go through the registry of ``prometheus_client``. Where that is not installed, there is no such page.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dask_shm_plugin.exceptions import SharedMemoryError

Report = Callable[[], Iterable[tuple[str, dict[str, int], dict[str, Any]]]]
"""A method that returns, for each arena, its id, its figures, and its counters."""

_GAUGES = {
    "capacity": ("dask_shm_arena_capacity_bytes", "The most that the blocks of the arena may take"),
    "used": ("dask_shm_arena_used_bytes", "Bytes of the blocks of the arena"),
    "resident": ("dask_shm_arena_resident_bytes", "Memory that the arena takes, its table and warm pages included"),
    "blocks": ("dask_shm_arena_blocks", "Number of blocks of the arena"),
    "members": ("dask_shm_arena_members", "Number of processes that are members of the arena"),
}
_COUNTERS = {
    "published": "copied into the arena",
    "attached": "mapped from the arena instead of being received",
    "found": "mapped without asking the worker that has them",
    "landed": "that came from another node and were put into the arena",
    "received": "that were received straight into the arena when they came from another node",
    "adopted": "of which the publisher gave up its private copy",
    "shuffled": "in messages of shuffles whose data were mapped instead of received",
}
_SENT = "that were large enough to be shared, but were sent as bytes"

_UNITS = {"bytes": ("bytes", "Bytes"), "count": ("values", "Number")}

_reports: weakref.WeakKeyDictionary[Any, weakref.WeakMethod[Report]] = weakref.WeakKeyDictionary()
"""By server. The methods are referred to weakly, because their objects refer to the servers."""


class _Collector:
    """Collects the metrics of all servers of this process."""

    def collect(self) -> Iterator[Any]:
        """Yield all metrics; each arena of this process once."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        found = _found()
        for field, (name, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=["arena"])
            for arena, (state, _) in found.items():
                gauge.add_metric([arena], state[field])
            yield gauge
        for unit, (suffix, title) in _UNITS.items():
            for event, text in _COUNTERS.items():
                counter = CounterMetricFamily(
                    f"dask_shm_{event}_{suffix}", f"{title} of values {text}", labels=["arena"]
                )
                for arena, (_, counters) in found.items():
                    counter.add_metric([arena], counters[event][unit])
                yield counter
            sent = CounterMetricFamily(
                f"dask_shm_sent_{suffix}", f"{title} of values {_SENT}", labels=["arena", "reason"]
            )
            for arena, (_, counters) in found.items():
                for reason, pair in counters["sent"].items():
                    sent.add_metric([arena, reason], pair[unit])
            yield sent


_COLLECTOR = _Collector()


def register(server: Any, report: Report) -> None:
    """Add the arenas that a method reports to the metrics of this process, as long as its object and the server live."""
    with contextlib.suppress(ImportError, ValueError):  # not installed, or registered already
        from prometheus_client import REGISTRY

        _reports[server] = weakref.WeakMethod(report)
        REGISTRY.register(_COLLECTOR)


def unregister(server: Any) -> None:
    """Undo :func:`register`; harmless if it was not called."""
    if _reports.pop(server, None) is not None and not _reports:
        with contextlib.suppress(ImportError, KeyError):
            from prometheus_client import REGISTRY

            REGISTRY.unregister(_COLLECTOR)


def _found() -> dict[str, tuple[dict[str, int], dict[str, Any]]]:
    found = {}
    for reference in list(_reports.values()):
        report = reference()
        with contextlib.suppress(SharedMemoryError, OSError):
            found.update({arena: (state, counters) for arena, state, counters in (report() if report else ())})
    return found
