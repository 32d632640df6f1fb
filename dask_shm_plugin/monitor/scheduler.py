"""The scheduler's half of monitoring: the history of the arenas, the dashboard's page, and metrics for Prometheus."""

from __future__ import annotations

import logging
from typing import Any

from dask_shm_plugin.monitor import prometheus
from dask_shm_plugin.monitor.history import History
from dask_shm_plugin.notices import warn_once

logger = logging.getLogger("dask_shm_plugin")

_NAME = "dask-shm-monitor"


class Monitor:
    """Shows the arenas of a cluster, from its creation to :meth:`close`.

    Parameters
    ----------
    scheduler
        A running scheduler.

    Notes
    -----
    To be used on the scheduler's event loop.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._history = History(scheduler)
        prometheus.register(scheduler, self._history.metrics)
        self._pages = _pages(scheduler, self._history)

    def close(self) -> None:
        """Show nothing any more."""
        prometheus.unregister(self._scheduler)
        self._history.close()
        if self._pages is not None:
            self._pages.close()


def show(scheduler: Any) -> None:
    """Show the arenas of a cluster, in place of an earlier monitor; never raises."""
    hide(scheduler)
    try:
        scheduler.extensions[_NAME] = Monitor(scheduler)
    except Exception as error:
        warn_once(f"The dashboard has no page about shared memory: {type(error).__name__}: {error}")
        logger.debug("could not show the arenas", exc_info=True)


def hide(scheduler: Any) -> None:
    """Undo :func:`show`; never raises, and does nothing if that was not called."""
    monitor = scheduler.extensions.pop(_NAME, None)
    if monitor is not None:
        try:
            monitor.close()
        except Exception:
            logger.debug("could not take the page of the dashboard away", exc_info=True)


def _pages(scheduler: Any, history: History) -> Any:
    """Return the open pages, or None if the scheduler has no dashboard or a private name has changed."""
    try:
        from dask_shm_plugin.monitor import dashboard
        from dask_shm_plugin.seams import dashboard as seam
    except ImportError:  # without Bokeh there is no dashboard
        return None
    if seam.first_bokeh_application(scheduler) is None:
        return None
    moved = seam.why_not()
    if moved:
        warn_once(f"The dashboard has no page about shared memory: this version of distributed has changed {moved}")
        return None
    return dashboard.open_pages(scheduler, history)
