"""How late an event loop is with what is due every millisecond: the longest time for which something kept it.

What kept it may be its own work, somebody else who had the interpreter's lock, or the machine. So a ticker also notes how
much processor time the loop's thread has used between two ticks: that is its own work, on a busy machine, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

EVERY = 0.001
NOTHING = {"late": 0.0, "work": 0.0}

Worst = dict[str, float]


class Ticker:
    """Ticks on the running loop, and remembers how late it was at worst, and how long the loop worked at most."""

    def __init__(self) -> None:
        self._worst = dict(NOTHING)
        self._task = asyncio.get_running_loop().create_task(self._tick())

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, worked = loop.time() + EVERY, time.thread_time()
            await asyncio.sleep(EVERY)
            seen = {"late": loop.time() - due, "work": time.thread_time() - worked}
            self._worst = {what: max(seconds, seen[what]) for what, seconds in self._worst.items()}

    async def take(self) -> Worst:
        """Return the worst of both since the last call, in seconds."""
        # What has kept the loop until now shows at the next tick.
        await asyncio.sleep(2 * EVERY)
        worst, self._worst = self._worst, dict(NOTHING)
        return worst


_TICKERS: list[Ticker] = []
"""The one of this process, when there is one."""


async def take() -> Worst:
    """Return the worst of this process's loop since the last call, which at first begins to tick."""
    if not _TICKERS:
        _TICKERS.append(Ticker())
    return await _TICKERS[0].take()


async def _serve(pipe: Connection) -> None:
    await take()
    pipe.send("ready")
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
