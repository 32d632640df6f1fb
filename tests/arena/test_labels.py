"""The labels of a member: what an observer reads is what was written last, or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from arena_fixtures import MIB

from dask_shm_plugin.arena import labels
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.labels import NOTHING, Label
from dask_shm_plugin.table.layout import LABELS_BYTES, BlockId, labels_offset
from dask_shm_plugin.table.members import Member


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Create an arena for this process, with a name for its cluster."""
    arena = Arena.create(4 * MIB)
    arena.labels.cluster = "test"
    yield arena
    arena.close()


def read(arena: Arena) -> bytes:
    """Return the bytes of this process's labels."""
    return bytes(arena.segment.read(labels_offset(arena.member.slot), LABELS_BYTES))


def told(arena: Arena) -> list[Label]:
    """Write the labels and return those that an observer sees."""
    arena.labels.write()
    seen = labels.unpack(read(arena), arena.member)
    assert seen is not None
    return seen.labels


def test_the_labels_of_held_blocks_are_read_as_they_were_written(arena: Arena) -> None:
    """A label whose block this process does not hold any more is left out."""
    with arena.draft(100) as draft:
        block = draft.seal()
    mine = Label((block.descriptor.row,), "sum-1", "numpy.ndarray", "3 × 4 float64")
    gone = Label((BlockId(7, 7),), "sum-2", "numpy.ndarray", "5 int8")
    arena.labels.add(lambda: [mine, gone])
    assert told(arena) == [mine]
    block.close()
    arena.holdings.tidy()
    assert told(arena) == []


def test_a_source_that_was_removed_writes_no_labels(arena: Arena) -> None:
    """A worker that leaves takes its labels with it."""

    def source() -> list[Label]:
        return [Label((), "x", "int", "")]

    arena.labels.add(source)
    assert told(arena)
    arena.labels.remove(source)
    assert told(arena) == []


def test_labels_that_do_not_fit_are_left_out(arena: Arena) -> None:
    """The rest can be read, and long keys are cut off."""
    many = [Label((), os.urandom(80).hex(), "t" * 200, "") for _ in range(20_000)]
    arena.labels.add(lambda: many)
    seen = told(arena)
    assert 0 < len(seen) < len(many)
    assert seen[0] == Label((), many[0].key[:120], "t" * 120, "")


def test_labels_that_were_read_in_the_middle_of_a_write_are_not_used(arena: Arena) -> None:
    """The checksum tells; damage that passes the checksum raises nothing."""
    arena.labels.add(lambda: [Label((), "x", "int", "")])
    told(arena)
    data = bytearray(read(arena))
    data[20] ^= 1
    assert labels.unpack(bytes(data), arena.member) is None


def test_labels_of_an_earlier_process_in_the_slot_are_not_used(arena: Arena) -> None:
    """Each incarnation has labels of its own."""
    told(arena)
    assert labels.unpack(read(arena), Member(arena.member.slot, arena.member.incarnation + 1)) == NOTHING
