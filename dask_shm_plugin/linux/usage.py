"""The memory that a process uses, by kind, and the part of its shared memory that belongs to no arena.

The kernel counts a shared page in every process that has touched it. A process's share of the arena is computed from
the table. Its other shared memory (its own ``SharedMemory``, a mapped file on a tmpfs) is measured here, and counts as
its own.
"""

from __future__ import annotations

from typing import NamedTuple

from dask_shm_plugin.linux.pagemap import touched
from dask_shm_plugin.linux.segment import NAME_PREFIX

_MIN_SHARED_BYTES = 4 << 20
_OURS = tuple(f"{place}{NAME_PREFIX}".encode() for place in ("/dev/shm/", "/memfd:"))


class Footprint(NamedTuple):
    """Resident memory of a process, in bytes. The kernel keeps these counters, so reading them walks no page tables."""

    anonymous: int
    file: int
    shared: int


def read(pid: int | str = "self") -> Footprint:
    """Read the resident memory of a process from ``/proc/<pid>/status``.

    Raises
    ------
    OSError
        The process is gone.
    """
    with open(f"/proc/{pid}/status", "rb") as status:
        fields = dict(line.split(b":", 1) for line in status if line.startswith(b"Rss"))
    if len(fields) < 3:
        raise ProcessLookupError(f"process {pid} has no memory any more")
    return Footprint(*(int(fields[name].split()[0]) * 1024 for name in (b"RssAnon", b"RssFile", b"RssShmem")))


def other_shared() -> int:
    """Estimate the bytes of this process's resident shared memory that belong to no arena.

    Reads the list of mappings, and samples a fixed number of pages of each mapping of shared memory that is not ours
    (one millisecond). Returns 0 at once if less than 4 MiB of shared memory is resident.
    """
    if read().shared < _MIN_SHARED_BYTES:
        return 0
    devices, total = _devices(), 0
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            if fields[3] in devices and not (len(fields) > 5 and fields[5].startswith(_OURS)):
                first, last = (int(address, 16) for address in fields[0].split(b"-"))
                total += touched(first, last - first)
    return min(total, read().shared)


def _devices() -> set[bytes]:
    """Return the devices of shared memory: of every mounted tmpfs, and the kernel's internal one (00:01)."""
    with open("/proc/self/mountinfo", "rb") as mounts:
        found = {line.split()[2] for line in mounts if line.partition(b" - ")[2].startswith(b"tmpfs ")}
    return {b"%02x:%02x" % tuple(map(int, device.split(b":"))) for device in found} | {b"00:01"}
