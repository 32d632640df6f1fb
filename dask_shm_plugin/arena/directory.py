"""The directory of each member: it lists the answers that the member would give when it is asked for a value.

Other members look there first and need not ask. A reader that finds no listing asks the member.

A directory is a part of the segment. It is small, of fixed size, and written by its member alone. A name has two places
and is listed in one of them. If both are taken by other names, the older listing is replaced.

Places are read and written with system calls, not through a mapping. So a missing page costs no memory and raises no
SIGBUS. No mutex is needed either: if a listing is overwritten while it is read, its checksum does not match.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from dask_shm_plugin.arena.members import Roster
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import SharedMemoryError, TableCorrupt
from dask_shm_plugin.linux.segment import Segment
from dask_shm_plugin.table.layout import DIRECTORY_BYTES, PLACE_BYTES, directory_offset
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.table.tags import PLACES, TAGS, Tags

_WAYS = 2
_HEAD = struct.Struct("<16sQ")


class Directory:
    """The listings of this process, and read access to those of the other members.

    Parameters
    ----------
    marks
        The tags of all places, in the table.
    segment
        The segment that contains the places.
    roster
        Tells which members are alive.
    member
        This process.

    Notes
    -----
    Thread-safe. There must never be a moment when a place is marked and its listing differs from the answer that the
    member would give. So a place is marked after its listing is written, and unmarked before the listing or the answer
    changes. A listing that a reader has found was marked when the reader looked.
    """

    def __init__(self, marks: Tags, segment: Segment, roster: Roster, member: Member) -> None:
        # Kept apart from the guarded table: listings are withdrawn even if the table is damaged, because no reader may
        # use a listing that is out of date.
        self._marks: Tags | None = marks
        self._segment, self._roster, self._member = segment, roster, member
        self._lock = threading.RLock()  # reentrant: a finalizer may read a value, and so withdraw it, at any moment
        self._names: OrderedDict[int, bytes] = OrderedDict()  # name by place, the oldest listing first

    @step("list value")
    def add(self, name: bytes, data: bytes) -> bool:
        """List some bytes under a name.

        Returns
        -------
        bool
            False if the bytes are too long for a place or cannot be written, or the directory is closed.
        """
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
    def remove(self, name: bytes) -> None:
        """Withdraw the listing of a name; harmless if the name is not listed."""
        with self._lock:
            self._unmark_all(name)

    def is_empty(self, member: Member) -> bool:
        """Tell whether a member lists nothing; makes no system call."""
        return self._marks is None or not self._marks.has_any(member.slot)

    def find(self, member: Member, name: bytes) -> bytes | None:
        """Return the bytes that a member has listed under a name, or None."""
        return next(self.find_among([member], name), None)

    def find_among(self, members: Iterable[Member], name: bytes) -> Iterator[bytes]:
        """Yield the bytes that each of some members has listed under a name, if it has.

        Makes no system call unless one of the two places of the name has its tag.
        """
        marks = self._marks
        if marks is None:
            return
        places, tag = _places_of(name), _tag_of(name)
        for member in members:
            if not marks.has(member.slot, places, tag) or not self._roster.is_running(member):
                continue
            marked = (place for place in places if marks.tag(member.slot, place) == tag)
            found = (data for place in marked if (data := self._read(member, place, name)) is not None)
            yield from itertools.islice(found, 1)

    def close(self) -> None:
        """Withdraw all listings, give the pages of the directory back, and drop the reference to the table."""
        with self._lock:
            self._unmark_all()
            self._marks = None
        # If the kernel takes no pages back, the next member of this slot overwrites them.
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
            # If the segment was cut short, a store into the table would raise SIGBUS, and readers find no listing
            # there. If the descriptor was closed, the kernel has dropped the record locks, and readers skip this member
            # as not running.
            with contextlib.suppress(TableCorrupt):
                self._segment.insist_whole()
                self._marks.unset(self._member.slot, place)
        # Only after the mark is gone: if this is interrupted in between, the next call must find the name here.
        self._names.pop(place, None)

    def __repr__(self) -> str:
        return f"<Directory of member {self._member.slot}, {len(self._names)} listings>"


def _places_of(name: bytes) -> range:
    first = zlib.crc32(name) % (PLACES // _WAYS) * _WAYS
    return range(first, first + _WAYS)


def _tag_of(name: bytes) -> int:
    # Uses other bits of the checksum than the place does.
    return (zlib.crc32(name) >> 16) % (TAGS - 1) + 1


def _digest(member: Member, name: bytes, data: bytes) -> bytes:
    """Return a checksum over the member and its incarnation, the name, and the listed bytes."""
    head = struct.pack("<QQQ", *member, len(name))
    return hashlib.blake2b(head + name + data, digest_size=16).digest()
