"""A snapshot of an arena, read from outside: no lock is taken, and the reader is no member.

The table is copied with ``pread``, which also works while a stopped process holds the lock. The copy is decoded by the
table's own code. A row that changes during the copy fails its tag and is left out.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dask_shm_plugin.arena import labels
from dask_shm_plugin.arena.labels import NOTHING, Label, Told
from dask_shm_plugin.exceptions import TableCorrupt
from dask_shm_plugin.linux import locks, sightings
from dask_shm_plugin.linux.sightings import Part, Sighting
from dask_shm_plugin.monitor.seen import ALIVE, DEAD, FORKED, BlockSeen, HolderSeen, MemberSeen, Snapshot
from dask_shm_plugin.table import layout, placement, state_word
from dask_shm_plugin.table.layout import BLOCKS_FROM, LABELS_BYTES, BlockId, Extent
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.table.table import Table

_TRIES = 3


class Row(NamedTuple):
    """A block or draft: where it lies, the bytes of its extent that are used, and its owner."""

    block: BlockId
    is_draft: bool
    extent: Extent
    size: int
    owner: Member


def take(fd: int, seen: Sighting, *, measure_large: bool = False) -> Snapshot:
    """Return a snapshot of an arena.

    Parameters
    ----------
    fd
        A descriptor of its segment; it is only read.
    seen
        The segment, and the processes that have it open.
    measure_large
        Whether to measure large pages, which takes time in proportion to the mapped memory.

    Raises
    ------
    TableCorrupt
        The segment has no table of this version.
    """
    return _Reader(fd, seen).snapshot(measure_large=measure_large)


def table_of(fd: int) -> Table:
    """Return a copy of the table in a segment: the common part, and the claims of the members.

    Raises
    ------
    TableCorrupt
        The segment has no table of this version.
    """
    copy = np.zeros(layout.TABLE_BYTES, np.uint8).data  # pages that are not read into take no memory
    _read_into(copy[: layout.SHARED_BYTES], fd, 0)
    table = Table(copy)
    for member in table.members.live():
        offset = layout.claims_offset(member.slot)
        _read_into(copy[offset : offset + 8 * table.blocks.in_use], fd, offset)
    return table


def _read_into(buffer: memoryview, fd: int, offset: int) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise TableCorrupt("the segment is shorter than a table")
        done += count


def rows_of(table: Table) -> Iterator[Row]:
    """Yield the drafts and blocks of a table whose tags are valid, apart from free parts that are being given back."""
    states = state_word.states(table.blocks.deciding_words())
    for index in np.flatnonzero(states != state_word.FREE).tolist():
        try:
            word, offset, length, size, *owner = table.blocks.row(index)
        except TableCorrupt:
            continue
        generation, state = state_word.unpack(word)
        if size:
            is_draft = state == state_word.DRAFT
            yield Row(BlockId(index, generation), is_draft, Extent(offset, length), size, Member(*owner))


def told_by(fd: int, member: Member) -> Told:
    """Return the texts of a member; none if it goes on writing them during several attempts to read."""
    for _ in range(_TRIES):
        told = labels.unpack(os.pread(fd, LABELS_BYTES, layout.labels_offset(member.slot)), member)
        if told is not None:
            return told
    return NOTHING


class _Reader:
    """Makes one snapshot."""

    def __init__(self, fd: int, seen: Sighting) -> None:
        self._fd, self._seen, self._now = fd, seen, time.monotonic()
        self._table = table_of(fd)
        self._pids = {member: self._table.members.pid(member) for member in self._table.members.live()}
        self._told = {member: told_by(fd, member) for member in self._pids}
        self._members = self._members_seen()
        self._claims: defaultdict[BlockId, list[Member]] = defaultdict(list)
        self._labels: defaultdict[BlockId, list[tuple[Member, Label]]] = defaultdict(list)
        for member, told in self._told.items():
            for row in self._table.held_by(member):
                self._claims[row].append(member)
            for label in told.labels:
                for row in label.blocks:
                    self._labels[row].append((member, label))
        self._views = {pid: sightings.mapped_by(pid, seen.file) for pid in {*seen.descriptors, *self._pids.values()}}

    def snapshot(self, *, measure_large: bool) -> Snapshot:
        large = [sightings.large_pages_of(pid, self._seen.file) for pid in self._pids.values() if measure_large]
        table, rows = self._table, list(rows_of(self._table))
        taken = np.array([row.extent for row in rows], np.uint64).reshape(-1, 2)
        used = int(taken[:, 1].sum())
        longest_gap = placement.gaps(taken, table.span)[:, 1].max(initial=0)
        return Snapshot(
            arena=table.arena_id.hex(),
            cluster=next((told.cluster for told in self._told.values() if told.cluster), ""),
            kind=self._seen.kind,
            capacity=table.capacity,
            used=used,
            resident=os.fstat(self._fd).st_blocks * 512,
            large=max(large, default=None),
            largest_fit=max(0, min(int(longest_gap), table.capacity - used)),
            age=self._age(table.created),
            members=list(self._members.values()),
            blocks=[self._block(row) for row in rows],
            counters={self._pids[member]: told.counters for member, told in self._told.items() if told.counters},
        )

    def _members_seen(self) -> dict[Member, MemberSeen]:
        roles = self._table.roles()
        return {
            member: MemberSeen(
                pid,
                [(role.kind, role.address) for role in roles if role.member == member],
                sightings.is_stopped(pid),
                _state(self._fd, member, is_own=pid == os.getpid()),
            )
            for member, pid in self._pids.items()
        }

    def _block(self, row: Row) -> BlockSeen:
        # Labels are up to a second old: that of a member that has released the block since is left out.
        found = [label for member, label in self._labels[row.block] if member in self._claims[row.block]]
        first = found[0] if found else Label((), "", "", "")
        return BlockSeen(
            block=f"{row.block.index}:{row.block.generation}",
            keys=sorted({label.key for label in found}),
            type=first.type,
            shape=first.shape,
            size=row.size,
            length=row.extent.length,
            state="draft" if row.is_draft else "sealed",
            owner=self._members[row.owner].name if row.owner in self._members else "a process that has left",
            age=self._age(self._table.blocks.reserved(row.block.index)),
            holders=self._writer(row) if row.is_draft else self._holders(row),
        )

    def _writer(self, row: Row) -> list[HolderSeen]:
        writer = self._members.get(row.owner)
        return [HolderSeen(writer.pid, writer.name, "it is being written")] if writer else []

    def _holders(self, row: Row) -> list[HolderSeen]:
        keys = {member: label.key for member, label in self._labels[row.block]}
        holders = [self._holder(row, member, keys.get(member)) for member in self._claims[row.block]]
        strangers = [pid for pid in self._views if pid not in self._pids.values() and self._has_view(pid, row.extent)]
        return holders + [HolderSeen(pid, f"pid {pid}", "a forked child has a view of it") for pid in strangers]

    def _holder(self, row: Row, member: Member, key: str | None) -> HolderSeen:
        seen = self._members[member]
        if seen.state == DEAD:
            reason = "the process is dead; another member reclaims it within a second or two"
        elif seen.state == FORKED:
            reason = "the process is dead, but a forked child of it lives and may have a view"
        elif key is not None:
            reason = f"worker holds key {key}"
        elif self._has_view(seen.pid, row.extent):
            reason = f"a view lives in pid {seen.pid}"
        else:
            reason = "a message is under way, or a forked child may have a view"
        return HolderSeen(seen.pid, seen.name, reason)

    def _has_view(self, pid: int, extent: Extent) -> bool:
        first, end = BLOCKS_FROM + extent.offset, BLOCKS_FROM + extent.offset + extent.length
        return any(_overlaps(part, first, end) for part in self._views.get(pid, []))

    def _age(self, since: float) -> float | None:
        return max(0.0, self._now - since) if since else None


def _overlaps(part: Part, first: int, end: int) -> bool:
    return part.offset < end and first < part.offset + part.length


def _state(fd: int, member: Member, *, is_own: bool) -> str:
    if is_own:  # the kernel does not report a lock to the process that holds it
        return ALIVE
    if not locks.is_held(fd, member.slot):
        return DEAD
    return FORKED if locks.is_orphaned(fd, member.slot) else ALIVE
