"""Readings of this machine: memory, loopback traffic, the time of a copy, versions. Needs NumPy alone."""

from __future__ import annotations

import datetime
import os
import platform
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

MIB = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")


def field(path: str, *names: str) -> int:
    """Return the sum of some fields of a file in /proc that are given in kB, in bytes."""
    fields = dict(line.split(":", 1) for line in Path(path).read_text().splitlines())
    return sum(int(fields[name].split()[0]) << 10 for name in names)


def shared() -> int:
    """Return the bytes of shared memory of the whole machine."""
    return field("/proc/meminfo", "Shmem")


def private(pids: list[int]) -> int:
    """Return the bytes of anonymous memory of some processes; 0 for a process that has ended."""
    total = 0
    for pid in pids:
        try:
            total += field(f"/proc/{pid}/status", "RssAnon")
        except (FileNotFoundError, ProcessLookupError, KeyError):  # ended, or a zombie
            continue
    return total


def family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
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
    """Return the bytes that the loopback interface has received so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    return int(dict(line.strip().split(":", 1) for line in lines)["lo"].split()[0])


class Watch:
    """A thread that calls a function every so often, from its creation until :meth:`stop`."""

    def __init__(self, look: Callable[[], tuple[float, ...]], every: float) -> None:
        self._look, self._every, self._over = look, every, threading.Event()
        self._looks: list[tuple[float, ...]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(self._every):
            self._looks.append((time.monotonic(), *self._look()))

    def stop(self) -> np.ndarray:
        """End, look once more, and return a row for each look: the time, and the results."""
        self._over.set()
        self._thread.join()
        return np.array([*self._looks, (time.monotonic(), *self._look())])


class WarmCopy:
    """A copy into memory whose pages exist: the yardstick of this machine."""

    def __init__(self, size: int) -> None:
        self._source, self._target = make(0, size), np.zeros(size // 8)
        self.seconds()

    def seconds(self, number: int = 0) -> float:
        """Copy, and return the time; the number of the round does not matter."""
        start = time.perf_counter()
        np.copyto(self._target, self._source)
        return time.perf_counter() - start


def make(seed: int, size: int) -> np.ndarray:
    """Return an array of random numbers, every page written."""
    return np.random.default_rng(seed).random(size // 8)


def touch_memory() -> None:
    """Use 2 GiB and give them back, so that the host of a virtual machine has found the memory that is measured next."""
    np.ones(2 << 30, np.uint8)


def read_pages(x: np.ndarray) -> int:
    """Read one element of every page, and return the sum of their bits: exact, unlike a sum of floats."""
    return int(x.view(np.uint64)[:: PAGE // 8].sum())


def surroundings(*packages: str) -> dict[str, Any]:
    """Return the conditions of a measurement: date, machine, and the versions of some packages."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "linux": platform.release(),
        "processors": os.cpu_count(),
        "memory": field("/proc/meminfo", "MemTotal"),
    }
