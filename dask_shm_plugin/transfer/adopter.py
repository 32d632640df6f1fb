"""List published values after an answer, and replace their owner's private copies by the shared ones."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor
from typing import Any

from dask_shm_plugin import notices
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.threads import call_in
from dask_shm_plugin.transfer.entries import Entries
from dask_shm_plugin.transfer.entry import Entry
from dask_shm_plugin.values import adoption, codec, handles
from dask_shm_plugin.values.handles import Handle

logger = logging.getLogger("dask_shm_plugin")

RETRY_PAUSES_S = (0.0, 1e-3, 1e-2)
"""Pauses (s) between looks at a value: a thread that has finished with it may hold a reference for a moment longer."""


class Adopter:
    """Lists the published values of one worker, and replaces its private copies.

    Parameters
    ----------
    entries
        The entries of the worker's values.
    threads
        The executor in which shared copies are mapped.

    Notes
    -----
    To be used on the worker's event loop. There must never be a moment when a copy stands for a value that may have
    been changed since. So a value is listed and adopted only if nothing else has reached it from before it was
    serialized until after it was copied.
    """

    def __init__(self, entries: Entries, threads: Executor) -> None:
        self._entries, self._threads = entries, threads

    async def settle(self, key: Any, entry: Entry, known: int = 0) -> None:
        """Adopt and list a value, if nothing else reaches it and the published copy equals it.

        Parameters
        ----------
        key, entry
            The key and the entry of the value.
        known
            The number of references to the value that the caller holds.
        """
        if entry.is_settling:
            return
        entry.is_settling = True
        try:
            if await self._is_settled(key, entry, known):
                if not (entry.is_adopted or entry.is_private) and entry.published and entry.published.copied:
                    entry = await self._adopt(key, entry, known)
                self._entries.list(key, entry)
        finally:
            entry.is_settling = False

    async def is_alone_soon(self, entry: Entry, known: int) -> bool:
        """Return whether nothing else reaches a value at one of several looks; give up once an answer is to read it.

        Parameters
        ----------
        entry
            The entry of the value.
        known
            The number of references to the value that the caller holds.
        """
        for pause in RETRY_PAUSES_S:
            if self._entries.look(entry, known):
                return True
            if entry.asks:
                return False
            await asyncio.sleep(pause)
        return self._entries.look(entry, known)

    async def _is_settled(self, key: Any, entry: Entry, known: int) -> bool:
        return (
            await self.is_alone_soon(entry, known)
            and entry.is_intact
            and entry.is_verified
            and self._entries.is_current(key, entry)
            and self._entries.is_in_memory(key, entry.value)
        )

    @step("adopt")
    async def _adopt(self, key: Any, entry: Entry, known: int) -> Entry:
        """Replace the private copy if its users cannot tell the difference; return the entry that is current then."""
        published = entry.published
        if published is None or not adoption.may_adopt(entry.value):
            entry.is_private = True
            return entry
        shared = await call_in(self._threads, _rebuild, published.handle)
        if shared is None or not adoption.is_faithful(shared, entry.value):
            entry.is_private = True
            return entry
        # While the thread was working, the key may have been released, replaced, spilled, read or published anew.
        if not await self._is_settled(key, entry, known) or entry.published is not published:
            return entry
        adopted = self._entries.adopt(key, entry, shared)
        if adopted is None:
            return entry
        if self._entries.is_current(key, adopted):
            COUNTERS.count("adopted", published.handle.size)
        return adopted


def _rebuild(handle: Handle) -> object | None:
    shared: object | None = None
    try:
        shared = handles.resolve(handle)
        shared = shared if codec.is_shared(shared) else None
    except SharedMemoryError as error:
        notices.kept_private(error)
    except Exception:
        logger.debug("a published value keeps its private copy", exc_info=True)
    return shared
