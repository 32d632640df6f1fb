"""Compare the memory of all arenas, as `dask shm list` shows it, with the shared memory that the kernel counts."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

from dask_shm_plugin.monitor import arenas

_INTERVAL_S = 0.5
_CLOSE_BYTES = 4 << 20
"""Differences up to this are no outliers: small files of multiprocessing, and pages that come and go meanwhile."""
_LASTING_S = 5.0
_MAX_SHOWN = 8
MIB = 1 << 20


class Outlier(NamedTuple):
    """A difference (bytes; negative if memory is not listed), how long it lasted, and what happened before."""

    off: int
    seconds: float
    after: str


class Sums:
    """Samples both sums during a run.

    Parameters
    ----------
    group
        The folder of a memory control group that has the processes of this run only, or None. Its shared memory is
        compared instead of the machine's, to which other programs may contribute.

    Notes
    -----
    The kernel's sum is read before and after the list. What lies between the two readings agrees.
    """

    def __init__(self, group: Path | None) -> None:
        self._group = group
        self._base = 0
        self._off: list[int] = []
        self._outliers: list[Outlier] = []
        self._began: float | None = None
        self._due = 0.0
        self._base = -self._difference()

    def sample(self, after: str) -> None:
        """Compare once, if it is time; while the sums differ, at each call.

        Parameters
        ----------
        after
            What happened last, in words.
        """
        now = time.monotonic()
        if now < self._due and self._began is None:
            return
        self._due = now + _INTERVAL_S
        off = self._difference()
        if self._began is None:
            self._off.append(off)
        if abs(off) <= _CLOSE_BYTES:
            self._began = None
        elif self._began is None:
            self._began = now
            self._outliers.append(Outlier(off, 0.0, after))
        else:
            first = self._outliers[-1]
            self._outliers[-1] = first._replace(off=max(first.off, off, key=abs), seconds=now - self._began)

    def lasting(self) -> list[Outlier]:
        """Return the differences that lasted for seconds, in a group of its own: elsewhere, they may be of others."""
        return [one for one in self._outliers if self._group is not None and one.seconds > _LASTING_S]

    def report(self) -> dict[str, Any]:
        """Return the figures."""
        off = sorted(map(abs, self._off)) or [0]
        largest = sorted(self._outliers, key=lambda one: -abs(one.off))[:_MAX_SHOWN]
        return {
            "samples": len(self._off),
            "median_mib": round(statistics.median(off) / MIB, 2),
            "one_in_a_hundred_mib": round(off[int(0.99 * (len(off) - 1))] / MIB, 2),
            "largest_mib": round(off[-1] / MIB, 2),
            "outliers": len(self._outliers),
            "largest_outliers": [f"{one.off / MIB:+.1f} MiB for {one.seconds:.2f} s {one.after}" for one in largest],
        }

    def _difference(self) -> int:
        before = self._counted_by_kernel()
        pids = self._members()
        listed = self._base + sum(
            one.resident for one in arenas.snapshots() if pids is None or pids & {member.pid for member in one.members}
        )
        after = self._counted_by_kernel()
        return listed - min(max(listed, min(before, after)), max(before, after))

    def _members(self) -> set[int] | None:
        if self._group is None:
            return None
        return set(map(int, (self._group / "cgroup.procs").read_text().split()))

    def _counted_by_kernel(self) -> int:
        if self._group is None:
            lines = Path("/proc/meminfo").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Shmem:"))
        lines = (self._group / "memory.stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("shmem "))
