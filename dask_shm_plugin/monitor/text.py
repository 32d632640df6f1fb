"""Tables and figures as plain text, for a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dask.utils import format_bytes

from dask_shm_plugin.monitor.seen import BlockSeen, Snapshot

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
_MAX_CELL = 48
"""Maximum number of characters of a cell; the middle of a longer one is left out."""


def duration(seconds: float | None) -> str:
    """Return a time in its largest unit, for example "3 min"; "?" if it is not known."""
    if seconds is None:
        return "?"
    return next((f"{int(seconds // size)} {unit}" for size, unit in _UNITS if seconds >= size), "0 s")


def shortened(text: str, width: int = _MAX_CELL) -> str:
    """Return a text with the middle left out if it is longer than ``width`` characters."""
    half = (width - 1) // 2
    return text if len(text) <= width else f"{text[: width - 1 - half]}…{text[len(text) - half :]}"


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> list[str]:
    """Return the lines of a table with aligned columns.

    Parameters
    ----------
    header
        The title of each column.
    rows
        The cells of each row.
    right
        The titles of the columns that are aligned to the right.
    """
    lines = [[shortened(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if title in right else cell.ljust(width)
            for cell, width, title in zip(line, widths, header, strict=True)
        ).rstrip()
        for line in lines
    ]


def arenas(found: Sequence[Snapshot]) -> list[str]:
    """Return one line for each arena, and a line of totals if there are several; LARGE is mapped by large pages."""
    header = ("ARENA", "CLUSTER", "CAPACITY", "USED", "RESIDENT", "LARGE", "BLOCKS", "MEMBERS", "AGE", "MEMORY")
    rows = [
        (
            one.arena[:8],
            one.cluster[-12:],
            *map(format_bytes, (one.capacity, one.used, one.resident)),
            "?" if one.large is None else format_bytes(one.large),
            str(len(one.blocks)),
            str(len(one.members)),
            duration(one.age),
            one.kind,
        )
        for one in found
    ]
    if len(found) > 1:
        sums = [sum(getattr(one, name) for one in found) for name in ("capacity", "used", "resident")]
        counts = [sum(len(getattr(one, name)) for one in found) for name in ("blocks", "members")]
        rows.append(("total", "", *map(format_bytes, sums), "", *map(str, counts), "", ""))
    return columns(header, rows, header[2:9])


def blocks(found: Sequence[BlockSeen]) -> list[str]:
    """Return, for each block, a line and the reasons why it is not freed."""
    header = ("BLOCK", "SIZE", "AGE", "STATE", "KEY", "TYPE", "SHAPE", "OWNER")
    cells = [
        (
            one.block,
            format_bytes(one.size),
            duration(one.age),
            one.state,
            ", ".join(one.keys) or "(none: released, or only travelled)",
            one.type,
            one.shape,
            one.owner,
        )
        for one in found
    ]
    title, *lines = columns(header, cells, ("SIZE", "AGE"))
    reasons = [[f"    {holder.name} (pid {holder.pid}): {holder.reason}" for holder in one.holders] for one in found]
    return [title, *(text for line, why in zip(lines, reasons, strict=True) for text in (line, *why))]


def arena(one: Snapshot, order: str, limit: int) -> list[str]:
    """Return everything about an arena; at most ``limit`` of its blocks, the first by "size" or by "age"."""
    shown = sorted(one.blocks, key=lambda block: block.age or 0 if order == "age" else block.size, reverse=True)[:limit]
    members = [
        (str(member.pid), member.state + (", stopped" if member.is_stopped else ""), role)
        for member in one.members
        for role in [" ".join(role) for role in member.roles] or [""]
    ]
    warm = max(0, one.resident - one.used)
    return [
        f"Arena {one.arena[:8]} of cluster {one.cluster or '?'}, {one.kind}, age {duration(one.age)}",
        f"{format_bytes(one.used)} used in {len(one.blocks)} blocks, {format_bytes(one.resident)} resident "
        f"({format_bytes(warm)} of it table, labels and warm pages), {format_bytes(one.capacity)} capacity",
        f"largest value that fits: {format_bytes(one.largest_fit)} of {format_bytes(one.capacity - one.used)} free",
        "",
        *columns(("PID", "STATE", "ROLE"), members),
        "",
        *(blocks(shown) if shown else ["no blocks"]),
        *([f"… and {len(one.blocks) - len(shown)} more blocks (--limit)"] if len(shown) < len(one.blocks) else []),
    ]


def as_json(item: Any) -> str:
    """Return dicts and lists as indented JSON."""
    return json.dumps(item, indent=2)
