"""What a user is told: rarely, once, and with the remedy. Imports nowhere fail on account of this module."""

from __future__ import annotations

import functools
import logging

from dask_shm_plugin.exceptions import OutOfResources, SharedMemoryError
from dask_shm_plugin.metrics import COUNTERS

logger = logging.getLogger("dask_shm_plugin")


@functools.lru_cache(maxsize=64)
def warn_once(message: str) -> None:
    """Log a warning the first time this process has reason to."""
    logger.warning(message)


def refused(error: Exception, size: int) -> None:
    """Count a value that is not shared, and say once per reason what the user can do about it."""
    _tell("Values are copied instead of shared", error)
    COUNTERS.count_sent(getattr(error, "reason", SharedMemoryError.reason), size)
    logger.debug("sent %d bytes instead of sharing them: %s", size, str(error))


def kept_private(error: SharedMemoryError) -> None:
    """Say once why a process keeps private copies of what it has shared."""
    _tell("Shared values keep a private copy", error)


_told: set[str] = set()


def _tell(what: str, error: Exception) -> None:
    if isinstance(error, OutOfResources) and error.reason not in _told:
        _told.add(error.reason)
        # Whoever keeps records would keep the error, its frames, and the values in them.
        logger.warning("%s (%s): %s", what, error.reason, str(error))
