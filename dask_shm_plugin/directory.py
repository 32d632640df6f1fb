"""What each member would answer when it is asked for a value: others look there first, and need not ask.

A directory is small and of fixed size, part of the segment, and written by its member alone. A name has two places; where
both are taken, the older listing goes. Whoever finds nothing asks.

Places are read and written with system calls, not through a mapping. So a page that does not exist costs neither memory
nor a SIGBUS, and no mutex is needed: a listing that was overwritten while it was read does not add up.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
import threading
import zlib
from collections import OrderedDict

from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import SharedMemoryError, TableCorrupt
from dask_shm_plugin.layout import DIRECTORY_BYTES, PLACE_BYTES, directory_offset
from dask_shm_plugin.markbook import PLACES, TAGS, MarkBook
from dask_shm_plugin.memberbook import Member
from dask_shm_plugin.roster import Roster
from dask_shm_plugin.segment import Segment

_WAYS = 2
_HEAD = struct.Struct("<16sQ")


class Directory:
    """The listings of this process, and a look into those of others.

    Parameters
    ----------
    marks
        In the table.
    segment
        In which the places lie.
    roster
        Knows who is alive.
    member
        This process.

    Notes
    -----
    Thread-safe. There must never be a moment when a place is marked and its listing is not what the member would
    answer: it is marked last, and its mark goes first. What a reader has found was marked when it looked.
    """

    def __init__(self, marks: MarkBook, segment: Segment, roster: Roster, member: Member) -> None:
        # Taken back even where the table is damaged: nobody may go by what this process has listed.
        self._marks: MarkBook | None = marks
        self._segment, self._roster, self._member = segment, roster, member
        self._lock = threading.RLock()  # a finalizer may read a value, and withdraw it, at any moment
        self._names: OrderedDict[int, bytes] = OrderedDict()  # by place, the oldest first

    @step("list value")
    def enter(self, name: bytes, data: bytes) -> bool:
        """List some bytes under a name; return False where there is no room for them."""
        if _HEAD.size + len(data) > PLACE_BYTES:
            return False
        listing = _HEAD.pack(_digest(self._member, name, data), len(data)) + data
        with self._lock:
            if self._marks is None:
                return False
            place = self._place_for(name)
            self._unmark(place)
            try:
                self._segment.write(directory_offset(self._member.slot, place), memoryview(listing))
            except (SharedMemoryError, OSError):
                return False
            self._names[place] = name
            self._marks.set(self._member.slot, place, _tag_of(name))
            return True

    @step("cross out")
    def cross_out(self, name: bytes) -> None:
        """Take a name back; harmless when it is not listed."""
        with self._lock:
            self._unmark_all(name)

    def is_empty(self, member: Member) -> bool:
        """Tell, at once, whether a member lists nothing."""
        return self._marks is None or not self._marks.has_any(member.slot)

    def find(self, member: Member, name: bytes) -> bytes | None:
        """Return what a member has listed under a name, or None; no system call where it has not."""
        marks = self._marks
        if marks is None:
            return None
        tag = _tag_of(name)
        marked = [place for place in _places_of(name) if marks.tag(member.slot, place) == tag]
        if not marked or not self._roster.is_running(member):
            return None
        for place in marked:
            data = self._read(member, place, name)
            if data is not None:
                return data
        return None

    def close(self) -> None:
        """Take everything back, give its pages back, and let go of the table."""
        with self._lock:
            self._unmark_all()
            self._marks = None
        # Where the kernel takes no pages back, the next member of this slot writes them again.
        with contextlib.suppress(OSError, SharedMemoryError):
            self._segment.give_back(directory_offset(self._member.slot), DIRECTORY_BYTES)

    def _read(self, member: Member, place: int, name: bytes) -> bytes | None:
        listing = self._segment.read(directory_offset(member.slot, place), PLACE_BYTES)
        digest, length = _HEAD.unpack_from(listing)
        data = bytes(listing[_HEAD.size : _HEAD.size + length])
        return data if digest == _digest(member, name, data) else None

    def _place_for(self, name: bytes) -> int:
        places = _places_of(name)
        own = [place for place in places if self._names.get(place) == name]
        free = [place for place in places if place not in self._names]
        return (own or free or [place for place in self._names if place in places])[0]

    def _unmark_all(self, name: bytes | None = None) -> None:
        for place in list(self._names) if name is None else _places_of(name):
            if name is None or self._names.get(place) == name:
                self._unmark(place)

    def _unmark(self, place: int) -> None:
        if place in self._names and self._marks is not None:
            # Nobody finds anything in memory that was cut short, and to store there would be the end of the process.
            with contextlib.suppress(TableCorrupt):
                self._segment.insist_whole()
                self._marks.unset(self._member.slot, place)
        # Not before: what is interrupted in between must be done again.
        self._names.pop(place, None)

    def __repr__(self) -> str:
        return f"<Directory of member {self._member.slot}, {len(self._names)} listings>"


def _places_of(name: bytes) -> range:
    first = zlib.crc32(name) % (PLACES // _WAYS) * _WAYS
    return range(first, first + _WAYS)


def _tag_of(name: bytes) -> int:
    # Of other bits than the place.
    return (zlib.crc32(name) >> 16) % (TAGS - 1) + 1


def _digest(member: Member, name: bytes, data: bytes) -> bytes:
    """Sum up whose listing it is, in which incarnation, under which name and what it says."""
    head = struct.pack("<QQQ", *member, len(name))
    return hashlib.blake2b(head + name + data, digest_size=16).digest()
