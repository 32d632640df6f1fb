"""Observations from outside: the arena that a process uses, and the time until a dead member is reclaimed."""

from __future__ import annotations

import contextlib
import mmap
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from dask_shm_plugin.linux import processes
from dask_shm_plugin.table.layout import TABLE_BYTES
from dask_shm_plugin.table.table import Table

RECLAIM_LIMIT_S = 2.0
_RECLAIM_TIMEOUT_S = 20.0


def open_shared_memory(process: psutil.Process) -> Iterator[tuple[str, str]]:
    """Yield the package's shared memory that a process has open: the path of each descriptor, and its target."""
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                name = os.readlink(entry)
                if name.startswith(("/dev/shm/dask-shm", "/memfd:dask-shm")):
                    yield str(entry), name


def segment_of(process: psutil.Process) -> str | None:
    """Return the path of the descriptor under which a process has the segment of an arena open, if there is one."""
    return next((path for path, name in open_shared_memory(process) if "segment" in name), None)


def names_used_by(processes: list[psutil.Process]) -> set[str]:
    """Return the names in /dev/shm that some processes have open."""
    used = [name for process in processes for _, name in open_shared_memory(process)]
    return {name for name in used if name.startswith("/dev/shm") and not name.endswith("(deleted)")}


class DyingProcess(NamedTuple):
    """A process that is about to be killed, its forked children, and the table that lists it, if there is one."""

    pid: int
    started: int
    children: list[int]
    table: Table | None

    @classmethod
    def observe(cls, process: psutil.Process) -> DyingProcess:
        """Record the facts that cannot be read after the death."""
        path = segment_of(process)
        with contextlib.suppress(psutil.Error):
            children = [child.pid for child in process.children()]
            return cls(process.pid, processes.start_time(process.pid), children, _table_at(path) if path else None)
        return cls(process.pid, 0, [], None)

    @property
    def is_member(self) -> bool:
        """Whether the table lists the process as a member."""
        return self.table is not None and self.table.members.find(self.pid, self.started) is not None

    @property
    def is_gone(self) -> bool:
        """Whether the process, and every child that inherited its memory, is gone."""
        return not any(map(_is_alive, [self.pid, *self.children]))


class ReclaimTimes:
    """Measures the time until other members have reclaimed a dead member.

    Notes
    -----
    Reads the table without being a member, which has no effect on the members. A clock starts when the dead process
    and its forked children are gone. It starts again while any process is stopped, because that one may hold the lock.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.never = 0
        self._pending: list[tuple[DyingProcess, float | None]] = []

    def add(self, death: DyingProcess) -> None:
        """Watch a dying process, if it is a member."""
        if death.is_member:
            self._pending.append((death, None))

    def check(self, *, stopped: bool) -> None:
        """Check all watched processes once."""
        now = time.monotonic()
        pending, self._pending = self._pending, []
        for death, since in pending:
            if stopped or since is None:
                self._pending.append((death, now if death.is_gone else None))
            elif not death.is_member:
                self.seconds.append(now - since)
            elif now - since > _RECLAIM_TIMEOUT_S:
                self.never += 1
            else:
                self._pending.append((death, since))

    def clear(self) -> None:
        """Stop watching, because all members that could reclaim are dead, too."""
        self._pending.clear()

    def report(self) -> dict[str, Any]:
        """Return the figures."""
        seconds = self.seconds or [0.0]
        return {
            "reclaimed": len(self.seconds),
            "median_seconds": round(statistics.median(seconds), 2),
            "longest_seconds": round(max(seconds), 2),
            "later_than_two_seconds": sum(one > RECLAIM_LIMIT_S for one in self.seconds),
            "never": self.never,
        }


def _table_at(path: str) -> Table | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return Table(memoryview(mmap.mmap(descriptor, TABLE_BYTES, prot=mmap.PROT_READ)))
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptor)


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
