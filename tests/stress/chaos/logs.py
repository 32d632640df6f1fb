"""The notes of a run's processes, summed, and the tracebacks and warnings of this package in their logs."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_notes(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the notes of the processes of a run."""
    with contextlib.suppress(FileNotFoundError), open(folder / "notes") as file:
        for line in file:
            yield json.loads(line)


def summary(folder: Path) -> dict[str, Any]:
    """Sum the notes."""
    made: Counter[int] = Counter()
    errors: Counter[str] = Counter()
    settled: set[int] = set()
    seen = {"checked": 0, "shared": 0, "wrong": 0, "hangs": 0, "recomputed_though_published": 0, "lost": 0}
    for one in read_notes(folder):
        what = one["what"]
        if what == "checked":
            seen["checked"] += one["count"]
            seen["shared"] += one["shared"]
        elif what == "made":
            made[one["number"]] += 1
            seen["recomputed_though_published"] += one["number"] in settled
        elif what == "settled":
            settled.add(one["number"])
        elif what == "lost":
            seen["lost"] += 1
        elif what == "error":
            errors[f"{one['operation']}: {one['kind']}"] += 1
        else:
            seen["wrong" if what == "wrong" else "hangs"] += 1
    seen["large_values_with_two_holders"] = len(settled)
    return {**seen, "recomputed": made.total() - len(made), "errors_of_dask": dict(errors.most_common())}


_TRACE = re.compile(r"Traceback \(most recent call last\):\n((?:[ \t|+]+.*\n)+)(.*)")
_FRAME = re.compile(r'File "([^"]+)", line \d+, in (\S+)')


def tracebacks_of_ours(folder: Path) -> dict[str, int]:
    """Count the tracebacks in the logs that end in this package or in one of its errors, except cancellations."""
    found: Counter[str] = Counter()
    for log in folder.glob("*.log"):
        for frames, error in _TRACE.findall(log.read_text(errors="replace")):
            places = _FRAME.findall(frames)
            if error.startswith("asyncio.exceptions.CancelledError"):
                continue
            if "dask_shm_plugin." in error or (places and "/dask_shm_plugin/" in places[-1][0]):
                found[f"{error[:120]} in {places[-1][1] if places else '?'}"] += 1
    return dict(found)


_WARNING = re.compile(
    r"dask_shm_plugin\S* - (?:WARNING|ERROR|CRITICAL) - (.*)|(\w*Warning: <(?:Draft|Block|Arena|Segment).*)"
)


def warnings_of_ours(folder: Path) -> dict[str, int]:
    """Count the package's warnings and errors in the logs."""
    found: Counter[str] = Counter()
    for log in folder.glob("*.log"):
        for said in _WARNING.findall(log.read_text(errors="replace")):
            found[re.sub(r"\d+", "N", "".join(said))[:160]] += 1
    return dict(found.most_common())
