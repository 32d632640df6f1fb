"""The command line, the medians and spreads of rounds, and how they are printed and written."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np

Spread = dict[str, float]


def parser(description: str | None, works: Sequence[str] = (), pairs: int = 0) -> argparse.ArgumentParser:
    """Return a parser of the options that all benchmarks have; ``--only`` and ``--pairs`` where they make sense."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: only to see that it works")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write medians and spreads to a file")
    if works:
        parser.add_argument("--only", nargs="+", choices=works, default=works, help="some of them (default: all)")
    if pairs:
        parser.add_argument("--pairs", type=int, help=f"rounds with and without the plugin (default: {pairs})")
    return parser


def head(asked: argparse.Namespace, *packages: str, **more: Any) -> dict[str, Any]:
    """Print and return the conditions of a measurement."""
    around = machine.surroundings(*packages)
    said = {**around, "memory": f"{around['memory'] / 2**30:.1f} GiB"}
    print(*(f"{name} {value}" for name, value in (said | more).items() if not isinstance(value, dict)), sep=", ")
    return {"is_quick": asked.quick, "surroundings": around, **more}


def spread(values: Iterable[float], factor: float = 1) -> Spread:
    """Return the median of some values, their least and most, their quartiles, and their number."""
    found = [factor * value for value in values]
    least, lower, upper, most = np.quantile(found, (0, 0.25, 0.75, 1)).tolist()
    return {"median": statistics.median(found), "min": least, "q1": lower, "q3": upper, "max": most, "n": len(found)}


def figure(
    what: str, value: float | Iterable[float], unit: str, target: float | None = None, factor: float = 1
) -> dict[str, Any]:
    """Return one line of a table: the median of some values with its spread, or a number that has none.

    ``target`` is the highest value that is wanted, or None where there is no target.
    """
    known = spread(value, factor) if isinstance(value, Iterable) else {"median": factor * value}
    result = {"what": what, "value": known.pop("median"), "unit": unit}
    return result | ({} if target is None else {"target": target}) | known


def show_figures(figures: list[dict[str, Any]]) -> None:
    """Print figures beside their targets."""
    rows = []
    for one in figures:
        wanted, verdict = "", ""
        if (target := one.get("target")) is not None:
            wanted, verdict = f"at most {target:.4g}", "met" if one["value"] <= target else "NOT MET"
        rows.append([one["what"], f"{one['value']:.4g} {one['unit']}", wanted, verdict])
    table(["", "measured", "target", ""], rows)


def table(head: list[str], rows: list[list[str]]) -> None:
    """Print a table; all columns but the first are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for first, *others in (head, *rows):
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        print(f"{first:<{widths[0]}}", *cells, sep="  ", flush=True)


def mib(bytes: float) -> str:
    """Return a number of bytes in MiB."""
    return f"{bytes / machine.MIB:,.0f}"


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result, if a path was given."""
    if path:
        path.write_text(_text(result) + "\n")


def _text(value: Any, indent: str = "") -> str:
    """Return JSON with one line per innermost object, and floats with ten decimals: tenths of a nanosecond, for seconds."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    if not any(isinstance(child, dict | list | tuple) for child in children):
        rounded = json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 10))
        return json.dumps(rounded, ensure_ascii=False)
    deeper, has_names = indent + " ", isinstance(value, dict)
    items = value.items() if has_names else enumerate(value)
    lines = [(f"{json.dumps(str(name))}: " if has_names else "") + _text(child, deeper) for name, child in items]
    begin, end = "{}" if has_names else "[]"
    return f"{begin}\n{deeper}" + f",\n{deeper}".join(lines) + f"\n{indent}{end}"
