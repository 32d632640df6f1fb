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
    Nothing waits for the scheduler.
    """

    def __init__(self, worker: Any, arena_id: str) -> None:
        self._worker, self._arena_id = worker, arena_id
        self._told: set[Any] = set()
        self._news: dict[Any, bool] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = False

    def published(self, key: Any, size: int) -> None:
        """Tell about a key within 0.05 s, if its value of ``size`` bytes is large; to be called on the event loop."""
        if size >= LARGE_BYTES and not self._is_over:
            self._told.add(key)
            self._note(key, is_published=True)

    def withdrawn(self, key: Any) -> None:
        """Tell that the value of a key no longer lies in the arena, if the opposite was told; for any thread."""
        if key in self._told and not self._is_over:
            self._told.discard(key)
            self._worker.loop.add_callback(self._note, key, is_published=False)

    def stop(self) -> None:
        """Tell nothing any more."""
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()

    def _note(self, key: Any, *, is_published: bool) -> None:
        if self._is_over:
            return
        self._news[key] = is_published
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_PAUSE_S, self._tell)

    def _tell(self) -> None:
        self._timer = None
        told, self._news = self._news, {}
        published = [key for key, is_published in told.items() if is_published]
        withdrawn = [key for key, is_published in told.items() if not is_published]
        holder = self._worker.contact_address or self._worker.address
        try:
            self._worker.log_event(TOPIC, news(self._arena_id, published, withdrawn, holder))
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
