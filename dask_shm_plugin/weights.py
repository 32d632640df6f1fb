"""What is held weighs: each process's share of the blocks, and what of its memory is nobody's but its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dask_shm_plugin import footprint, liveness
from dask_shm_plugin.access import Access
from dask_shm_plugin.layout import Row
from dask_shm_plugin.memberbook import Member
from dask_shm_plugin.table import Weight


class Weights:
    """What one member weighs.

    Parameters
    ----------
    access
        To the table of its arena.
    member
        This process.

    Notes
    -----
    Thread-safe; nothing here takes the mutex. A change meanwhile makes a weight old, not wrong.
    """

    def __init__(self, access: Access, member: Member) -> None:
        self._access, self._member = access, member
        self._pid = os.getpid()
        self._started = liveness.start_time(self._pid)

    def weigh(self) -> Weight:
        """Weigh what this process refers to."""
        return self._access.table.weigh(self._member)

    def size_of(self, row: Row) -> int:
        """Return the bytes that a block takes."""
        return self._access.table.blocks.extent(row.index).length

    def count_holders(self, rows: Sequence[Row]) -> npt.NDArray[np.intp]:
        """Count the members that refer to each of some blocks."""
        return self._access.table.count_holders(rows)

    def note_other_shared(self) -> None:
        """Let the others know how much shared memory this process uses that is no arena's."""
        # Without a measurement the last one stands; it must not keep anybody from tidying up.
        with contextlib.suppress(OSError):
            self._access.table.note_other_shared(self._member, footprint.other_shared())

    def private_memory(self, pid: int) -> int:
        """Return the bytes of a process that it shares with nobody through an arena.

        Raises
        ------
        OSError
            The process is gone.
        """
        used = footprint.read(pid)
        started = self._started if pid == self._pid else liveness.start_time(pid)
        shared = self._access.table.other_shared(pid, started)
        return used.anonymous + used.file + (used.shared if shared is None else min(shared, used.shared))
