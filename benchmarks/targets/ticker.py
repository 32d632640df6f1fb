"""How late an event loop is with what is due every millisecond: the longest time for which something kept it.

What kept it may be its own work, somebody else who had the interpreter's lock or whom the kernel let map first, or that all
processors were busy. So a ticker also notes how much processor time the loop's thread has used between two ticks, which is
its own work; and how late it was without the time for which its thread waited for a processor, as the kernel says.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

EVERY = 0.001
NOTHING = {"late": 0.0, "work": 0.0, "kept": 0.0}

Worst = dict[str, float]


class Ticker:
    """Ticks on the running loop, and remembers how late it was at worst, and how long the loop worked at most.

    *Kept* is how late it was at worst without waiting for a processor.
    """

    def __init__(self) -> None:
        self._worst = dict(NOTHING)
        self._scheduling = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        self._task = asyncio.get_running_loop().create_task(self._tick())

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, worked, queued = loop.time() + EVERY, time.thread_time(), self._queued()
            await asyncio.sleep(EVERY)
            late = loop.time() - due
            seen = {"late": late, "work": time.thread_time() - worked, "kept": late - (self._queued() - queued)}
            self._worst = {what: max(seconds, seen[what]) for what, seconds in self._worst.items()}

    def _queued(self) -> float:
        """Return the seconds for which this thread has waited for a processor so far."""
        return int(os.pread(self._scheduling, 64, 0).split()[1]) / 1e9

    async def take(self) -> Worst:
        """Return the worst of each since the last call, in seconds."""
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
