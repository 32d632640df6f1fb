"""``dask shm top``: the arenas of this user, live in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import click
from dask.utils import format_bytes

from dask_shm_plugin import metrics
from dask_shm_plugin.monitor import arenas, text
from dask_shm_plugin.monitor.seen import BlockSeen, Snapshot

_ORDERS: dict[str, tuple[str, Callable[[BlockSeen], float]]] = {
    "s": ("size", lambda block: block.size),
    "a": ("age", lambda block: block.age or 0),
    "h": ("holders", lambda block: len(block.holders)),
}
_QUIT = {"q", "\x1b"}


class Look(NamedTuple):
    """Snapshots of all arenas, and the time of the monotonic clock, in seconds, at which they were taken."""

    at: float
    found: list[Snapshot]


def watch(interval: float, count: int) -> None:
    """Print a frame every ``interval`` seconds, ``count`` times (0: for ever); in a terminal, in place and with keys."""
    if not count and sys.stdout.isatty() and sys.stdin.isatty():
        import curses

        curses.wrapper(_watch_screen, interval)
        return
    before = None
    for n in range(count or sys.maxsize):
        if n:
            time.sleep(interval)
        now = _look()
        click.echo("\n".join([*frame(now, before, "s"), ""]))
        before = now


def frame(now: Look, before: Look | None, order: str) -> list[str]:
    """Return the lines of one frame: the arenas, the rates since the look before, and the blocks in order."""
    name, key = _ORDERS[order]
    blocks = sorted((block for one in now.found for block in one.blocks), key=key, reverse=True)
    return [
        *text.arenas(now.found),
        "",
        *rates(now, before),
        "",
        f"blocks by {name} (s: size, a: age, h: holders, q: quit)",
        *text.blocks(blocks),
    ]


def rates(now: Look, before: Look | None) -> list[str]:
    """Return the bytes per second that were published, attached, found and sent by reason, as lines of text."""
    if before is None:
        return ["rates: after the next look"]
    seconds = max(now.at - before.at, 1e-3)
    new, old = _bytes_counted(now.found), _bytes_counted(before.found)
    # A process that has left takes its counts with it.
    grown = {event: max(0, size - old.get(event, 0)) / seconds for event, size in new.items()}
    shown = {event: rate for event, rate in grown.items() if rate or event in metrics.EVENTS}
    return [f"{event} {format_bytes(int(rate))}/s" for event, rate in shown.items()]


def _bytes_counted(found: list[Snapshot]) -> dict[str, int]:
    total: dict[str, Any] = {}
    for counters in (counters for one in found for counters in one.counters.values()):
        metrics.add(total, counters)
    sizes = {event: total.get(event, {}).get("bytes", 0) for event in metrics.EVENTS}
    return sizes | {f"sent ({reason})": pair["bytes"] for reason, pair in total.get("sent", {}).items()}


def _look() -> Look:
    return Look(time.monotonic(), arenas.snapshots())


def _watch_screen(screen: Any, interval: float) -> None:
    import curses

    curses.use_default_colors()
    curses.curs_set(0)
    screen.timeout(int(interval * 1000))
    order, before, now = "s", None, _look()
    while True:
        height, width = screen.getmaxyx()
        screen.erase()
        for at, line in enumerate(frame(now, before, order)[: height - 1]):
            screen.addnstr(at, 0, line, width - 1)
        screen.refresh()
        pressed = screen.getch()
        key = chr(pressed) if 0 <= pressed < 256 else ""
        if key in _QUIT:
            return
        if key in _ORDERS:
            order = key
        elif pressed == -1:  # the time is over: look again
            before, now = now, _look()
