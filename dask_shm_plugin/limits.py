"""How much memory this node may use at all: what is installed, and what control groups allow."""

from __future__ import annotations

import os
from collections.abc import Iterator


def memory_limit() -> int:
    """Return the least of physical memory and the limits of every control group above this process, in bytes."""
    return min(_physical(), *_cgroup_limits(), 1 << 62)


def _physical() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_limits() -> Iterator[int]:
    for folder, file in _cgroup_folders():
        while True:
            limit = _read(os.path.join(folder, file))
            if limit is not None:
                yield limit
            parent = os.path.dirname(folder)
            if parent == folder or not parent.startswith("/sys/fs/cgroup"):
                break
            folder = parent


def _cgroup_folders() -> Iterator[tuple[str, str]]:
    """Return the folder of this process in version 2 and in the memory controller of version 1."""
    try:
        with open("/proc/self/cgroup") as file:
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
                yield root + path.rstrip("/"), "memory.max"
        elif "memory" in controllers.split(","):
            yield "/sys/fs/cgroup/memory" + path.rstrip("/"), "memory.limit_in_bytes"


def _read(path: str) -> int | None:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return None
