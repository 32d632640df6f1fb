"""A span of POSIX shared memory: create, pass on, map, fill, give pages back. Nothing else.

The memory has no name. A new segment is unlinked before anyone uses it, so that the death of its last process frees
it; others open it through ``/proc/<pid>/fd/<n>`` of a process that has it, and compare device and inode.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from typing import NamedTuple

from dask_shm_plugin import syscalls
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import (
    ArenaUnavailable,
    DescriptorLost,
    FileSizeLimited,
    MappingRefused,
    MemoryExhausted,
    TableCorrupt,
)

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
NAME_PREFIX = "dask-shm-"
SHM_DIRECTORY = "/dev/shm"
POSIX, MEMFD = "POSIX shared memory", "memfd"
# The kernel lets one process write to a file at a time; nobody shall wait long for his turn.
_WRITE_STEP = 4 << 20
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM}


def round_up(size: int, unit: int = PAGE) -> int:
    """Return the smallest multiple of ``unit`` that holds ``size``."""
    return -(-size // unit) * unit


class Whereabouts(NamedTuple):
    """Where a segment can be opened: a process that has it, and the identity that must be found there."""

    pid: int
    fd: int
    device: int
    inode: int


class Segment:
    """An open segment; owns one descriptor.

    Parameters
    ----------
    fd
        A descriptor that this object closes.

    Notes
    -----
    Thread-safe: nothing but the descriptor is kept. A process opens a segment once and keeps that one descriptor,
    because closing any descriptor of a file drops all record locks that the process holds on it.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        status = os.fstat(fd)
        self.size = status.st_size
        self.device, self.inode = status.st_dev, status.st_ino

    @classmethod
    @step("create segment")
    def create(cls, size: int, filled: int | None = None) -> Segment:
        """Create a sparse segment: POSIX shared memory where it fits, a memfd where it does not.

        Parameters
        ----------
        size
            Bytes.
        filled
            How many of them will have pages at the same time; all, where it is not said.
        """
        needed = size if filled is None else filled
        fits = _posix_memory_free() >= needed
        try:
            return cls(_posix_segment(size) if fits else _memfd_segment(size))
        except (OSError, ValueError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSYS:
                raise ArenaUnavailable(
                    f"{SHM_DIRECTORY} has no room for {needed} bytes, and this kernel or sandbox has no memfd_create; "
                    f"lower shm.capacity or make {SHM_DIRECTORY} larger (docker run --shm-size)"
                ) from error
            raise ArenaUnavailable(
                f"cannot create {size} bytes of shared memory ({error}); lower shm.capacity or raise ulimit -f"
            ) from error

    @classmethod
    @step("open segment")
    def open(cls, at: Whereabouts) -> Segment:
        """Open the segment that another process holds.

        Raises
        ------
        ArenaUnavailable
            The process is gone, is not ours to look into, or has something else under that number.
        """
        path = f"/proc/{at.pid}/fd/{at.fd}"
        try:
            # A number may have been reused for a FIFO or a device, where even opening has effects: look first.
            if not _is_ours(os.stat(path), at):
                raise ArenaUnavailable(f"{path} is not the segment looked for")
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            raise ArenaUnavailable(f"cannot open {path}: {error}") from error
        if not _is_ours(os.fstat(fd), at):
            os.close(fd)
            raise ArenaUnavailable(f"{path} is not the segment looked for")
        return cls(fd)

    @property
    def whereabouts(self) -> Whereabouts:
        """How another process can open this segment while this process has it."""
        return Whereabouts(os.getpid(), self.fd, self.device, self.inode)

    @property
    def kind(self) -> str:
        """What serves: POSIX shared memory, which ``/dev/shm`` bounds, or a memfd."""
        with contextlib.suppress(OSError):
            if os.stat(SHM_DIRECTORY).st_dev == self.device:
                return POSIX
        return MEMFD

    @property
    def resident(self) -> int:
        """Bytes for which the operating system holds pages."""
        try:
            return os.fstat(self.fd).st_blocks * 512
        except OSError:
            self.insist_whole()
            raise

    @step("make pages")
    def reserve(self, offset: int, length: int) -> None:
        """Make the pages of a part exist, so that touching them through a mapping cannot fail."""
        self.insist_whole()
        try:
            os.posix_fallocate(self.fd, offset, length)
        except OSError as error:
            raise self._no_pages(error) from error

    def write(self, offset: int, data: memoryview) -> None:
        """Copy flat bytes into the segment, without holding the GIL and without touching a mapping.

        ``pwrite`` makes missing pages as it goes and reports a lack of them, where a store through a mapping would
        be answered by SIGBUS.
        """
        done = 0
        while done < len(data):
            self.insist_whole()
            try:
                written = os.pwrite(self.fd, data[done : done + _WRITE_STEP], offset + done)
            except OSError as error:
                raise self._no_pages(error) from error
            if written == 0:
                raise MemoryExhausted("the operating system took no more bytes; free memory or lower shm.capacity")
            done += written

    def read(self, offset: int, length: int) -> memoryview:
        """Copy bytes out of the segment into private memory, without a mapping."""
        data, done = memoryview(bytearray(length)), 0
        while done < length:
            self.insist_whole()
            count = os.preadv(self.fd, [data[done : done + _WRITE_STEP]], offset + done)
            if count == 0:
                raise ArenaUnavailable("the segment is shorter than it was; somebody has truncated it")
            done += count
        return data

    @step("give pages back")
    def give_back(self, offset: int, length: int) -> None:
        """Return the pages of a part to the operating system."""
        self.insist_whole()
        syscalls.punch_hole(self.fd, offset, length)

    def first_page(self, offset: int, length: int) -> int | None:
        """Return where in a part the first page lies that the operating system holds, or None."""
        try:
            found = os.lseek(self.fd, offset, os.SEEK_DATA)
        except OSError:
            return None
        return found if found < offset + length else None

    def missing(self, offset: int, length: int) -> int:
        """Return how many bytes of a part, at least, the operating system holds no pages for."""
        end, at, present = offset + length, offset, 0
        try:
            while at < end:
                at = os.lseek(self.fd, at, os.SEEK_DATA)
                hole = os.lseek(self.fd, at, os.SEEK_HOLE)
                present += max(0, min(hole, end) - at)
                at = hole
        except OSError:  # nothing follows
            pass
        return length - present

    def map_shared(self, offset: int, length: int) -> int:
        """Map a part for reading and writing in place, and return its address."""
        return self._mapped(syscalls.map_shared, offset, length)

    def map_closed(self, offset: int, length: int) -> int:
        """Set addresses aside for a part, see :func:`syscalls.map_closed`, and return the first."""
        return self._mapped(syscalls.map_closed, offset, length)

    @step("map")
    def map_private(self, offset: int, length: int) -> int:
        """Map a part copy-on-write, and return its address."""
        return self._mapped(syscalls.map_private, offset, length)

    def private_mappings(self) -> Iterator[tuple[int, int]]:
        """Return where this process has mapped parts copy-on-write, as addresses and lengths, as the kernel has it."""
        ours = f"{os.major(self.device):02x}:{os.minor(self.device):02x}", str(self.inode)
        with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps.read().splitlines():
                part, access, _, *file = line.split(maxsplit=5)[:5]
                if tuple(file) == ours and access.endswith("p"):
                    first, end = (int(address, 16) for address in part.split("-"))
                    yield first, end - first

    def insist_whole(self) -> None:
        """Insist that the descriptor is still the segment's, and that nobody has cut it short.

        To touch what is mapped beyond its end is answered by SIGBUS; and what is written to a number that something else has
        closed goes to another file.

        Raises
        ------
        TableCorrupt, DescriptorLost
            Somebody has.
        ArenaUnavailable
            This process has left the arena.
        """
        status = syscalls.status_of(self.fd)
        if status is None or status[:2] != (self.device, self.inode):
            if self.fd < 0:
                raise ArenaUnavailable("this process has left the arena")
            raise DescriptorLost("something in this process has closed its descriptor")
        if status[2] < self.size:
            raise TableCorrupt("somebody has cut the memory short")

    @property
    def has_descriptor(self) -> bool:
        """Whether the descriptor is still the segment's."""
        return syscalls.is_still(self.fd, self.device, self.inode)

    def _mapped(self, how: syscalls.MapCall, offset: int, length: int) -> int:
        if offset < 0 or length <= 0 or offset + length > self.size:
            raise TableCorrupt(f"{length} bytes at {offset} are not in a segment of {self.size}")
        self.insist_whole()
        try:
            return how(self.fd, offset, length)
        except OSError as error:
            raise MappingRefused(
                f"the kernel refused to map {length} bytes ({error}); raise vm.max_map_count or ulimit -v"
            ) from error

    def _no_pages(self, error: OSError) -> Exception:
        if error.errno == errno.EFBIG:
            return FileSizeLimited(f"this process may not write that far into shared memory ({error}); raise ulimit -f")
        if error.errno in _NO_SPACE:
            place = SHM_DIRECTORY if self.kind == POSIX else "memory"
            return MemoryExhausted(
                f"the operating system has no pages for the arena ({error}); make room in {place} or lower shm.capacity"
            )
        return error

    def close(self) -> None:
        """Close the descriptor; mappings stay."""
        if self.fd >= 0:
            # Other threads may ask meanwhile, and the number may be another file's as soon as it is closed.
            is_ours, fd, self.fd = self.has_descriptor, self.fd, -1
            if is_ours:
                os.close(fd)

    def __repr__(self) -> str:
        state = f"fd {self.fd}" if self.fd >= 0 else "closed"
        return f"<Segment {self.size} bytes, inode {self.inode}, {state}>"

    def __reduce__(self) -> str:
        raise TypeError("a Segment cannot be pickled; send its Whereabouts")


def _is_ours(status: os.stat_result, at: Whereabouts) -> bool:
    same = (status.st_dev, status.st_ino) == (at.device, at.inode)
    return same and stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()


def _posix_memory_free() -> int:
    try:
        status = os.statvfs(SHM_DIRECTORY)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def _posix_segment(size: int) -> int:
    import posix_ipc

    name = f"/{NAME_PREFIX}{os.getuid()}-segment-{secrets.token_hex(8)}"
    memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=size)
    # Someone who purges after a crash may have unlinked the name already.
    with contextlib.suppress(posix_ipc.ExistentialError):
        memory.unlink()
    os.set_inheritable(memory.fd, False)
    return int(memory.fd)


def _memfd_segment(size: int) -> int:
    fd = syscalls.memory_file(f"{NAME_PREFIX}segment")
    try:
        os.ftruncate(fd, size)
        os.fchmod(fd, 0o600)
        # Files of a tmpfs know no seals. Those who have none are looked at again: see ``insist_whole``.
        syscalls.seal_size(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def nameless_file(purpose: str, size: int) -> int:
    """Return the descriptor of a new small file in memory: a memfd, or where the kernel has none, one of ``/dev/shm``."""
    try:
        fd = syscalls.memory_file(f"{NAME_PREFIX}{purpose}")
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        return _posix_segment(size)
    try:
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd
