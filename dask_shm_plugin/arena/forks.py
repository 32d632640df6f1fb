"""References that a parent holds for its forked children until they have ended.

A forked child inherits the views of its parent, and does not tell when it needs them no longer. So at each fork the
parent takes one more reference to every block that it refers to. It drops these references when a lock that the child
has inherited is free. The lock lasts as long as a mapping of its file, as views do. So a child drops it when it ends or
becomes another program (``exec``), but not when it closes all its descriptors, as daemons do.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, NamedTuple

from dask_shm_plugin.linux import locks, syscalls
from dask_shm_plugin.linux.segment import nameless_file
from dask_shm_plugin.units import PAGE

_BYTE = 0


class ForkHold(NamedTuple):
    """References held for a child, and a file that is open twice: one open file description has the lock.

    Attributes
    ----------
    holds
        The references.
    asking
        The parent's descriptor, through which it sees whether the lock is held. None if the lock could not be taken;
        then the references are held until this process has no children at all.
    locked, address
        The child's descriptor, whose open file description has the lock, and the address of the child's mapping.
    device, inode
        The identity of the file, to notice if other code in this process has closed ``asking``.
    """

    holds: list[Any]
    asking: int | None = None
    locked: int = -1
    address: int = 0
    device: int = 0
    inode: int = 0

    @classmethod
    def take(cls, holds: list[Any]) -> ForkHold:
        """Take the lock, before the fork; without a free descriptor or mapping, return an object with no lock."""
        with contextlib.suppress(OSError), contextlib.ExitStack() as undo:
            locked = nameless_file("fork", PAGE)
            undo.callback(os.close, locked)
            asking = os.open(f"/proc/self/fd/{locked}", os.O_RDWR | os.O_CLOEXEC)
            undo.callback(os.close, asking)
            address = syscalls.map_shared(locked, 0, PAGE)
            undo.callback(syscalls.unmap, address, PAGE)
            locks.hold(locked, _BYTE)
            status = os.fstat(asking)
            undo.pop_all()
            return cls(holds, asking, locked, address, status.st_dev, status.st_ino)
        return cls(holds)

    def in_parent(self) -> None:
        """Leave the lock to the child, after the fork."""
        if self.asking is not None:
            syscalls.unmap(self.address, PAGE)
            os.close(self.locked)

    def in_child(self) -> None:
        """Keep the lock until the child ends or calls ``exec``, and close the parent's descriptor."""
        if self.asking is not None:
            os.close(self.asking)

    def are_over(self) -> bool:
        """Tell whether the child has ended, and if so close the file.

        Without the lock, tell whether this process has no children at all.
        """
        if self.asking is None or not syscalls.is_still(self.asking, self.device, self.inode):
            return not _has_children()
        if locks.is_held(self.asking, _BYTE):
            return False
        os.close(self.asking)
        return True


def _has_children() -> bool:
    """Tell whether this process has a child that is alive or was not waited for."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
