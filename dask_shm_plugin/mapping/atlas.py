"""The private mappings of blocks in this process, by address.

A value, or a part of one, that already lies in the arena is recognised by the present address of its *living* bytes,
never by an address that it had before.
"""

from __future__ import annotations

import bisect
import threading
from typing import NamedTuple

from dask_shm_plugin.table.layout import BlockId


class Place(NamedTuple):
    """A part of a block: offset and length in bytes."""

    arena_id: bytes
    row: BlockId
    offset: int
    length: int


class Atlas:
    """The private mappings of this process, by address.

    Notes
    -----
    Thread-safe. No finalizer takes its lock. A mapping is removed *before* it is unmapped, so the kernel has not reused
    an address that is found here for another mapping. An entry consists of a start and its place. If an exception
    interrupts :meth:`add` or :meth:`remove` between the two, the mapping is not found, and its bytes count as private
    memory.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._starts: list[int] = []
        self._mapped: dict[int, Place] = {}

    def add(self, address: int, place: Place) -> None:
        """Enter a mapping."""
        with self._lock:
            self._mapped[address] = place
            # An earlier removal may have been interrupted.
            at = bisect.bisect_left(self._starts, address)
            if self._starts[at : at + 1] != [address]:
                self._starts.insert(at, address)

    def remove(self, address: int) -> None:
        """Forget a mapping that is about to be unmapped."""
        with self._lock:
            self._mapped.pop(address, None)
            at = bisect.bisect_left(self._starts, address)
            if self._starts[at : at + 1] == [address]:
                del self._starts[at]

    def locate(self, address: int, length: int) -> Place | None:
        """Return the place in an arena of the bytes at an address, or None if no single mapping contains them.

        The caller must keep the owner of these bytes alive.
        """
        if not self._starts or length == 0:
            return None
        with self._lock:
            at = bisect.bisect_right(self._starts, address) - 1
            if at < 0:
                return None
            start = self._starts[at]
            mapped = self._mapped.get(start)
        if mapped is None or address + length > start + mapped.length:
            return None
        return Place(mapped.arena_id, mapped.row, mapped.offset + address - start, length)

    def forget(self) -> None:
        """Remove all mappings, in a forked child: its parent may release these blocks while the child has the views."""
        self.__init__()  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self._starts)


ATLAS = Atlas()
