"""The delay of a timer that is due every millisecond: the longest time for which an event loop was kept from its work.

The loop's own work may keep it, or another thread that has the interpreter's lock or that the kernel serves first, or all
processors may be busy. So a ticker also notes the processor time that the loop's thread has used between two ticks, which is
its own work; and the delay without the time for which its thread waited for a processor, as the kernel tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Iterator

EVERY = 0.001
NOTHING = {"late": 0.0, "work": 0.0, "kept": 0.0}

Worst = dict[str, float]


class Ticker:
    """Ticks on the running loop, and remembers the longest delay ("late") and the most work.

    "kept" is the longest delay without waiting for a processor.
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

    async def stop(self) -> None:
        """Stop ticking."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def take(self) -> Worst:
        """Return the worst of each since the last call, in seconds."""
        # A delay that lasts until now shows at the next tick.
        await asyncio.sleep(2 * EVERY)
        worst, self._worst = self._worst, dict(NOTHING)
        return worst


_TICKERS: list[Ticker] = []
"""The ticker of this process, if it has one."""


async def take() -> Worst:
    """Return the worst of this process's loop since the last call; the first call starts to tick."""
    if not _TICKERS:
        _TICKERS.append(Ticker())
    return await _TICKERS[0].take()


@contextlib.contextmanager
def bystander() -> Iterator[asyncio.AbstractEventLoop]:
    """Run a loop in a thread that does nothing but tick: the machine alone can delay it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    take_in(loop)
    yield loop
    asyncio.run_coroutine_threadsafe(_TICKERS.pop().stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def take_in(loop: asyncio.AbstractEventLoop) -> Worst:
    """Call :func:`take` on a loop of another thread."""
    return asyncio.run_coroutine_threadsafe(take(), loop).result()
