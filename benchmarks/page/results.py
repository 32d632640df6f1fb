"""The results: files in a folder, each of which may be missing. And how their numbers are written."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

MIB = 1 << 20
ARMS = ("stock", "plugin")
COMMANDS = {
    "one_copy": "one_copy.py",
    "targets": "targets",
    "peers": "peers",
    "tax": "tax.py",
    "workflows": "workflows.py",
    "workloads": "workloads.py",
    "fanout": "fanout.py",
    "shuffles": "shuffles.py",
    "born": "born.py",
    "types_of_values": "types_of_values.py",
    "peaks": "peaks.py",
    "nodes": "nodes.py",
    "nodes_slow": "nodes.py --slow",
}
"""The files, without their ending, and the scripts that write them."""

Results = dict[str, Any]


def load(folder: Path) -> Results:
    """Return the contents of all files that exist."""
    files = {name: folder / f"{name}.json" for name in COMMANDS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def work(results: Results, name: str) -> dict[str, Any]:
    """Return one of the works of `targets`; empty, if it was not measured."""
    return results.get("targets", {}).get("works", {}).get(name, {})


def summary(results: Results, name: str) -> dict[str, Any]:
    """Return the summary of a file; empty, if it is missing."""
    return results.get(name, {}).get("summary", {})


def at_size(results: Results, size: int) -> dict[str, dict[str, float]]:
    """Return the medians of all peers at a size."""
    times = {name: peer.get("times", {}).get(str(size), {}) for name, peer in results["peers"]["peers"].items()}
    return {name: {what: one["median"] for what, one in peer.items()} for name, peer in times.items() if peer}


def not_measured(name: str) -> str:
    """Return the sentence that stands where a file is missing."""
    return f"Not measured yet: `python benchmarks/{COMMANDS[name]} --json benchmarks/results/{name}.json`."


def conditions(result: dict[str, Any]) -> str:
    """Return the machine, the versions and the date of a measurement."""
    around = dict(result["surroundings"])
    day, linux = datetime.date.fromisoformat(around.pop("date")), around.pop("linux").partition("-")[0]
    where = f"{around.pop('processors')} processors, {around.pop('memory') / 2**30:.0f} GiB, Linux {linux}"
    versions = ", ".join(f"{'Python' if name == 'python' else name} {version}" for name, version in around.items())
    small = "; **small sizes, only to see that it works**" if result.get("is_quick") else ""
    return f"{where}; {versions}; {day.day} {day:%B %Y}{small}"


def with_unit(value: float, unit: str) -> str:
    """Return a number with three significant digits, and its unit."""
    digits = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {unit}".rstrip()


def size_of(size: int) -> str:
    """Return a size in MiB, or in bytes if it is small."""
    return f"{size / MIB:,.0f} MiB" if size >= MIB else f"{size} bytes"


def ms(seconds: float) -> str:
    """Return a time in milliseconds."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:,.1f}"
