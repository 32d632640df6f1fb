"""What a user is told: rarely, once, and with the remedy. Imports nowhere fail on account of this module."""

from __future__ import annotations

import functools
import logging

from dask_shm_plugin.exceptions import ArenaFull, MappingRefused, SharedMemoryError
from dask_shm_plugin.metrics import COUNTERS

logger = logging.getLogger("dask_shm_plugin")


@functools.lru_cache(maxsize=64)
def warn_once(message: str) -> None:
    """Log a warning the first time this process has reason to."""
    logger.warning(message)


def refused(error: SharedMemoryError, size: int) -> None:
    """Count a value that is not shared, and say once per reason what the user can do about it."""
    COUNTERS.count_sent(error.reason, size)
    if isinstance(error, (ArenaFull, MappingRefused)):
        _warn_of(error.reason, str(error))
    logger.debug("sent %d bytes instead of sharing them: %s", size, error)


_told: set[str] = set()


def _warn_of(reason: str, remedy: str) -> None:
    if reason not in _told:
        _told.add(reason)
        logger.warning("Values are copied instead of shared (%s): %s", reason, remedy)
