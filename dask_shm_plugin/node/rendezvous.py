"""The rendezvous of an arena: a few KiB of *named* shared memory, through which newcomers find the arena.

The arena itself has no name. The rendezvous lists the processes that have it open, each with its descriptor. A
newcomer opens the arena through any of them that is alive. The name of the rendezvous contains the user, the cluster,
and the namespaces of pids and of time, because pids and start times of processes are valid only there.

Two locks of the kernel (see ``locks``) protect it. A process must hold the lock on the first byte, exclusively, to
change the rendezvous. Every listed process holds the lock on the second byte, shared, as long as it lives. So a
rendezvous without a lock on its second byte is a leftover, and a process that holds the lock on the first byte may
remove it.

A new rendezvous is not distinguished from a leftover. A process that gets the lock of an empty or dead rendezvous
fills it anew. A process that has waited for the lock of a removed one notices that the name now leads to another file
or none, and starts again.

The locks belong to the open file description, so they would outlast a process if a forked child of it lives on.
Therefore a forked child begins by closing each inherited rendezvous, and a process unlocks a rendezvous before closing
it.

The name may be removed while members live: a logout with ``RemoveIPC`` or the epilogue of a batch system clears
``/dev/shm``. The arena's memory stays, and its members make a new rendezvous for it.
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

from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import ArenaBusy, ArenaUnavailable
from dask_shm_plugin.linux import locks, processes, syscalls
from dask_shm_plugin.linux.segment import NAME_PREFIX, SHM_DIRECTORY, Whereabouts
from dask_shm_plugin.table import layout
from dask_shm_plugin.table.layout import MEMBERS

_MAGIC = b"dask-shm rdv"
_HEAD = struct.Struct("<12sI16sQQ")
_ENTRY = struct.Struct("<QQQ")
_SIZE = 4096 * -(-(_HEAD.size + MEMBERS * _ENTRY.size) // 4096)
_CHANGE, _PRESENCE = 0, 1
_LOCK_TIMEOUT_S = 2.0
_DIGITS = 24
"""Hexadecimal digits that name a cluster."""

_opening = threading.Lock()
_opened: dict[int, tuple[int, int]] = {}
"""Device and inode of each rendezvous that this process has open, by descriptor."""


class Listed(NamedTuple):
    """A process that has the arena open: pid, start time in clock ticks since boot, and descriptor of the arena."""

    pid: int
    started: int
    fd: int

    @property
    def is_alive(self) -> bool:
        """Whether this process still runs, and its pid is not another process's."""
        return processes.start_time(self.pid) == self.started != 0


class Meeting(NamedTuple):
    """The content of a rendezvous: the arena, and the processes that have it open."""

    arena_id: bytes
    device: int
    inode: int
    listed: tuple[Listed, ...]

    def whereabouts(self) -> Iterator[Whereabouts]:
        """Return the places at which the arena can be opened: one for each listed process that is alive."""
        return (Whereabouts(p.pid, p.fd, self.device, self.inode) for p in self.listed if p.is_alive)


class Rendezvous:
    """A rendezvous that this process has open.

    Notes
    -----
    Made by :func:`enter`, which takes the lock for changes. Not thread-safe.
    """

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self._fd = fd

    def read(self) -> Meeting | None:
        """Return the content, or None if the rendezvous is empty or not open any more.

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
        """Replace the content; the caller must hold the lock for changes.

        Raises
        ------
        ArenaUnavailable
            ``/dev/shm`` is full.
        """
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
        """Whether another process holds the presence lock: then the rendezvous is no leftover."""
        return locks.is_held(self._fd, _PRESENCE)

    @step("attend")
    def attend(self) -> None:
        """Take the presence lock, shared, until the rendezvous is closed or this process ends."""
        locks.hold(self._fd, _PRESENCE, shared=True)

    @property
    def can_be_found(self) -> bool:
        """Whether the name still leads to this rendezvous, and this process has it open."""
        return _is_ours(self._fd) and _has_name(self._fd, self.name)

    def unlock(self) -> None:
        """Release the lock for changes; the presence lock is kept."""
        locks.let_go(self._fd, _CHANGE)

    @step("remove")
    def remove(self) -> None:
        """Remove the name."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{SHM_DIRECTORY}{self.name}")

    def close(self) -> None:
        """Release both locks and close the descriptor."""
        if self._fd >= 0:
            _close(self._fd)
            self._fd = -1

    def __repr__(self) -> str:
        return f"<Rendezvous {self.name}>"


def name_for(cluster: str) -> str:
    """Return the name of the rendezvous of a cluster on this node.

    Raises
    ------
    ArenaUnavailable
        ``/proc`` is not readable.
    """
    return _name(hashlib.sha256(cluster.encode()).hexdigest()[:_DIGITS])


def counterpart(name: str) -> str | None:
    """Return the name for this process in place of one that may be of another namespace; None if it is none.

    Raises
    ------
    ArenaUnavailable
        ``/proc`` is not readable.
    """
    cluster = name.split("-")[-3:-2]
    is_one = name.startswith(f"/{NAME_PREFIX}") and len("".join(cluster)) == _DIGITS
    return _name(cluster[0]) if is_one else None


def spaces_of(name: str) -> tuple[str, str]:
    """Return the namespaces of pids and of time in the name of a rendezvous."""
    _, pids, times = name.rsplit("-", 2)
    return pids, times


def _name(cluster: str) -> str:
    try:
        pids = os.stat("/proc/self/ns/pid").st_ino
    except OSError as error:
        raise ArenaUnavailable(f"/proc is needed to find other members: {error}") from error
    times = 0
    with contextlib.suppress(OSError):  # before Linux 5.6
        times = os.stat("/proc/self/ns/time").st_ino
    return f"/{NAME_PREFIX}{os.getuid()}-{cluster}-{pids:x}-{times:x}"


@step("enter")
def enter(name: str, *, create: bool) -> Rendezvous | None:
    """Open a rendezvous and take the lock for changes; return None if there is none and ``create`` is false.

    Raises
    ------
    ArenaUnavailable
        The name belongs to another user, or shared memory cannot be used at all.
    ArenaBusy
        Other processes held the lock for two seconds.
    """
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        fd = _open(name, create=create)
        if fd is None:
            return None
        try:
            is_locked = _lock(fd, name)
        except BaseException:
            if create and not os.fstat(fd).st_size:  # no other process would remove this new, empty file
                Rendezvous(name, fd).remove()
            _close(fd)
            raise
        if is_locked:
            return Rendezvous(name, fd)
        _close(fd)
        if time.monotonic() > deadline:
            raise ArenaBusy(f"{name} was locked by others for {_LOCK_TIMEOUT_S} s")
        time.sleep(0.001)


def exists(name: str) -> bool:
    """Tell, without opening it, whether there may be a rendezvous."""
    return os.path.exists(f"{SHM_DIRECTORY}{name}")


def is_attended(name: str) -> bool:
    """Tell whether a living process attends a rendezvous, in whichever namespace and of whichever version; takes no lock."""
    with contextlib.suppress(ArenaUnavailable, OSError), _opened_as(name) as meeting:
        return meeting is not None and meeting.is_attended
    return False


def look(name: str) -> Meeting | None:
    """Return the content of a rendezvous of this version that a living process attends; takes no lock."""
    with contextlib.suppress(ArenaUnavailable, OSError), _opened_as(name) as meeting:
        return meeting.read() if meeting is not None and meeting.is_attended else None
    return None


@contextlib.contextmanager
def _opened_as(name: str) -> Iterator[Rendezvous | None]:
    fd = _open(name, create=False)
    try:
        yield None if fd is None else Rendezvous(name, fd)
    finally:
        if fd is not None:
            _close(fd)


def purge(*, is_trial: bool = False) -> list[str]:
    """Remove the files that crashed processes of this user have left: rendezvous and segments without live members.

    Parameters
    ----------
    is_trial
        Only look, and remove nothing.

    Returns
    -------
    list of str
        The names of the files, with a slash in front.
    """
    prefix, found = f"{NAME_PREFIX}{os.getuid()}-", []
    with contextlib.suppress(OSError):
        for entry in sorted(os.listdir(SHM_DIRECTORY)):
            if entry.startswith(prefix) and _purge_one(f"/{entry}", is_trial=is_trial):
                found.append(f"/{entry}")
    return found


@step("purge")
def _purge_one(name: str, *, is_trial: bool = False) -> bool:
    with contextlib.suppress(ArenaUnavailable, OSError):
        fd = _open(name, create=False)
        if fd is None:
            return False
        try:
            if _lock(fd, name) and not locks.is_held(fd, _PRESENCE):
                if not is_trial:
                    os.unlink(f"{SHM_DIRECTORY}{name}")
                return True
        finally:
            _close(fd)
    return False


def _open(name: str, *, create: bool) -> int | None:
    import posix_ipc

    try:
        # The lock delays forks in other threads: a child must know all descriptors that it inherits.
        with _opening:
            fd = int(posix_ipc.SharedMemory(name, posix_ipc.O_CREAT if create else 0, mode=0o600).fd)
            _note(fd)
    except posix_ipc.ExistentialError:
        return None
    except (OSError, ValueError, posix_ipc.Error) as error:
        raise ArenaUnavailable(
            f"{SHM_DIRECTORY}{name} cannot be opened ({error}); if it is another user's, have it removed"
        ) from error
    status = os.fstat(fd)
    if status.st_uid != os.getuid() or not stat.S_ISREG(status.st_mode) or stat.S_IMODE(status.st_mode) & 0o077:
        _close(fd)
        raise ArenaUnavailable(f"{SHM_DIRECTORY}{name} is not this user's own; remove it")
    os.set_inheritable(fd, False)
    return fd


def _close(fd: int) -> None:
    """Unlock and close a rendezvous; a child that was forked without Python's hooks then does not keep the locks."""
    if not _is_ours(fd):  # closed already: in this forked child, or by other code in this process
        _opened.pop(fd, None)
        return
    with contextlib.suppress(OSError):
        locks.let_go(fd, _CHANGE)
        locks.let_go(fd, _PRESENCE)
    del _opened[fd]
    os.close(fd)


def _note(fd: int) -> None:
    status = os.fstat(fd)
    _opened[fd] = status.st_dev, status.st_ino


def _is_ours(fd: int) -> bool:
    """Tell whether a descriptor was noted as a rendezvous, and is still that of the same file."""
    return fd in _opened and syscalls.is_still(fd, *_opened[fd])


def _forget_parents() -> None:
    """Close each rendezvous that a forked child has inherited. The locks are the parent's and stay."""
    _opening.release()
    while _opened:
        fd, of_file = _opened.popitem()
        if syscalls.is_still(fd, *of_file):
            os.close(fd)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_forget_parents)


def _lock(fd: int, name: str) -> bool:
    """Take the lock for changes; return False if another process has it, or the name leads to another file or none."""
    return locks.hold(fd, _CHANGE) and _has_name(fd, name)


def _has_name(fd: int, name: str) -> bool:
    try:
        named = os.stat(f"{SHM_DIRECTORY}{name}")
    except FileNotFoundError:
        return False
    return (named.st_dev, named.st_ino) == (os.fstat(fd).st_dev, os.fstat(fd).st_ino)
