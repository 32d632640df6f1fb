"""A span of shared memory: create, open, map, read, write, make pages and give them back.

The memory has no name. A new segment is unlinked before it is used, so that the death of its last process frees it.
Another process opens it through ``/proc/<pid>/fd/<n>`` of a process that has it open, and compares device and inode.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import (
    ArenaUnavailable,
    DescriptorLost,
    FileSizeLimited,
    MappingRefused,
    MemoryExhausted,
    TableCorrupt,
)
from dask_shm_plugin.linux import syscalls

T = TypeVar("T")

NAME_PREFIX = "dask-shm-"
SHM_DIRECTORY = "/dev/shm"
POSIX, MEMFD = "POSIX shared memory", "memfd"
# The kernel lets one process at a time write to a file: small steps keep the waits of the others short.
_WRITE_STEP_BYTES = 4 << 20
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM}


class Whereabouts(NamedTuple):
    """How to open a segment: pid and descriptor of a process that has it open, and the file's expected identity."""

    pid: int
    fd: int
    device: int
    inode: int


class Segment:
    """An open segment; owns its descriptor.

    Parameters
    ----------
    fd
        A descriptor, which :meth:`close` closes.

    Attributes
    ----------
    fd
        The descriptor, or -1 when closed.
    size
        Bytes.
    device, inode
        The identity of the file.

    Notes
    -----
    Thread-safe: only the descriptor changes. A process opens a segment only once, because closing any descriptor of a
    file drops all record locks that the process holds on that file.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        status = os.fstat(fd)
        self.size = status.st_size
        self.device, self.inode = status.st_dev, status.st_ino

    @classmethod
    @step("create segment")
    def create(cls, size: int, filled: int | None = None) -> Segment:
        """Create a sparse segment: POSIX shared memory if ``/dev/shm`` has room for it, a memfd if not.

        Parameters
        ----------
        size
            Bytes.
        filled
            The most bytes that will have pages at the same time; ``size`` by default.

        Raises
        ------
        ArenaUnavailable
            The memory cannot be created; the message names the remedy.
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
        """Open a segment that another process has open.

        Raises
        ------
        ArenaUnavailable
            The process is gone, its descriptors are not accessible, or the descriptor is another file's.
        """
        path = f"/proc/{at.pid}/fd/{at.fd}"
        try:
            # Check before opening: the number may be that of a FIFO or a device by now, and opening these has effects.
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
        """How another process can open this segment, while this process has it open."""
        return Whereabouts(os.getpid(), self.fd, self.device, self.inode)

    @property
    def kind(self) -> str:
        """The kind of memory: POSIX shared memory, which the size of ``/dev/shm`` limits, or a memfd."""
        with contextlib.suppress(OSError):
            if os.stat(SHM_DIRECTORY).st_dev == self.device:
                return POSIX
        return MEMFD

    @property
    def resident(self) -> int:
        """Bytes of the segment that have pages."""
        try:
            return os.fstat(self.fd).st_blocks * 512
        except OSError:
            self.insist_whole()
            raise

    @step("make pages")
    def reserve(self, offset: int, length: int) -> None:
        """Make the pages of a part exist, so that access through a mapping cannot fail.

        Raises
        ------
        MemoryExhausted
            There are no pages left, or the file-size limit is reached (``FileSizeLimited``).
        """
        self.insist_whole()
        try:
            os.posix_fallocate(self.fd, offset, length)
        except OSError as error:
            raise self._no_pages(error) from error

    def write(self, offset: int, data: memoryview) -> None:
        """Copy flat bytes into the segment, without the GIL and without a mapping.

        ``pwrite`` makes missing pages as it goes, and reports a lack of them as an error. A store through a mapping
        would be answered by SIGBUS.

        Raises
        ------
        MemoryExhausted
            There are no pages left, or the file-size limit is reached (``FileSizeLimited``).
        """
        done = 0
        while done < len(data):
            self.insist_whole()
            try:
                written = os.pwrite(self.fd, data[done : done + _WRITE_STEP_BYTES], offset + done)
            except OSError as error:
                raise self._no_pages(error) from error
            if written == 0:
                raise MemoryExhausted("the operating system took no more bytes; free memory or lower shm.capacity")
            done += written

    def read(self, offset: int, length: int) -> memoryview:
        """Copy bytes of the segment into private memory, without a mapping.

        Raises
        ------
        ArenaUnavailable
            The segment was truncated during the copy.
        """
        data, done = memoryview(bytearray(length)), 0
        while done < length:
            self.insist_whole()
            count = os.preadv(self.fd, [data[done : done + _WRITE_STEP_BYTES]], offset + done)
            if count == 0:
                raise ArenaUnavailable("the segment is shorter than it was: it has been truncated")
            done += count
        return data

    @step("give pages back")
    def give_back(self, offset: int, length: int) -> None:
        """Return the pages of a part to the operating system; it reads as zeros afterwards."""
        self.insist_whole()
        syscalls.punch_hole(self.fd, offset, length)

    def first_page(self, offset: int, length: int) -> int | None:
        """Return the offset in the segment of the first page that exists in a part, or None."""
        try:
            found = os.lseek(self.fd, offset, os.SEEK_DATA)
        except OSError:
            return None
        return found if found < offset + length else None

    def missing(self, offset: int, length: int) -> int:
        """Return how many bytes of a part, at least, have no pages."""
        end, at, present = offset + length, offset, 0
        try:
            while at < end:
                at = os.lseek(self.fd, at, os.SEEK_DATA)
                hole = os.lseek(self.fd, at, os.SEEK_HOLE)
                present += max(0, min(hole, end) - at)
                at = hole
        except OSError:  # no data follows
            pass
        return length - present

    def map_shared(self, offset: int, length: int) -> int:
        """Map a part for reading and writing in place, and return the address."""
        return self._mapped(syscalls.map_shared, offset, length)

    def map_closed(self, offset: int, length: int) -> int:
        """Map a part without access, see :func:`syscalls.map_closed`, and return the address."""
        return self._mapped(syscalls.map_closed, offset, length)

    def map_shared_at(self, address: int, offset: int, length: int) -> None:
        """Map a part for reading and writing in place, at an address that was reserved for it."""
        self._mapped(lambda fd, *part: syscalls.map_shared_at(address, fd, *part), offset, length)

    @step("map")
    def map_private(self, offset: int, length: int) -> int:
        """Map a part copy-on-write, and return the address."""
        return self._mapped(syscalls.map_private, offset, length)

    def private_mappings(self) -> Iterator[tuple[int, int]]:
        """Yield address and length of each copy-on-write mapping of this segment, from ``/proc/self/maps``."""
        ours = f"{os.major(self.device):02x}:{os.minor(self.device):02x}", str(self.inode)
        with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps.read().splitlines():
                part, access, _, *file = line.split(maxsplit=5)[:5]
                if tuple(file) == ours and access.endswith("p"):
                    first, end = (int(address, 16) for address in part.split("-"))
                    yield first, end - first

    def insist_whole(self) -> None:
        """Raise unless the descriptor is still the segment's, and the segment has its full size.

        Access to a mapping beyond the end of its file is answered by SIGBUS. If other code has closed the descriptor,
        its number may be another file's, and a write would go there.

        Raises
        ------
        TableCorrupt
            The segment was truncated.
        DescriptorLost
            Other code in this process has closed the descriptor.
        ArenaUnavailable
            This process has left the arena.
        """
        status = syscalls.status_of(self.fd)
        if status is None or status[:2] != (self.device, self.inode):
            if self.fd < 0:
                raise ArenaUnavailable("this process has left the arena")
            raise DescriptorLost("other code in this process has closed the descriptor of the arena")
        if status[2] < self.size:
            raise TableCorrupt("somebody has cut the memory short")

    @property
    def has_descriptor(self) -> bool:
        """Whether the descriptor is still the segment's."""
        return syscalls.is_still(self.fd, self.device, self.inode)

    def _mapped(self, how: Callable[[int, int, int], T], offset: int, length: int) -> T:
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
        """Close the descriptor, unless other code has closed it; mappings stay."""
        if self.fd >= 0:
            # ``fd`` becomes -1 first: once the number is closed, it may be another file's, and other threads read it.
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
    # A process that purges leftovers may have unlinked the name already.
    with contextlib.suppress(posix_ipc.ExistentialError):
        memory.unlink()
    os.set_inheritable(memory.fd, False)
    return int(memory.fd)


def _memfd_segment(size: int) -> int:
    fd = syscalls.memory_file(f"{NAME_PREFIX}segment")
    try:
        os.ftruncate(fd, size)
        os.fchmod(fd, 0o600)
        # POSIX shared memory cannot be sealed: there, only ``insist_whole`` detects that the file was truncated.
        syscalls.seal_size(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def nameless_file(purpose: str, size: int) -> int:
    """Return the descriptor of a new small file in memory: a memfd, or POSIX shared memory if there are no memfds."""
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
