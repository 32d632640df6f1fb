"""Keep at most one half of the plugin active per server, even if several clients register at the same time."""

from __future__ import annotations

import asyncio
import logging
import weakref
from typing import Any, Protocol

from dask_shm_plugin.notices import warn_once

logger = logging.getLogger("dask_shm_plugin")


class Half(Protocol):
    """The nanny's or the worker's half of the plugin, as far as it is switched on and off."""

    async def start(self, server: Any) -> None:
        """Replace functions of the server, and join the arena."""

    async def stop(self) -> None:
        """Put the server's functions back in place, and leave the arena; harmless if it was never started."""


class _Seat:
    """The place of the active half of a server; under the lock, one half is started or stopped at a time."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.half: Half | None = None


_SEATS: weakref.WeakKeyDictionary[Any, _Seat] = weakref.WeakKeyDictionary()


async def switch_on(server: Any, half: Half) -> None:
    """Start a half in place of the active one; if that fails, warn with the reason and do not raise.

    Two clients may register at the same time. Dask (2026.8.0) does not wait for the ``setup`` of a worker plugin to end
    before it tears the plugin down for another one. A nanny never tears down a plugin that it replaces.
    """
    seat = _SEATS.setdefault(server, _Seat())
    async with seat.turn:
        earlier, seat.half = seat.half, half
        if earlier is not None:
            await earlier.stop()
        try:
            await half.start(server)
        except Exception as error:
            warn_once(f"Sharing is off in this process: {type(error).__name__}: {error}")
            logger.debug("could not start %r", half, exc_info=True)


async def switch_off(server: Any, half: Half) -> None:
    """Stop a half, unless another half has taken its place."""
    seat = _SEATS.setdefault(server, _Seat())
    async with seat.turn:
        if seat.half is half:
            seat.half = None
            await half.stop()
