"""One half of a server is on at a time, whoever registers meanwhile."""

from __future__ import annotations

import asyncio
import logging
import weakref
from typing import Any, Protocol

from dask_shm_plugin.notices import warn_once

logger = logging.getLogger("dask_shm_plugin")


class Half(Protocol):
    """A nanny's or a worker's plugin, as far as it is switched on and off."""

    async def start(self, server: Any) -> None:
        """Step in front of a server's calls."""

    async def stop(self) -> None:
        """Put everything back; harmless when it was never started."""


class _Seat:
    """Where at most one half of a server sits; who comes or goes has it for himself."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.half: Half | None = None


_SEATS: weakref.WeakKeyDictionary[Any, _Seat] = weakref.WeakKeyDictionary()


async def switch_on(server: Any, half: Half) -> None:
    """Start a half in the place of the one that is on; says why when that fails, and does not raise.

    Two clients may register at the same time. Dask (2026.8.0) does not wait for the ``setup`` of the one plugin before
    it tears it down for the other, nor does a nanny ever tear down what it replaces.
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
    """Stop a half, unless another one has taken its place."""
    seat = _SEATS.setdefault(server, _Seat())
    async with seat.turn:
        if seat.half is half:
            seat.half = None
            await half.stop()
