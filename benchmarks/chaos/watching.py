"""What is looked at from outside: who has which arena, and who is still entered there after a death."""

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

from dask_shm_plugin import liveness
from dask_shm_plugin.layout import TABLE_BYTES
from dask_shm_plugin.table import Table

IN_TIME = 2.0
_NEVER = 20.0


def shared_by(process: psutil.Process) -> Iterator[tuple[str, str]]:
    """Yield the shared memory of the package that a process has open: the path of its descriptor, and the name."""
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                name = os.readlink(entry)
                if name.startswith(("/dev/shm/dask-shm", "/memfd:dask-shm")):
                    yield str(entry), name


def segment_of(process: psutil.Process) -> str | None:
    """Return the path under which a process has the memory of an arena open."""
    return next((path for path, name in shared_by(process) if "segment" in name), None)


def names_used_by(processes: list[psutil.Process]) -> set[str]:
    """Return the names in /dev/shm that some processes have open."""
    used = [name for process in processes for _, name in shared_by(process)]
    return {name for name in used if name.startswith("/dev/shm") and not name.endswith("(deleted)")}


class Death(NamedTuple):
    """A process that is about to end, its forked children, and the table in which it is entered, if it is in one."""

    pid: int
    started: int
    children: list[int]
    table: Table | None

    @classmethod
    def of(cls, process: psutil.Process) -> Death:
        """Note what cannot be known later."""
        path = segment_of(process)
        with contextlib.suppress(psutil.Error):
            children = [child.pid for child in process.children()]
            return cls(process.pid, liveness.start_time(process.pid), children, _table_at(path) if path else None)
        return cls(process.pid, 0, [], None)

    @property
    def is_entered(self) -> bool:
        """Whether the process stands in the table as a member."""
        return self.table is not None and self.table.find(self.pid, self.started) is not None

    @property
    def is_over(self) -> bool:
        """Whether the process is gone, and every child that inherited its memory."""
        return not any(map(_is_alive, [self.pid, *self.children]))


class Reclaiming:
    """How long it takes until others have taken back what a dead member held.

    Notes
    -----
    Looks into the table without being a member, which nobody notices. A clock starts when the dead process and the
    forked children that it had are gone, and stands still while any member is stopped, for that one may have the lock.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.never = 0
        self._pending: list[tuple[Death, float | None]] = []

    def expect(self, death: Death) -> None:
        """Begin to look, if this was a member."""
        if death.is_entered:
            self._pending.append((death, None))

    def look(self, *, stopped: bool) -> None:
        """Look once."""
        now = time.monotonic()
        pending, self._pending = self._pending, []
        for death, since in pending:
            if stopped or since is None:
                self._pending.append((death, now if death.is_over else None))
            elif not death.is_entered:
                self.seconds.append(now - since)
            elif now - since > _NEVER:
                self.never += 1
            else:
                self._pending.append((death, since))

    def forget(self) -> None:
        """Look no more: everybody who could reclaim is dead, too."""
        self._pending.clear()

    def report(self) -> dict[str, Any]:
        """Return the figures."""
        seconds = self.seconds or [0.0]
        return {
            "reclaimed": len(self.seconds),
            "median_seconds": round(statistics.median(seconds), 2),
            "longest_seconds": round(max(seconds), 2),
            "later_than_two_seconds": sum(one > IN_TIME for one in self.seconds),
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
