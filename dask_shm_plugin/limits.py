"""How much memory this node may use at all, and how much is left: what is installed, and what control groups allow."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

_MARGIN = 256 << 20
_ROOT = "/sys/fs/cgroup"
_UNIFIED = ("memory.max", "memory.current", b"inactive_file ")
_LEGACY = ("memory.limit_in_bytes", "memory.usage_in_bytes", b"total_inactive_file ")


class _Group(NamedTuple):
    """A control group: its directory, the files of its limit and its usage, and what stands before cached files."""

    folder: str
    limit: str
    usage: str
    reclaimable: bytes

    def read(self, name: str) -> int | None:
        """Return the number in one of its files."""
        try:
            with open(os.path.join(self.folder, name)) as file:
                return int(file.read())
        except (OSError, ValueError):
            return None


def memory_limit() -> int:
    """Return the least of physical memory and the limits of every control group above this process, in bytes."""
    limits = (group.read(group.limit) for group in _groups())
    return min(_physical(), *(limit for limit in limits if limit is not None), 1 << 62)


def head_room() -> int:
    """Return how many bytes of new shared memory may be written, with a margin: beyond that, the kernel kills.

    The least of what the machine has available and what each control group above this process has left, where cached
    files count as free.
    """
    margin = min(_MARGIN, _known_limit() // 20)
    left = (_left(group) for group in _groups())
    return min(_available(), *(size for size in left if size is not None), 1 << 62) - margin


def _left(group: _Group) -> int | None:
    limit, usage = group.read(group.limit), group.read(group.usage)
    if limit is None or usage is None or limit >= _physical():
        return None
    return limit - usage + _reclaimable(group)


def _reclaimable(group: _Group) -> int:
    try:
        with open(os.path.join(group.folder, "memory.stat"), "rb") as file:
            return next((int(line.split()[1]) for line in file if line.startswith(group.reclaimable)), 0)
    except OSError:
        return 0


def _available() -> int:
    try:
        with open("/proc/meminfo", "rb") as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith(b"MemAvailable:")), 1 << 62)
    except OSError:
        return 1 << 62


def _physical() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def _known_limit() -> int:
    return memory_limit()


def _groups() -> Iterator[_Group]:
    """Return the control groups of this process and all above it, of version 2 and of version 1's memory controller."""
    for folder, is_unified in _folders():
        while folder.startswith(_ROOT):
            yield _Group(folder, *(_UNIFIED if is_unified else _LEGACY))
            folder = os.path.dirname(folder)


def _folders() -> Iterator[tuple[str, bool]]:
    try:
        with open("/proc/self/cgroup") as file:
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for root in (_ROOT, f"{_ROOT}/unified"):
                yield root + path.rstrip("/"), True
        elif "memory" in controllers.split(","):
            yield f"{_ROOT}/memory" + path.rstrip("/"), False
