"""What a forked child still looks at: its parent keeps it until the child has ended.

A child inherits its parent's views, and nobody tells when it needs them no longer. So at each fork the parent takes one
more reference to everything that it refers to, and gives these back when a lock is free that the child has inherited.
The lock hangs on a mapping, as the views do: a child lets go of it by ending or by becoming another program (``exec``),
but not by closing all its descriptors, as daemons do.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, NamedTuple

from dask_shm_plugin import liveness, syscalls
from dask_shm_plugin.segment import PAGE, nameless_file

_BYTE = 0


class Pins(NamedTuple):
    """What is held for a child, and two open descriptions of one file, of which one has the lock.

    Attributes
    ----------
    asking
        The parent's, which can see whether the lock is held; None where all children are waited for.
    locked, address
        The child's, and its mapping.
    device, inode
        Of the file: something else in this process may close its descriptor.
    """

    holds: list[Any]
    asking: int | None = None
    locked: int = -1
    address: int = 0
    device: int = 0
    inode: int = 0

    @classmethod
    def take(cls, holds: list[Any]) -> Pins:
        """Take the lock, before the fork. Where no descriptor or mapping is left, all children are waited for."""
        with contextlib.suppress(OSError), contextlib.ExitStack() as undo:
            locked = nameless_file("fork", PAGE)
            undo.callback(os.close, locked)
            asking = os.open(f"/proc/self/fd/{locked}", os.O_RDWR | os.O_CLOEXEC)
            undo.callback(os.close, asking)
            address = syscalls.map_shared(locked, 0, PAGE)
            liveness.hold(locked, _BYTE)
            undo.pop_all()
            status = os.fstat(asking)
            return cls(holds, asking, locked, address, status.st_dev, status.st_ino)
        return cls(holds)

    def in_parent(self) -> None:
        """Leave the lock to the child."""
        if self.asking is not None:
            syscalls.unmap(self.address, PAGE)
            os.close(self.locked)

    def in_child(self) -> None:
        """Keep the lock for good."""
        if self.asking is not None:
            os.close(self.asking)

    def are_over(self) -> bool:
        """Tell whether the child has ended; if so, close the file."""
        if self.asking is None or not syscalls.is_still(self.asking, self.device, self.inode):
            return not _has_children()
        if liveness.is_held(self.asking, _BYTE):
            return False
        os.close(self.asking)
        return True


def _has_children() -> bool:
    """Tell whether this process has any child that lives or was not waited for."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
