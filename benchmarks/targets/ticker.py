"""How late an event loop is with what is due every millisecond: the longest time for which something kept it."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

EVERY = 0.001


class Ticker:
    """Ticks on the running loop, and remembers how late it was at worst."""

    def __init__(self) -> None:
        self._latest = 0.0
        self._task = asyncio.get_running_loop().create_task(self._tick())

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + EVERY
            await asyncio.sleep(EVERY)
            self._latest = max(self._latest, loop.time() - due)

    async def take(self) -> float:
        """Return how late it was at worst since the last call, in seconds."""
        # What has kept the loop until now shows at the next tick.
        await asyncio.sleep(2 * EVERY)
        latest, self._latest = self._latest, 0.0
        return latest


_TICKERS: list[Ticker] = []
"""The one of this process, when there is one."""


async def take() -> float:
    """Return the worst lateness of this process's loop since the last call, which at first begins to tick."""
    if not _TICKERS:
        _TICKERS.append(Ticker())
    return await _TICKERS[0].take()


async def _serve(pipe: Connection) -> None:
    await take()
    pipe.send(0.0)
    while await asyncio.to_thread(pipe.recv) is not None:
        pipe.send(await take())


def _run(pipe: Any) -> None:
    asyncio.run(_serve(pipe))


@contextlib.contextmanager
def bystander() -> Iterator[Connection]:
    """Start a process whose loop does nothing but tick: what keeps it is the machine. Any message but None asks it."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs,))
    process.start()
    theirs.close()
    try:
        pipe.recv()
        yield pipe
    finally:
        with contextlib.suppress(OSError):
            pipe.send(None)
        process.join()
