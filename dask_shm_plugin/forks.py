"""What a forked child still looks at: its parent keeps it until the child has ended.

A child inherits its parent's views, and nobody tells when it needs them no longer. So at each fork the parent takes one
more reference to everything that it refers to, and gives these back when the child's end of a pipe is closed, which
happens at the latest when the child ends. A child that becomes another program (``exec``) closes it at once.
"""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

from dask_shm_plugin.table import Row


class Pins(NamedTuple):
    """References kept for a child: the ends of a pipe, if there is one, and the blocks."""

    reading: int | None
    writing: int | None
    rows: list[Row]

    @classmethod
    def take(cls, rows: list[Row]) -> Pins:
        """Open the pipe, before the fork. Where no descriptor is left, all children are waited for."""
        try:
            reading, writing = os.pipe()
        except OSError:
            return cls(None, None, rows)
        os.set_blocking(reading, False)
        return cls(reading, writing, rows)

    def in_parent(self) -> None:
        """Leave the writing end to the child."""
        if self.writing is not None:
            os.close(self.writing)

    def in_child(self) -> None:
        """Keep the writing end open for good."""
        if self.reading is not None:
            os.close(self.reading)

    def are_over(self) -> bool:
        """Tell whether the child has ended; if so, close the pipe."""
        if self.reading is None:
            return not _has_children()
        with contextlib.suppress(BlockingIOError):
            os.read(self.reading, 1)
            os.close(self.reading)
            return True
        return False


def _has_children() -> bool:
    """Tell whether this process has any child that lives or was not waited for."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
