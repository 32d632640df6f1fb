"""The memory of a node's workers beside the sum of their limits.

A block is nobody's alone, so no worker's own limit bounds it. What bounds it is the sum: beyond that, nothing is published,
free pages go, and each worker answers for its share, as it would for its own copy with stock Dask.
"""

from __future__ import annotations

import contextlib
import os

from dask_shm_plugin import footprint, liveness
from dask_shm_plugin.access import Access
from dask_shm_plugin.memberbook import Member

UNLIMITED = 1 << 62
NEAR = 0.8
"""The part of the sum from which private memory is read anew, for what is noted may be half a second old; and no free page is kept."""


class Budget:
    """What the workers of one arena use, and may use.

    Parameters
    ----------
    access
        To the arena's table.
    member
        This process.

    Notes
    -----
    Thread-safe; nothing here takes the mutex. Each worker notes its private memory whenever it looks at that for itself.
    """

    def __init__(self, access: Access, member: Member) -> None:
        self._access, self._member = access, member
        self._limits: dict[object, int] = {}

    def set_limit(self, worker: object, limit: int | None) -> None:
        """Let the memory limit of a worker of this process count, in bytes; None is none.

        Parameters
        ----------
        worker
            Tells several workers of one process apart.
        limit
            Bytes.
        """
        self._limits[worker] = limit or UNLIMITED
        self.measure()

    def forget(self, worker: object) -> None:
        """Undo :meth:`set_limit`."""
        self._limits.pop(worker, None)
        self.measure()

    def measure(self) -> int:
        """Return the private memory of this process, in bytes, and let the others know it.

        Raises
        ------
        OSError
            It cannot be read.
        """
        private = self.private_memory(os.getpid())
        limit = sum(self._limits.values())
        self._access.table.note_memory(self._member, private, min(limit, UNLIMITED))
        return private

    def use(self, pages: int = 0) -> float:
        """Return which part of the sum of all limits is in use.

        Parameters
        ----------
        pages
            Bytes of pages that the arena has, or is about to have, if free ones count as well.

        Returns
        -------
        float
            Zero where there is no worker, or one without a limit.
        """
        workers = self._access.table.memory_of_workers()
        limit = sum(limit for _, _, limit in workers)
        if not 0 < limit < UNLIMITED:
            return 0.0
        shared = max(pages, self._access.table.blocks.bytes_held())
        use = (sum(private for _, private, _ in workers) + shared) / limit
        if use < NEAR:
            return use
        return (sum(self._read(pid, private) for pid, private, _ in workers) + shared) / limit

    def private_memory(self, pid: int) -> int:
        """Return the bytes of a process that it shares with nobody through an arena.

        Raises
        ------
        OSError
            The process is gone.
        """
        used = footprint.read(pid)
        member = self._member if pid == os.getpid() else self._find(pid)
        shared = used.shared if member is None else min(self._access.table.other_shared(member), used.shared)
        return used.anonymous + used.file + shared

    def share(self, pid: int) -> int:
        """Return the share of a process in the blocks that it refers to, in bytes; nothing where it is no member."""
        member = self._find(pid)
        return 0 if member is None else self._access.table.weigh(member).share

    def _find(self, pid: int) -> Member | None:
        return self._access.table.find(pid, liveness.start_time(pid))

    def _read(self, pid: int, noted: int) -> int:
        with contextlib.suppress(OSError):
            return self.private_memory(pid)
        return noted
