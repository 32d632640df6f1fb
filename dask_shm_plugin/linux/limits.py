"""The limits on this node's memory, and the memory that is left: of the machine and of its control groups."""

from __future__ import annotations

import errno
import functools
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

from dask_shm_plugin.exceptions import DescriptorsExhausted

_MARGIN_BYTES = 512 << 20
PHYSICAL = "physical memory"
_ROOT = "/sys/fs/cgroup"
_MEMBERSHIP = "/proc/self/cgroup"
# Beyond `memory.high` the kernel kills no process, but throttles it. With a limit of 400 MiB, a write of 1 MiB beyond
# it took 20 to 34 seconds (Linux 6.1, 24 November 2026): without swap, the kernel cannot reclaim shared memory.
_UNIFIED = (("memory.max", "memory.high"), "memory.current", b"inactive_file ")
_LEGACY = (("memory.limit_in_bytes",), "memory.usage_in_bytes", b"total_inactive_file ")


class _Group(NamedTuple):
    """A control group: its folder, the files of its limits and usage, and the ``memory.stat`` field of cached files."""

    folder: str
    limits: tuple[str, ...]
    usage: str
    reclaimable: bytes

    def limit(self) -> int | None:
        """Return the lowest of its limits in bytes, or None if it has none."""
        sizes = (self.read(name) for name in self.limits)
        return min((size for size in sizes if size is not None), default=None)

    def read(self, name: str) -> int | None:
        """Return the number in one of its files, or None if there is none."""
        try:
            return int(_read(os.path.join(self.folder, name)))
        except ValueError:
            return None


class Limit(NamedTuple):
    """A limit on memory: its name, and its size or the memory left below it, in bytes."""

    name: str
    size: int


def tightest() -> Limit:
    """Return the lowest of the physical memory and the limits of all control groups above this process.

    Raises
    ------
    DescriptorsExhausted
        The limits cannot be read, because no more files can be opened.
    """
    limits = [Limit(PHYSICAL, _physical())]
    limits += [
        Limit(f"control group {group.folder}", size) for group in _groups() if (size := group.limit()) is not None
    ]
    return min(limits, key=lambda limit: limit.size)


def commits_are_limited() -> bool:
    """Tell whether the kernel counts private mappings against a limit from the start (``vm.overcommit_memory`` is 2)."""
    return _read("/proc/sys/vm/overcommit_memory").strip() == b"2"


def memory_limit() -> int:
    """Return the tightest limit in bytes."""
    return tightest().size


def head_room() -> int:
    """Return the bytes of new shared memory that may be written, see :func:`least_left`; it may be negative."""
    return least_left().size


def least_left() -> Limit:
    """Return the limit that leaves least for new shared memory, and the bytes left below it, less a margin.

    The candidates are the machine's available memory and all control groups above this process; cached files count as
    free. Beyond the limit, the kernel kills or throttles processes.

    Raises
    ------
    DescriptorsExhausted
        The limits cannot be read, because no more files can be opened. An unknown limit must not count as unlimited.
    """
    # The margin is for copies: values that are not shared are sent, and each receiver has a private copy of them.
    margin = min(_MARGIN_BYTES, _known_limit() // 10)
    left = [Limit(PHYSICAL, _available() - margin)]
    for group in _limited_groups(_read(_MEMBERSHIP), int(time.monotonic())):
        size = _left(group)
        if size is not None:
            left.append(Limit(f"control group {group.folder}", size - margin))
    return min(left, key=lambda limit: limit.size)


@functools.lru_cache(maxsize=1)
def _limited_groups(membership: bytes, second: int) -> list[_Group]:
    """Return the control groups that limit memory, from a cache, because there may be many that do not.

    Parameters
    ----------
    membership, second
        Keys of the cache: the groups are looked up again when the process is moved to others, and once a second.

    Notes
    -----
    A limit may go unnoticed for one second if its group had none before. The values of known limits, and the usage, are
    not cached.
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
    # Without access to /proc, use the memory that is free without any reclaim.
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(b"MemAvailable:")), free)


def _read(path: str) -> bytes:
    """Return the content of a kernel file, or nothing if it cannot be read; a lack of descriptors is raised."""
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
    """Yield the control groups of this process and their parents: of version 2, and version 1's memory controller."""
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
