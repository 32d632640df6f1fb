"""Tell the scheduler which keys this process has published; a scheduler without the package keeps the message unread."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from dask_shm_plugin.scheduling.nodes import LARGE_BYTES, TOPIC, news

logger = logging.getLogger("dask_shm_plugin")

_PAUSE_S = 0.05
"""Keys of this time go in one message. Scattered keys are known to the scheduler only after the worker has answered."""


class Telling:
    """Tells the scheduler which values of one worker lie in the arena, from its creation to :meth:`stop`.

    Parameters
    ----------
    worker
        A running worker.
    arena_id
        The id of its arena, in hexadecimal digits.

    Notes
    -----
    To be used on the worker's event loop. Nothing waits for the scheduler.
    """

    def __init__(self, worker: Any, arena_id: str) -> None:
        self._worker, self._arena_id = worker, arena_id
        self._keys: set[Any] = set()
        self._timer: asyncio.TimerHandle | None = None

    def published(self, key: Any, size: int) -> None:
        """Tell about a key within 0.05 s, if its value of ``size`` bytes is large."""
        if size >= LARGE_BYTES:
            self._keys.add(key)
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(_PAUSE_S, self._tell)

    def stop(self) -> None:
        """Tell nothing any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _tell(self) -> None:
        self._timer = None
        keys, self._keys = self._keys, set()
        try:
            self._worker.log_event(TOPIC, news(self._arena_id, keys))
        except Exception:
            logger.debug("the scheduler does not know which values are published", exc_info=True)


async def tell(scheduler: Any, arena_id: str, sizes: dict[Any, int]) -> None:
    """Tell the scheduler about keys that a client has published, and wait until it knows.

    Parameters
    ----------
    scheduler
        The rpc to the scheduler.
    arena_id
        The id of the arena, in hexadecimal digits.
    sizes
        The size (bytes) of each value by key.
    """
    large = [key for key, size in sizes.items() if size >= LARGE_BYTES]
    if large:
        try:
            await scheduler.log_event(topic=TOPIC, msg=news(arena_id, large))
        except Exception:
            logger.debug("the scheduler does not know which values are published", exc_info=True)
