"""Figures of arenas for people in a Python session: dicts with a readable text and a table for notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from dask.utils import format_bytes

from dask_shm_plugin import metrics
from dask_shm_plugin.monitor import text

# Only the colour of the text around it is used, so that the table is readable in light and dark notebooks.
_CELL = "padding: 2px 12px; text-align: right; border: none; background: none; color: inherit"
_BAR = "display: inline-block; width: 12em; height: 0.7em; border: 1px solid currentColor; vertical-align: middle"
_PART = "display: block; height: 100%; background: currentColor; opacity: 0.6"


class ArenaFigures(dict[str, dict[str, Any]]):
    """The result of :func:`stats`: a dict, shown as a table."""

    def __repr__(self) -> str:
        if not self:
            return "no arenas: sharing is off, or no worker has joined yet"
        return "\n".join(line for name, one in self.items() for line in [*_lines(name, one), ""]).rstrip()

    def _repr_html_(self) -> str:
        return "".join(map(_html_of, self, self.values())) or f"<p>{html.escape(repr(self))}</p>"


class Explanations(dict[str, dict[str, Any]]):
    """The result of :func:`explain`: a dict, shown as a line for each process."""

    def __repr__(self) -> str:
        rows = [(address, one["state"], one["why"]) for address, one in self.items()]
        header = ("PROCESS", "STATE")
        lines = text.columns(header, [row[:2] for row in rows])[1:]
        return "\n".join(f"{line}  {why}" for line, (_, _, why) in zip(lines, rows, strict=True)) or "no such value"

    def _repr_html_(self) -> str:
        rows = ((address, one["state"], one["why"]) for address, one in self.items())
        return _table([("process", "state", "why"), *rows])


def _lines(name: str, one: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {_room(one)}",
        *text.columns(
            ("  EVENT", "VALUES", "BYTES"),
            [(f"  {event}", *rest) for event, *rest in _events(one)],
            ("VALUES", "BYTES"),
        ),
    ]


def _room(one: dict[str, Any]) -> str:
    workers = f"{len(one['workers'])} workers"
    if one["used"] is None:
        return f"its state cannot be read now; {workers}"
    used, capacity, room = (format_bytes(one[name]) for name in ("used", "capacity", "room"))
    return (
        f"{used} of {capacity} used in {one['blocks']} blocks by {one['members']} members, {workers}; "
        f"room for {room} ({one['bound_by']})"
    )


def _events(one: dict[str, Any]) -> list[tuple[str, str, str]]:
    pairs = [(event, one[event]) for event in metrics.EVENTS]
    pairs += [(f"sent: {reason}", pair) for reason, pair in sorted(one["sent"].items())]
    return [(event, f"{pair['count']:,}", format_bytes(pair["bytes"])) for event, pair in pairs]


def _html_of(name: str, one: dict[str, Any]) -> str:
    share = 100 * (one["used"] or 0) / (one["capacity"] or 1)
    bar = f'<span style="{_BAR}"><span style="{_PART}; width: {share:.1f}%"></span></span>'
    head = f"<b>{html.escape(name)}</b> {bar} {html.escape(_room(one))}"
    return f"<details open><summary>{head}</summary>{_table([('', 'values', 'bytes'), *_events(one)])}</details>"


def _table(rows: Iterable[Iterable[str]]) -> str:
    lines = ("".join(f'<td style="{_CELL}">{html.escape(cell)}</td>' for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr style=background:none>{line}</tr>' for line in lines)}</table>"
