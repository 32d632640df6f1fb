"""The memory that the workers of a node use, compared with the sum of their limits.

A block may have several holders, so the limit of a single worker does not bound it. The sum of the limits does. Near
the sum, free pages are given back to the operating system and each worker is charged for its share of the blocks, as it
would be for its own copy with stock Dask. Beyond the sum, nothing is published.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from dask_shm_plugin.arena.guard import GuardedTable
from dask_shm_plugin.linux import processes, usage
from dask_shm_plugin.table.members import Member

UNLIMITED = 1 << 62
NEAR = 0.8
"""Fraction of the sum from which on no free page is kept, and private memory is read anew.

Noted figures may be half a second old.
"""


_GROWTH_BYTES = 8 << 20
"""Bytes by which own memory grows before free pages of the arena are looked for."""


class Budget:
    """The memory that the workers of one arena use, and the sum of their limits.

    Parameters
    ----------
    access
        The guarded table of the arena.
    member
        This process.

    Attributes
    ----------
    drafts
        Returns the bytes of this process's drafts that contain its arrays; they are its own memory.
    grown
        Called when the own memory of this process is found to have grown.
    bare
        Returns the bytes of its drafts that have no pages yet.
    received
        Returns the bytes of its drafts into which it receives.

    Notes
    -----
    Thread-safe; no method takes the mutex. Each worker notes its private memory in the table whenever it measures it
    for itself.
    """

    def __init__(self, access: GuardedTable, member: Member) -> None:
        self._access, self._member = access, member
        self._limits: dict[object, int] = {}
        self._least = 0
        self.grown: Callable[[], object] = int
        self.drafts: Callable[[], int] = int
        self.bare: Callable[[], int] = int
        self.received: Callable[[], int] = int

    def set_limit(self, worker: object, limit: int | None) -> None:
        """Count a worker of this process and its memory limit.

        Parameters
        ----------
        worker
            Distinguishes the workers of one process.
        limit
            The memory limit of the worker in bytes, or None if it has none.

        Raises
        ------
        OSError, SharedMemoryError
            As of :meth:`measure`.
        """
        self._limits[worker] = limit or UNLIMITED
        self.measure()

    def forget(self, worker: object) -> None:
        """Undo :meth:`set_limit`; raises as :meth:`measure` does."""
        self._limits.pop(worker, None)
        self.measure()

    def measure(self) -> int:
        """Return the own memory of this process, in bytes, and note its parts in the table for the other members.

        Raises
        ------
        OSError
            The private memory of this process cannot be read.
        SharedMemoryError
            The arena is damaged, or this process has left it.
        """
        private = self.private_memory(os.getpid())
        limit = sum(self._limits.values())
        drafts = self.drafts() + self.received()
        self._access.table.members.note_memory(self._member, private, min(limit, UNLIMITED))
        self._access.table.members.note_drafts(self._member, drafts, self.bare())
        own = private + drafts
        self._least = min(self._least, own)
        if own > self._least + _GROWTH_BYTES:
            self._least = own
            self.grown()
        return own

    def use(self, pages: int = 0) -> float:
        """Return the fraction of the sum of all limits that is in use.

        Parameters
        ----------
        pages
            Bytes of the pages that the arena has or is about to have, free ones included. If it is less than the bytes
            of all blocks and drafts that are to have pages, these count instead.

        Returns
        -------
        float
            The fraction; zero if the node has no worker, or a worker without a limit.
        """
        workers = self._access.table.members.memory_of_workers()
        limit = sum(limit for _, _, limit in workers)
        if not 0 < limit < UNLIMITED:
            return 0.0
        table = self._access.table
        shared = max(pages, table.blocks.bytes_held() - table.members.bare())
        use = (sum(private for _, private, _ in workers) + shared) / limit
        if use < NEAR:
            return use
        return (sum(self._read(pid, private) for pid, private, _ in workers) + shared) / limit

    def own_memory(self, pid: int) -> int:
        """Return the private memory of a process and its drafts that contain arrays, in bytes.

        Raises
        ------
        OSError
            The process is gone.
        """
        member = self._find(pid)
        drafts = 0 if member is None else self._access.table.members.drafts(member)
        return self.private_memory(pid) + drafts

    def count_workers(self) -> int:
        """Return the number of processes with workers, at least one."""
        return max(1, len(self._access.table.members.memory_of_workers()))

    def private_memory(self, pid: int) -> int:
        """Return the private memory of a process in bytes: anonymous, file-backed, and shared outside all arenas.

        The last part is the figure that the process itself has noted. If it is no member, all its shared memory counts.

        Raises
        ------
        OSError
            The process is gone.
        """
        used = usage.read(pid)
        member = self._member if pid == os.getpid() else self._find(pid)
        shared = used.shared if member is None else min(self._access.table.members.other_shared(member), used.shared)
        return used.anonymous + used.file + shared

    def share(self, pid: int) -> int:
        """Return the share of a process in the blocks that it refers to, in bytes; zero if it is no member."""
        member = self._find(pid)
        return 0 if member is None else self._access.table.share(member)

    def _find(self, pid: int) -> Member | None:
        return self._access.table.members.find(pid, processes.start_time(pid))

    def _read(self, pid: int, noted: int) -> int:
        with contextlib.suppress(OSError):
            return self.private_memory(pid)
        return noted
