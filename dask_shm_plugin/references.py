"""What one process refers to: how often each block, and what it keeps for its forked children."""

from __future__ import annotations

import collections
from collections.abc import Iterator

from dask_shm_plugin.forks import Pins
from dask_shm_plugin.layout import Row


class References:
    """Counts references to blocks, so that the table needs to know only whether there are any.

    Notes
    -----
    Every method but :meth:`keep` and :meth:`add_another` wants the caller to hold the arena's mutex.
    """

    def __init__(self) -> None:
        self._counts: dict[Row, int] = {}
        self._pins: collections.deque[Pins] = collections.deque()

    def add(self, row: Row) -> None:
        """Count one more."""
        self._counts[row] = self._counts.get(row, 0) + 1

    def add_another(self, row: Row) -> bool:
        """Count one more of what is counted, and return whether it was. To be among this process's threads is enough."""
        if row not in self._counts:
            return False
        self._counts[row] += 1
        return True

    def drop(self, row: Row) -> bool:
        """Count one less; return whether that was the last."""
        if self._counts[row] > 1:
            self._counts[row] -= 1
            return False
        del self._counts[row]
        return True

    def pin(self) -> Pins | None:
        """Count one more of everything, for a child about to be forked."""
        rows = list(self._counts)
        for row in rows:
            self._counts[row] += 1
        return Pins.take(rows) if rows else None

    def keep(self, pins: Pins) -> None:
        """Remember what is kept for a child, until it has ended."""
        self._pins.append(pins)

    def unpinned(self) -> list[Row]:
        """Return what is not kept any more, for children that have ended."""
        # Another thread may fork meanwhile, and what it keeps may look like what was just given up: each is taken out
        # before it is asked, and put back if it stays.
        rows = []
        for _ in range(len(self._pins)):
            pins = self._pins.popleft()
            try:
                is_over = pins.are_over()
            except OSError:  # it cannot be asked now
                is_over = False
            if is_over:
                rows += pins.rows
            else:
                self._pins.append(pins)
        return rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)
