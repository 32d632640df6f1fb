"""What was measured: the files in a folder, each of which may be missing."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

COMMANDS = {
    "one_copy": "one_copy.py",
    "targets": "targets",
    "peers": "peers",
    "tax": "tax.py",
    "workflows": "workflows.py",
    "workloads": "workloads.py",
}
"""The files, without their ending, and the scripts that write them."""

NOT_VERSIONS = ("date", "linux", "processors", "memory")

Results = dict[str, Any]


def load(folder: Path) -> Results:
    """Return the contents of all files that are there."""
    files = {name: folder / f"{name}.json" for name in COMMANDS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def work(results: Results, name: str) -> dict[str, Any] | None:
    """Return one of the works of `targets`, if it was measured."""
    found: dict[str, Any] | None = results.get("targets", {}).get("works", {}).get(name)
    return found


def not_measured(name: str) -> str:
    """Return the sentence that stands where a file is missing."""
    return f"Not measured yet: `python benchmarks/{COMMANDS[name]} --json benchmarks/results/{name}.json`."


def conditions(result: dict[str, Any]) -> str:
    """Return on what and when something was measured."""
    around = result["surroundings"]
    day = datetime.date.fromisoformat(around["date"])
    names = {"python": "Python"}
    versions = ", ".join(f"{names.get(n, n)} {v}" for n, v in around.items() if n not in NOT_VERSIONS)
    linux, memory = around["linux"].partition("-")[0], around["memory"] / 2**30
    where = f"{around['processors']} processors, {memory:.0f} GiB, Linux {linux}; {versions}"
    small = "; **small sizes, only to see that it works**" if result.get("is_quick") else ""
    return f"{where}; {day.day} {day:%B %Y}{small}"
