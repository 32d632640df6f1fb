"""Warnings for the user: each is logged once per process and names the remedy.

This module imports no other package, so that importing it cannot fail.
"""

from __future__ import annotations

import functools
import logging

from dask_shm_plugin.exceptions import OutOfResources, SharedMemoryError
from dask_shm_plugin.metrics import COUNTERS

logger = logging.getLogger("dask_shm_plugin")


@functools.lru_cache(maxsize=64)
def warn_once(message: str) -> None:
    """Log a warning, once per process; the last 64 messages are remembered."""
    logger.warning(message)


def refused(error: Exception, size: int) -> None:
    """Count a value that is not shared, and if a resource ran out, warn once per reason, with the remedy.

    Parameters
    ----------
    error
        The reason why the value is not shared.
    size
        Bytes of the value.
    """
    _tell("Values are copied instead of shared", error)
    COUNTERS.count_sent(getattr(error, "reason", SharedMemoryError.reason), size)
    logger.debug("sent %d bytes instead of sharing them: %s", size, str(error))


def kept_private(error: SharedMemoryError) -> None:
    """Warn, once per resource that ran out, that this process keeps private copies of values that it has shared."""
    _tell("Shared values keep a private copy", error)


_told: set[str] = set()


def _tell(what: str, error: Exception) -> None:
    if isinstance(error, OutOfResources) and error.reason not in _told:
        _told.add(error.reason)
        # Log the text only: a handler that keeps records would keep the error, and through its frames the values.
        logger.warning("%s (%s): %s", what, error.reason, str(error))
