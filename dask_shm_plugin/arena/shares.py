"""The share of each process in the blocks, and the shared memory that it uses outside the arena."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dask_shm_plugin.arena.guard import GuardedTable
from dask_shm_plugin.linux import usage
from dask_shm_plugin.table.layout import BlockId
from dask_shm_plugin.table.members import Member


class Shares:
    """Computes the share of one member in the blocks of its arena.

    Parameters
    ----------
    access
        The guarded table of the arena.
    member
        This process.

    Notes
    -----
    Thread-safe; no method takes the mutex. If the table changes meanwhile, a figure is outdated, but not wrong.
    """

    def __init__(self, access: GuardedTable, member: Member) -> None:
        self._access, self._member = access, member

    def share(self) -> int:
        """Return the share of this process in the blocks to which it refers, in bytes."""
        return self._access.table.share(self._member)

    def sizes_of(self, rows: Sequence[BlockId]) -> npt.NDArray[np.uint64]:
        """Return the bytes that each of some blocks takes in the arena."""
        return self._access.table.blocks.lengths(np.fromiter((row.index for row in rows), np.intp, len(rows)))

    def count_holders(self, rows: Sequence[BlockId]) -> npt.NDArray[np.intp]:
        """Return the number of members that refer to each of some blocks."""
        return self._access.table.count_holders(rows)

    def note_other_shared(self) -> None:
        """Note in the table how many bytes of shared memory this process uses outside all arenas."""
        # If it cannot be measured, the previous figure stays. An error must not stop the rest of the housekeeping.
        with contextlib.suppress(OSError):
            self._access.table.members.note_other_shared(self._member, usage.other_shared())
