"""What is held weighs: each process's share of the blocks, and what of its memory is nobody's but its own."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dask_shm_plugin import footprint
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
