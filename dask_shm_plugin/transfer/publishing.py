"""Publish a serialized value, or count the reason why it is not shared."""

from __future__ import annotations

from dask_shm_plugin import notices
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.values import codec
from dask_shm_plugin.values.codec import Published, Serialized


def publish_or_count(serialized: Serialized, arena: Arena) -> Published | None:
    """Publish a value in an arena. If that fails, count the reason, warn at most once per reason, and return None."""
    try:
        published = codec.publish(serialized, arena)
    except (SharedMemoryError, OSError, MemoryError) as error:
        notices.refused(error, serialized.size)
        return None
    if published.copied:
        COUNTERS.count("published", published.copied)
    return published
