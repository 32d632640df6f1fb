"""What this machine says of itself: memory, loopback, the time of a copy, names and versions."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

PAGE = os.sysconf("SC_PAGE_SIZE")
STEP = PAGE // 8


def field(path: str, name: str) -> int:
    """Return a field of a file in /proc that is given in kB, in bytes."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise LookupError(f"{path} has no {name}")


def shared() -> int:
    """Return the bytes of shared memory of the whole machine."""
    return field("/proc/meminfo", "Shmem")


def private(pids: list[int]) -> int:
    """Return the bytes of memory of some processes that belongs to nobody else; none of one that is gone."""
    total = 0
    for pid in pids:
        try:
            total += field(f"/proc/{pid}/status", "RssAnon")
        except (FileNotFoundError, ProcessLookupError, LookupError):  # gone, or a zombie
            continue
    return total


def family(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def loopback() -> int:
    """Return the bytes that the loopback interface has carried so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "lo":
            return int(figures.split()[0])
    raise LookupError("no loopback interface")


class WarmCopy:
    """A copy into memory that exists: the yardstick of this machine."""

    def __init__(self, size: int) -> None:
        self._source, self._target = make(0, size), np.zeros(size // 8)
        self.seconds()

    def seconds(self) -> float:
        """Copy, and return how long that took."""
        start = time.perf_counter()
        np.copyto(self._target, self._source)
        return time.perf_counter() - start


def warm_copy(size: int) -> float:
    """Return the seconds of a copy into memory that exists, at a quiet moment."""
    copy = WarmCopy(size)
    return statistics.median(copy.seconds() for _ in range(5))


def make(seed: int, size: int) -> np.ndarray:
    """Return an array of random numbers, every page written."""
    return np.random.default_rng(seed).random(size // 8)


def read_pages(x: np.ndarray) -> int:
    """Read one element of every page, and sum their bits, which unlike a sum of floats is exact."""
    return int(x.view(np.uint64)[::STEP].sum())


def surroundings(*packages: str) -> dict[str, Any]:
    """Return what a reader must know to judge the figures, with the versions of some packages."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "linux": platform.release(),
        "processors": os.cpu_count(),
        "memory": field("/proc/meminfo", "MemTotal"),
    }
