"""System calls that Python does not offer, as plain functions; most raise ``OSError``.

``mmap.mmap`` is no substitute: it duplicates the descriptor of its file. That costs one descriptor per mapping, and
closing the duplicate would drop every record lock that the process holds on the file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import platform
import resource
import time
from collections.abc import Callable
from typing import Any

from dask_shm_plugin.units import LARGE, PAGE

_PROT_NONE, _PROT_READ, _PROT_WRITE = 0, 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 0x01, 0x02
_MADV_DONTNEED, _MADV_DONTFORK, _MADV_DONTDUMP, _MADV_COLLAPSE = 4, 10, 16, 25
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
_UNMAP_STEP_BYTES, _UNMAP_PAUSE_S = 64 << 20, 5e-5
_F_SETLK = 6
# The kernel's numbers. A Python that was built with an older C library has no names for them: the builds that uv and
# conda install had neither these nor ``os.memfd_create`` (python-build-standalone, until the middle of 2026).
F_OFD_GETLK, F_OFD_SETLK = 36, 37
_MFD_CLOEXEC, _MFD_ALLOW_SEALING = 0x01, 0x02
_F_ADD_SEALS, _F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 0x01, 0x02, 0x04
_MEMFD_CREATE = {"x86_64": 319, "aarch64": 279, "riscv64": 279, "ppc64le": 360, "s390x": 350}
_MAP_FAILED = ctypes.c_void_p(-1).value


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return libc


class _Flock(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_short),
        ("whence", ctypes.c_short),
        ("start", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("pid", ctypes.c_int),
    )


@functools.cache
def _libc_with_gil() -> Any:
    return ctypes.PyDLL(None, use_errno=True)


class _Status(ctypes.Structure):
    # These offsets in ``struct stat`` are the same wherever a long has 8 bytes; the structure has at most 144 bytes.
    _fields_ = (
        ("device", ctypes.c_uint64),
        ("inode", ctypes.c_uint64),
        ("_between", ctypes.c_uint64 * 4),
        ("size", ctypes.c_int64),
        ("_rest", ctypes.c_uint64 * 16),
    )


class RecordLock:
    """The classic record lock of this process on one byte of a file.

    Keeps the GIL during the call, unlike ``fcntl.lockf``. A thread that has got the lock must not have to wait for the
    GIL: another thread of its process may hold the GIL for a second, while all other processes wait for the lock.

    Parameters
    ----------
    fd
        Descriptor of the file.
    byte
        Offset of the byte; it need not exist.

    Attributes
    ----------
    drop
        Drops the lock. It runs no Python code, so no exception can interrupt it.
    """

    def __init__(self, fd: int, byte: int) -> None:
        self._take, self.drop = (
            functools.partial(_libc_with_gil().fcntl, fd, _F_SETLK, ctypes.byref(_Flock(kind, os.SEEK_SET, byte, 1, 0)))
            for kind in (fcntl.F_WRLCK, fcntl.F_UNLCK)
        )

    def take(self) -> int:
        """Take the lock exclusively and without waiting; return 0 or ``errno``."""
        return ctypes.get_errno() if self._take() else 0


def status_of(fd: int) -> tuple[int, int, int] | None:
    """Return device, inode and size (bytes) of an open file, or None on failure. Keeps the GIL, like `RecordLock`."""
    status = _Status()
    return None if _fstat()(fd, status) else (status.device, status.inode, status.size)


@functools.cache
def _fstat() -> Callable[[int, _Status], int]:
    libc = ctypes.PyDLL(None)
    if not hasattr(libc, "fstat"):  # glibc before 2.33
        return _fstat_without_gil
    libc.fstat.argtypes = [ctypes.c_int, ctypes.POINTER(_Status)]
    call: Callable[[int, _Status], int] = libc.fstat
    return call


def _fstat_without_gil(fd: int, status: _Status) -> int:
    try:
        found = os.fstat(fd)
    except OSError:
        return -1
    status.device, status.inode, status.size = found.st_dev, found.st_ino, found.st_size
    return 0


def is_still(fd: int, device: int, inode: int) -> bool:
    """Tell whether a descriptor still refers to that file: other code may have closed it, and opened another file."""
    status = status_of(fd)
    return status is not None and status[:2] == (device, inode)


def _failure(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def _map(fd: int, offset: int, length: int, flags: int, access: int = _PROT_READ | _PROT_WRITE) -> int:
    """Map a part of a file; for large pages, at an address that equals the offset modulo ``LARGE``, if possible."""
    if length >= LARGE:
        with contextlib.suppress(OSError):
            return _map_in_agreement(fd, offset, length, flags, access)
    return _map_at(None, length, access, flags, fd, offset)


def _map_in_agreement(fd: int, offset: int, length: int, flags: int, access: int) -> int:
    """Reserve ``LARGE`` more bytes of addresses than are needed, map the part among them, and unmap the rest."""
    room = _map_at(None, length + LARGE, _PROT_NONE, _MAP_PRIVATE | _MAP_NORESERVE | _MAP_ANONYMOUS, -1, 0)
    before = (offset - room) % LARGE
    try:
        address = _map_at(room + before, length, access, flags | _MAP_FIXED, fd, offset)
    finally:
        # Unmap only the two ends: if the call has failed, other code may have mapped something between them by now.
        end = -(-(room + before + length) // PAGE) * PAGE
        for start, left in ((room, before), (end, room + length + LARGE - end)):
            with contextlib.suppress(OSError):
                _unmap_at_once(start, left)
    return address


def _map_at(where: int | None, length: int, access: int, flags: int, fd: int, offset: int) -> int:
    address = _libc().mmap(where, length, access, flags, fd, offset)
    if address == _MAP_FAILED:
        raise _failure("mmap")
    return int(address)


def memory_file(name: str) -> int:
    """Return the descriptor of a new memfd, which can be sealed; ``name`` is visible only in ``/proc``."""
    flags = _MFD_CLOEXEC | _MFD_ALLOW_SEALING
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, flags)
    libc, text = _libc(), name.encode()
    number = _MEMFD_CREATE.get(platform.machine())
    if hasattr(libc, "memfd_create"):
        fd = libc.memfd_create(text, flags)
    elif number is not None:
        fd = libc.syscall(ctypes.c_long(number), text, flags)
    else:
        raise OSError(errno.ENOSYS, f"memfd_create: {os.strerror(errno.ENOSYS)}")
    if fd < 0:
        raise _failure("memfd_create")
    return int(fd)


def seal_size(fd: int) -> None:
    """Seal the size of a memfd: no process can change it afterwards."""
    fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)


def map_shared(fd: int, offset: int, length: int) -> int:
    """Map ``length`` bytes of a file so that all processes see the writes, and return the address.

    Core dumps leave the mapping out: they would read, and thereby make, every page that the file lacks.
    """
    address = _map(fd, offset, length, _MAP_SHARED)
    _libc().madvise(address, length, _MADV_DONTDUMP)
    return address


def map_closed(fd: int, offset: int, length: int) -> int:
    """Map ``length`` bytes like :func:`map_shared`, but without access, which :func:`open_up` grants to parts.

    ``mlockall`` makes every page of an accessible mapping, but none of an inaccessible one.
    """
    address = _map(fd, offset, length, _MAP_SHARED, _PROT_NONE)
    _libc().madvise(address, length, _MADV_DONTDUMP)
    return address


def open_up(address: int, length: int) -> None:
    """Make a part of a mapping readable and writable; the address must be aligned to a page."""
    if _libc().mprotect(address, length, _PROT_READ | _PROT_WRITE) != 0:
        raise _failure("mprotect")


def map_private(fd: int, offset: int, length: int) -> int:
    """Map ``length`` bytes of a file copy-on-write, and return the address.

    No memory is reserved for private copies of its pages (``MAP_NORESERVE``): hardly any page is ever written.
    """
    return _map(fd, offset, length, _MAP_PRIVATE | _MAP_NORESERVE)


def reserve_addresses(length: int) -> int:
    """Reserve ``length`` bytes of addresses that nothing else will be mapped to, and return the first, a multiple of ``LARGE``.

    The addresses take no memory, and cannot be accessed until :func:`map_shared_at` maps something there.
    """
    flags = _MAP_PRIVATE | _MAP_NORESERVE | _MAP_ANONYMOUS
    return _map_in_agreement(-1, 0, length, flags, _PROT_NONE)


def map_shared_at(address: int, fd: int, offset: int, length: int) -> None:
    """Map ``length`` bytes of a file like :func:`map_shared`, to reserved addresses."""
    _map_at(address, length, _PROT_READ | _PROT_WRITE, _MAP_SHARED | _MAP_FIXED, fd, offset)
    _libc().madvise(address, length, _MADV_DONTDUMP)


def close_off(address: int, length: int) -> None:
    """Unmap what lies at reserved addresses, in steps like :func:`unmap`; the addresses stay reserved."""
    _drop_pages(address, length)
    flags = _MAP_PRIVATE | _MAP_NORESERVE | _MAP_ANONYMOUS | _MAP_FIXED
    _map_at(address, length, _PROT_NONE, flags, -1, 0)


def address_space_is_limited() -> bool:
    """Tell whether the address space of this process is limited (``ulimit -v``)."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def unmap(address: int, length: int) -> None:
    """Unmap a mapping, after dropping its pages.

    To unmap 1 GiB at once blocks all other threads of the process that map memory, including an event loop that
    allocates, for 23 ms; if the pages were dropped before, for 0.1 ms (Linux 6.18, November 2026). The pages of a large
    mapping are dropped in steps of 64 MiB. After each step, a pause of 50 µs lets another process have this processor:
    several processes may unmap the same value at the same time.
    """
    _drop_pages(address, length)
    _unmap_at_once(address, length)


def _drop_pages(address: int, length: int) -> None:
    for done in range(0, length, _UNMAP_STEP_BYTES):
        _libc().madvise(address + done, min(_UNMAP_STEP_BYTES, length - done), _MADV_DONTNEED)
        if length > _UNMAP_STEP_BYTES:
            time.sleep(_UNMAP_PAUSE_S)


def _unmap_at_once(address: int, length: int) -> None:
    if _libc().munmap(address, length) != 0:
        raise _failure("munmap")


def populate(address: int, length: int) -> bool:
    """Fill the page table for a part of a mapping; return False if that fails, as it does before Linux 5.14.

    The address need not be aligned to a page.
    """
    first = address // PAGE * PAGE
    return bool(_libc().madvise(first, address + length - first, _MADV_POPULATE_READ) == 0)


def populate_for_writing(address: int, length: int) -> bool:
    """Fill the page table for a part of a mapping, as if each page was written; return False if that fails.

    Each page of a private mapping becomes a private copy. Needs Linux 5.14.
    """
    return bool(_libc().madvise(address, length, _MADV_POPULATE_WRITE) == 0)


def collapse(address: int, length: int) -> bool:
    """Replace the small pages of a part of a shared mapping by large ones; return False if the kernel cannot now.

    Missing small pages are filled with zeros, but the call fails for a large page of which no small page exists. The
    address and the length must be multiples of ``LARGE``. Needs Linux 6.1, and a ``shmem_enabled`` other than "deny".
    """
    return bool(_libc().madvise(address, length, _MADV_COLLAPSE) == 0)


def keep_from_children(address: int, length: int) -> None:
    """Exclude a mapping from forked children."""
    if _libc().madvise(address, length, _MADV_DONTFORK) != 0:
        raise _failure("madvise")


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Return the pages of a part of a file to the operating system; the part reads as zeros afterwards."""
    if _libc().fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length) != 0:
        raise _failure("fallocate")
