"""Find the segments of this user, and the processes that have them open or mapped, by reading ``/proc``."""

from __future__ import annotations

import contextlib
import os
import stat
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from dask_shm_plugin.linux.segment import MEMFD, NAME_PREFIX, POSIX, SHM_DIRECTORY

_LINKS = {f"{SHM_DIRECTORY}/{NAME_PREFIX}": POSIX, f"/memfd:{NAME_PREFIX}segment": MEMFD}


class FileId(NamedTuple):
    """The identity of a segment's file."""

    device: int
    inode: int


class Sighting(NamedTuple):
    """A segment, its kind of memory, and a descriptor of it in each process that has it open, by pid."""

    file: FileId
    kind: str
    descriptors: dict[int, int]


class Part(NamedTuple):
    """A part of a file that a process has mapped: offset in the file and length, in bytes."""

    offset: int
    length: int


def sightings() -> list[Sighting]:
    """Return all segments of this user; processes that this user may not look into are left out."""
    found: defaultdict[tuple[FileId, str], dict[int, int]] = defaultdict(dict)
    for pid in _pids():
        for fd, file, kind in _segments_of(pid):
            found[file, kind].setdefault(pid, fd)
    return [Sighting(file, kind, pids) for (file, kind), pids in found.items()]


def mapped_by(pid: int, file: FileId) -> list[Part]:
    """Return the parts of a file that a process has mapped copy-on-write, as views are.

    None if the process is gone, or may not be looked into.
    """
    device, inode = f"{os.major(file.device):02x}:{os.minor(file.device):02x}", str(file.inode)
    parts = []
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            place, access, offset, *of_file = line.split(maxsplit=5)[:5]
            if of_file == [device, inode] and access.endswith("p"):
                first, end = (int(address, 16) for address in place.split("-"))
                parts.append(Part(int(offset, 16), end - first))
    return parts


def large_pages_of(pid: int, file: FileId) -> int:
    """Return the bytes of a file that a process has mapped by large pages; walks page tables (10 ms per 256 MiB)."""
    found, is_ours, inode = 0, False, str(file.inode).encode()
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps", "rb") as smaps:
        for line in smaps:
            fields = line.split()
            if not fields[0].endswith(b":"):  # the first line of a mapping: addresses, access, offset, device, inode
                is_ours = fields[4] == inode
            elif is_ours and fields[0] == b"ShmemPmdMapped:":
                found += int(fields[1]) * 1024
    return found


def is_stopped(pid: int) -> bool:
    """Tell whether a process stands still, because of SIGSTOP or a debugger."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    return False


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _segments_of(pid: int) -> Iterator[tuple[int, FileId, str]]:
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):  # the descriptor was closed meanwhile
                target = os.readlink(f"{folder}/{name}")
                kind = next((kind for start, kind in _LINKS.items() if target.startswith(start)), None)
                status = os.stat(f"{folder}/{name}") if kind else None
                if kind and status and stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid():
                    yield int(name), FileId(status.st_dev, status.st_ino), kind
