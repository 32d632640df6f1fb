"""The labels of a member: texts for people that say which values its blocks hold.

Each member writes its labels into its own part of the segment, for the command line and other observers. No decision
depends on them. They are written at most once a second by the housekeeping thread, with system calls, and a checksum
tells a reader that it has read them in the middle of a write.
"""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.linux.segment import Segment
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.table.layout import LABELS_BYTES, BlockId, labels_offset
from dask_shm_plugin.table.members import Member

_HEAD = struct.Struct("<QII")
_MAX_TEXT = 120
"""Maximum number of characters of a key, type or shape; the rest of a longer one is cut off."""


class Label(NamedTuple):
    """A value that a member keeps under a key: its blocks, and the texts that describe it."""

    blocks: tuple[BlockId, ...]
    key: str
    type: str
    shape: str


class Told(NamedTuple):
    """The texts of one member: its cluster, the counters of its process, and its labels."""

    cluster: str
    counters: dict[str, Any]
    labels: list[Label]


NOTHING = Told("", {}, [])
"""The texts of a member that has written none."""
Source = Callable[[], Iterable[Label]]


class Labels:
    """The labels of this process.

    Parameters
    ----------
    segment
        The segment that contains the labels.
    member
        This process.
    is_held
        Tells whether this process refers to a block; labels of other blocks are left out.

    Attributes
    ----------
    cluster
        The name of the cluster, for people.

    Notes
    -----
    Thread-safe: :meth:`write` is called by the housekeeping thread only.
    """

    def __init__(self, segment: Segment, member: Member, is_held: Callable[[BlockId], bool]) -> None:
        self._segment, self._member, self._is_held = segment, member, is_held
        self._sources: tuple[Source, ...] = ()
        self._written = NOTHING
        self.cluster = ""

    def add(self, source: Source) -> None:
        """Write the labels that a function returns, from now on; any thread may call the function."""
        self._sources = (*self._sources, source)

    def remove(self, source: Source) -> None:
        """Undo :meth:`add`."""
        self._sources = tuple(one for one in self._sources if one != source)

    def write(self) -> None:
        """Write the labels, if they have changed; those that do not fit, and all if there is no memory, are left out.

        A process writes nothing before it has a cluster: a member without labels takes no page for them.
        """
        if not self.cluster:
            return
        labels = [label for source in self._sources for label in source() if all(map(self._is_held, label.blocks))]
        told = Told(self.cluster, COUNTERS.snapshot(), labels)
        if told != self._written:
            packed = _packed(told)
            head = _HEAD.pack(self._member.incarnation, len(packed), zlib.crc32(packed))
            with contextlib.suppress(SharedMemoryError, OSError):
                self._segment.write(labels_offset(self._member.slot), memoryview(head + packed))
                self._written = told

    def __repr__(self) -> str:
        return f"<Labels of member {self._member.slot}, {len(self._written.labels)} labels>"


def _packed(told: Told) -> bytes:
    """Return the texts as compressed JSON; the last labels are left out if it would be too long."""
    while True:
        packed = zlib.compress(json.dumps(told._replace(labels=[_cut(label) for label in told.labels])).encode(), 1)
        if len(packed) <= LABELS_BYTES - _HEAD.size:
            return packed
        told = told._replace(labels=told.labels[: len(told.labels) // 2])


def _cut(label: Label) -> Label:
    return Label(label.blocks, *(text[:_MAX_TEXT] for text in label[1:]))


def unpack(data: bytes, member: Member) -> Told | None:
    """Return the texts in the part of the segment that belongs to a member.

    Returns
    -------
    Told or None
        ``NOTHING`` if the member has written nothing; None if the bytes were read in the middle of a write.
    """
    if len(data) < _HEAD.size:
        return NOTHING
    incarnation, length, checksum = _HEAD.unpack_from(data)
    packed = data[_HEAD.size : _HEAD.size + length]
    if incarnation != member.incarnation:
        return NOTHING
    if zlib.crc32(packed) != checksum:
        return None
    try:
        cluster, counters, labels = json.loads(zlib.decompress(packed))
        return Told(cluster, counters, [Label(tuple(BlockId(*row) for row in rows), *texts) for rows, *texts in labels])
    except (ValueError, TypeError, zlib.error):
        return NOTHING
