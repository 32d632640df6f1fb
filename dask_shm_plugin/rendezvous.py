"""Where members of an arena find each other: a few KiB of *named* shared memory.

The arena itself has no name. The rendezvous lists which process has it open under which descriptor; a newcomer opens it
through any of them that lives. It carries the user, the cluster and the pid namespace in its name, for the numbers in
it mean something only there.

Whoever holds the first byte (a kernel lock, see ``liveness``) may change it; every process listed holds the second byte,
shared, as long as it lives. So a rendezvous of which nobody holds the second byte is a leftover, and may be removed by
anyone who holds the first. Nobody distinguishes "just created" from "left over": whoever gets the first byte of an
empty or dead rendezvous fills it anew, and whoever waited for the lock of a removed one notices that the name now
means another file, and begins again.

These locks would outlast a process of which a forked child lives on, for they belong to the open file. So a child closes
what it has inherited of rendezvous before it does anything else, and a process that closes one lets go of it first.

The name may go while members live: a logout with ``RemoveIPC`` or the epilogue of a batch system clears ``/dev/shm``. The
memory does not go with it, and members make a new rendezvous for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import struct
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from dask_shm_plugin import layout, liveness, syscalls
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import ArenaBusy, ArenaUnavailable
from dask_shm_plugin.layout import MEMBERS
from dask_shm_plugin.segment import NAME_PREFIX, SHM_DIRECTORY, Whereabouts

_MAGIC = b"dask-shm rdv"
_HEAD = struct.Struct("<12sI16sQQ")
_ENTRY = struct.Struct("<QQQ")
_SIZE = 4096 * -(-(_HEAD.size + MEMBERS * _ENTRY.size) // 4096)
_CHANGE, _PRESENCE = 0, 1
_PATIENCE = 2.0

_opening = threading.Lock()
_opened: dict[int, tuple[int, int]] = {}
"""The descriptors of all rendezvous that this process has open, with the device and inode of each."""


class Listed(NamedTuple):
    """A process that has the arena open."""

    pid: int
    started: int
    fd: int

    @property
    def is_alive(self) -> bool:
        """Whether this very process still runs."""
        return liveness.start_time(self.pid) == self.started != 0


class Meeting(NamedTuple):
    """What a rendezvous says: which arena, and who has it."""

    arena_id: bytes
    device: int
    inode: int
    listed: tuple[Listed, ...]

    def whereabouts(self) -> Iterator[Whereabouts]:
        """Return where the arena can be opened, as far as the processes live."""
        return (Whereabouts(p.pid, p.fd, self.device, self.inode) for p in self.listed if p.is_alive)


class Rendezvous:
    """A process's hold on a rendezvous, good for reading and changing it until :meth:`close`.

    Notes
    -----
    Made by :func:`enter`, which returns holding the lock for changes. Not thread-safe.
    """

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self._fd = fd

    def read(self) -> Meeting | None:
        """Return what it says, or None when it is empty.

        Raises
        ------
        ArenaUnavailable
            Another version of this package wrote it.
        """
        content = os.pread(self._fd, _SIZE, 0) if _is_ours(self._fd) else b""
        if len(content) < _SIZE or content[: len(_MAGIC)] == bytes(len(_MAGIC)):
            return None
        magic, version, arena_id, device, inode = _HEAD.unpack_from(content)
        if magic != _MAGIC or version != layout.VERSION:
            raise ArenaUnavailable(
                "another version of dask_shm_plugin has an arena for this cluster; install the same one everywhere"
            )
        entries = (
            Listed(*entry) for entry in _ENTRY.iter_unpack(content[_HEAD.size : _HEAD.size + MEMBERS * _ENTRY.size])
        )
        return Meeting(arena_id, device, inode, tuple(entry for entry in entries if entry.pid))

    @step("list")
    def write(self, meeting: Meeting) -> None:
        """Say something else."""
        entries = b"".join(_ENTRY.pack(*entry) for entry in meeting.listed[-MEMBERS:])
        head = _HEAD.pack(_MAGIC, layout.VERSION, meeting.arena_id, meeting.device, meeting.inode)
        try:
            written = os.pwrite(self._fd, (head + entries).ljust(_SIZE, b"\0"), 0)
        except OSError:
            written = 0
        if written != _SIZE:
            raise ArenaUnavailable(f"{SHM_DIRECTORY} has no room for {_SIZE} bytes; make room there")

    @property
    def is_attended(self) -> bool:
        """Whether any other process that was listed here lives."""
        return liveness.is_held(self._fd, _PRESENCE)

    @step("attend")
    def attend(self) -> None:
        """Show that this process lives, for as long as it does."""
        liveness.hold(self._fd, _PRESENCE, shared=True)

    @property
    def can_be_found(self) -> bool:
        """Whether its name still leads to it, and this process has it open."""
        return _is_ours(self._fd) and _has_name(self._fd, self.name)

    def unlock(self) -> None:
        """Let others change it; presence is kept."""
        liveness.let_go(self._fd, _CHANGE)

    @step("remove")
    def remove(self) -> None:
        """Remove the name."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{SHM_DIRECTORY}{self.name}")

    def close(self) -> None:
        """Let go of everything."""
        if self._fd >= 0:
            _close(self._fd)
            self._fd = -1

    def __repr__(self) -> str:
        return f"<Rendezvous {self.name}>"


def name_for(cluster: str) -> str:
    """Return the name under which the members of a cluster meet on this node."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError as error:
        raise ArenaUnavailable(f"/proc is needed to find other members: {error}") from error
    digest = hashlib.sha256(f"{cluster}\0{namespace}".encode()).hexdigest()[:24]
    return f"/{NAME_PREFIX}{os.getuid()}-{digest}"


@step("enter")
def enter(name: str, *, create: bool) -> Rendezvous | None:
    """Open a rendezvous and lock it for changes; return None when there is none and ``create`` is false.

    Raises
    ------
    ArenaUnavailable
        The name belongs to somebody else, or shared memory cannot be used at all.
    ArenaBusy
        Others held the lock for too long.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        fd = _open(name, create=create)
        if fd is None:
            return None
        try:
            is_locked = _lock(fd, name)
        except BaseException:
            if create and not os.fstat(fd).st_size:  # nobody else would remove what this process has made
                Rendezvous(name, fd).remove()
            _close(fd)
            raise
        if is_locked:
            return Rendezvous(name, fd)
        _close(fd)
        if time.monotonic() > deadline:
            raise ArenaBusy(f"{name} was locked by others for {_PATIENCE} s")
        time.sleep(0.001)


def exists(name: str) -> bool:
    """Tell cheaply whether there may be a rendezvous."""
    return os.path.exists(f"{SHM_DIRECTORY}{name}")


def purge() -> None:
    """Remove what crashed processes of this user have left: rendezvous and segments that nobody attends."""
    prefix = f"{NAME_PREFIX}{os.getuid()}-"
    with contextlib.suppress(OSError):
        for entry in os.listdir(SHM_DIRECTORY):
            if entry.startswith(prefix):
                _purge_one(f"/{entry}")


@step("purge")
def _purge_one(name: str) -> None:
    with contextlib.suppress(ArenaUnavailable, OSError):
        fd = _open(name, create=False)
        if fd is None:
            return
        try:
            if _lock(fd, name) and not liveness.is_held(fd, _PRESENCE):
                os.unlink(f"{SHM_DIRECTORY}{name}")
        finally:
            _close(fd)


def _open(name: str, *, create: bool) -> int | None:
    import posix_ipc

    try:
        # No process is forked between these two.
        with _opening:
            fd = int(posix_ipc.SharedMemory(name, posix_ipc.O_CREAT if create else 0, mode=0o600).fd)
            _note(fd)
    except posix_ipc.ExistentialError:
        return None
    except (OSError, ValueError, posix_ipc.Error) as error:
        raise ArenaUnavailable(
            f"{SHM_DIRECTORY}{name} cannot be opened ({error}); if it is another user's, let it be removed"
        ) from error
    status = os.fstat(fd)
    if status.st_uid != os.getuid() or not stat.S_ISREG(status.st_mode) or stat.S_IMODE(status.st_mode) & 0o077:
        _close(fd)
        raise ArenaUnavailable(f"{SHM_DIRECTORY}{name} is not this user's own; remove it")
    os.set_inheritable(fd, False)
    return fd


def _close(fd: int) -> None:
    """Let go of a rendezvous, also on behalf of children that were forked without telling this package."""
    if not _is_ours(fd):  # this is a child, which has closed it already; or something else in this process has
        _opened.pop(fd, None)
        return
    with contextlib.suppress(OSError):
        liveness.let_go(fd, _CHANGE)
        liveness.let_go(fd, _PRESENCE)
    del _opened[fd]
    os.close(fd)


def _note(fd: int) -> None:
    status = os.fstat(fd)
    _opened[fd] = status.st_dev, status.st_ino


def _is_ours(fd: int) -> bool:
    """Tell whether a descriptor is one of those noted, and still of the same file."""
    return fd in _opened and syscalls.is_still(fd, *_opened[fd])


def _forget_parents() -> None:
    """Close what a forked child has inherited. The locks are its parent's, and stay."""
    _opening.release()
    while _opened:
        fd, of_file = _opened.popitem()
        if syscalls.is_still(fd, *of_file):
            os.close(fd)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_forget_parents)


def _lock(fd: int, name: str) -> bool:
    """Lock a rendezvous; return False when somebody else has it or it has lost its name."""
    return liveness.hold(fd, _CHANGE) and _has_name(fd, name)


def _has_name(fd: int, name: str) -> bool:
    try:
        named = os.stat(f"{SHM_DIRECTORY}{name}")
    except FileNotFoundError:
        return False
    return (named.st_dev, named.st_ino) == (os.fstat(fd).st_dev, os.fstat(fd).st_ino)
