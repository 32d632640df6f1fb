"""Keep inputs that a worker maps from its arena out of the network traffic that the scheduler expects for it.

Dask counts each missing input at ``nbytes / bandwidth``: 512 MiB make a worker look busy for 5 s. ``WorkerState`` has
slots, so its methods are replaced in the class, and do what Dask does for all other schedulers of the process.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

from distributed.scheduler import WorkerState

from dask_shm_plugin.scheduling.costs import Costs
from dask_shm_plugin.scheduling.nodes import LARGE_BYTES, arena_of
from dask_shm_plugin.seams.replacement import SharedReplacement

logger = logging.getLogger("dask_shm_plugin")


class Occupancy:
    """Takes near inputs off the expected traffic of one scheduler's workers, from its creation to :meth:`stop`.

    Parameters
    ----------
    scheduler
        A running scheduler.
    costs
        Tells which inputs are near.
    """

    def __init__(self, scheduler: Any, costs: Costs) -> None:
        self._scheduler, self._costs = scheduler, costs
        self._taken_off: dict[str, dict[Any, int]] = {}
        _ACTIVE[scheduler] = self
        for replacement in _REPLACEMENTS:
            replacement.begin()

    def stop(self) -> None:
        """Put Dask's methods back in place, and count all expected traffic again."""
        for replacement in _REPLACEMENTS:
            replacement.end()
        _ACTIVE.pop(self._scheduler, None)
        for address in list(self._taken_off):
            ws = self._scheduler.workers.get(address)
            for ts in list(self._taken_off[address]) if ws is not None else ():
                if ts in ws.needs_what:
                    self.will_be_taken(ws, ts)
        self._taken_off.clear()

    def forget(self, address: str) -> None:
        """Forget a worker that is gone."""
        self._taken_off.pop(address, None)

    def was_added(self, ws: Any, ts: Any) -> None:
        """Take an input off that Dask has just added for the first of a worker's tasks, if it is near."""
        if ws.needs_what.get(ts) == 1 and self._costs.near(ts, arena_of(ws)) is not None:
            size = min(ts.nbytes, ws._network_occ)
            self._taken_off.setdefault(ws.address, {})[ts] = size
            self._add(ws, -size)

    def will_be_taken(self, ws: Any, ts: Any) -> None:
        """Add an input again that was taken off: Dask is about to subtract it."""
        self._add(ws, self._taken_off.get(ws.address, {}).pop(ts, 0))

    def _add(self, ws: Any, size: int) -> None:
        ws._network_occ += size
        self._scheduler._network_occ_global += size


_ACTIVE: weakref.WeakKeyDictionary[Any, Occupancy] = weakref.WeakKeyDictionary()


def _inc_needs_replica(ws: Any, ts: Any) -> None:
    _INC.old(ws, ts)
    if ts.nbytes >= LARGE_BYTES and ws.scheduler in _ACTIVE:
        try:
            _ACTIVE[ws.scheduler].was_added(ws, ts)
        except Exception:
            logger.debug("an input counts as network traffic", exc_info=True)


def _dec_needs_replica(ws: Any, ts: Any) -> None:
    if ws.needs_what.get(ts) == 1 and ws.scheduler in _ACTIVE:
        _ACTIVE[ws.scheduler].will_be_taken(ws, ts)
    _DEC.old(ws, ts)


def _add_replica(ws: Any, ts: Any) -> None:
    if ts in ws.needs_what and ws.scheduler in _ACTIVE:
        _ACTIVE[ws.scheduler].will_be_taken(ws, ts)
    _ADD.old(ws, ts)


_INC = SharedReplacement(WorkerState, "_inc_needs_replica", _inc_needs_replica)
_DEC = SharedReplacement(WorkerState, "_dec_needs_replica", _dec_needs_replica)
_ADD = SharedReplacement(WorkerState, "add_replica", _add_replica)
_REPLACEMENTS = (_INC, _DEC, _ADD)
