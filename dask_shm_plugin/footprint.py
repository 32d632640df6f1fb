"""How much memory a process uses, by kind; and what of its shared memory is none of ours.

The kernel counts a shared page in every process that has touched it. What a process has of the arena is known better
from the table; what else it shares (its own ``SharedMemory``, a mapped file on a tmpfs) is found here, and stays its own.
"""

from __future__ import annotations

from typing import NamedTuple

from dask_shm_plugin.segment import NAME_PREFIX
from dask_shm_plugin.views import touched

_TOO_LITTLE = 4 << 20
_OURS = tuple(f"{place}{NAME_PREFIX}".encode() for place in ("/dev/shm/", "/memfd:"))


class Footprint(NamedTuple):
    """Resident memory of a process, in bytes, as the kernel keeps it: reading it walks no page tables."""

    anonymous: int
    file: int
    shared: int


def read(pid: int | str = "self") -> Footprint:
    """Read ``/proc/<pid>/status``.

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
    """Estimate how much of this process's resident shared memory, in bytes, belongs to no arena.

    Costs a walk through the list of mappings, and a fixed sample of the pages of each that is shared and not ours (a
    millisecond); where there is too little shared memory to matter, nothing.
    """
    if read().shared < _TOO_LITTLE:
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
    """Return the devices whose files are shared memory: every tmpfs, and the one that nobody has mounted."""
    with open("/proc/self/mountinfo", "rb") as mounts:
        found = {line.split()[2] for line in mounts if line.partition(b" - ")[2].startswith(b"tmpfs ")}
    return {b"%02x:%02x" % tuple(map(int, device.split(b":"))) for device in found} | {b"00:01"}
