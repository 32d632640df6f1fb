"""How much memory this node may use at all, and how much is left: what is installed, and what control groups allow."""

from __future__ import annotations

import errno
import functools
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

from dask_shm_plugin.exceptions import DescriptorsExhausted

_MARGIN = 512 << 20
_ROOT = "/sys/fs/cgroup"
_MEMBERSHIP = "/proc/self/cgroup"
# Beyond `memory.high` nobody is killed, but made to wait: with 400 MiB, a write of 1 MiB there took 20 to 34 seconds
# (Linux 6.1, 24 November 2026), for without swap the kernel finds nothing in shared memory that it could take back.
_UNIFIED = (("memory.max", "memory.high"), "memory.current", b"inactive_file ")
_LEGACY = (("memory.limit_in_bytes",), "memory.usage_in_bytes", b"total_inactive_file ")


class _Group(NamedTuple):
    """A control group: its directory, the files of its limits and its usage, and what stands before cached files."""

    folder: str
    limits: tuple[str, ...]
    usage: str
    reclaimable: bytes

    def limit(self) -> int | None:
        """Return the least of its limits, if it has any."""
        sizes = (self.read(name) for name in self.limits)
        return min((size for size in sizes if size is not None), default=None)

    def read(self, name: str) -> int | None:
        """Return the number in one of its files."""
        try:
            return int(_read(os.path.join(self.folder, name)))
        except ValueError:
            return None


class Limit(NamedTuple):
    """A limit on memory: whose it is, and how much it is or has left, in bytes."""

    name: str
    size: int


def tightest() -> Limit:
    """Return the least of physical memory and the limits of every control group above this process.

    Raises
    ------
    DescriptorsExhausted
        Nothing can be read.
    """
    limits = [Limit("physical memory", _physical())]
    limits += [
        Limit(f"control group {group.folder}", size) for group in _groups() if (size := group.limit()) is not None
    ]
    return min(limits, key=lambda limit: limit.size)


def memory_limit() -> int:
    """Return the tightest limit in bytes."""
    return tightest().size


def head_room() -> int:
    """Return how many bytes of new shared memory may be written; see :func:`least_left`."""
    return least_left().size


def least_left() -> Limit:
    """Return what leaves least for new shared memory, less a margin, and how much that is: beyond it, the kernel kills or stalls.

    The least of what the machine has available and what each control group above this process has left, where cached
    files count as free.

    Raises
    ------
    DescriptorsExhausted
        Nothing can be read. What is not known must not count as unlimited.
    """
    # What is not shared any more is sent, and every copy is private: a group that is full of shared memory must leave room.
    margin = min(_MARGIN, _known_limit() // 10)
    left = [Limit("physical memory", _available() - margin)]
    for group in _limited_groups(_read(_MEMBERSHIP), int(time.monotonic())):
        size = _left(group)
        if size is not None:
            left.append(Limit(f"control group {group.folder}", size - margin))
    return min(left, key=lambda limit: limit.size)


@functools.lru_cache(maxsize=1)
def _limited_groups(membership: bytes, second: int) -> list[_Group]:
    """Return the control groups that limit memory: there may be many that do not.

    Looked for again when the process is moved to other groups, and once a second: so long may a limit that is new to a group
    go unnoticed. What a known limit is, and what is used of it, is read each time.
    """
    return [group for group in _groups() if group.limit() is not None]


def _left(group: _Group) -> int | None:
    limit, usage = group.limit(), group.read(group.usage)
    if limit is None or usage is None or limit >= _physical():
        return None
    return limit - usage + _reclaimable(group)


def _reclaimable(group: _Group) -> int:
    lines = _read(os.path.join(group.folder, "memory.stat")).splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(group.reclaimable)), 0)


def _available() -> int:
    lines = _read("/proc/meminfo").splitlines()
    # Where /proc is hidden, the kernel still tells what is free without giving anything up for it.
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(b"MemAvailable:")), free)


def _read(path: str) -> bytes:
    """Return what a file of the kernel says; nothing where there is none."""
    try:
        with open(path, "rb") as file:
            return bytes(file.read())
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise DescriptorsExhausted(
                f"this process cannot open {path} to see how much memory is left ({error.strerror}); raise ulimit -n"
            ) from error
        return b""


def _physical() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def _known_limit() -> int:
    return memory_limit()


def _groups() -> Iterator[_Group]:
    """Return the control groups of this process and all above them, of version 2 and of version 1's memory controller."""
    for folder, is_unified in _folders():
        while folder.startswith(_ROOT):
            yield _Group(folder, *(_UNIFIED if is_unified else _LEGACY))
            folder = os.path.dirname(folder)


def _folders() -> Iterator[tuple[str, bool]]:
    for line in os.fsdecode(_read(_MEMBERSHIP)).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for root in (_ROOT, f"{_ROOT}/unified"):
                yield root + path.rstrip("/"), True
        elif "memory" in controllers.split(","):
            yield f"{_ROOT}/memory" + path.rstrip("/"), False
