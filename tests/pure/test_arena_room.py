"""No room is lost between blocks: what is free can be had in one piece, and pages exist for the capacity at most."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from other_processes import publish, wait_until_empty

from dask_shm_plugin.arena import Arena
from dask_shm_plugin.block import Block
from dask_shm_plugin.exceptions import ArenaFull
from dask_shm_plugin.layout import Extent

KIB = 1024
MIB = 1024 * KIB
CAPACITY = 16 * MIB


@pytest.fixture
def roomy() -> Iterator[Arena]:
    """Make an arena of 16 MiB that keeps all freed memory warm; its table is checked at the end."""
    arena = Arena.create(CAPACITY, warm=CAPACITY)
    yield arena
    arena.validate()
    arena.close()


@pytest.fixture
def nothing(roomy: Arena) -> int:
    """Return the bytes that the arena takes without blocks."""
    return roomy.stats().resident


def full(arena: Arena) -> list[Block]:
    """Fill an arena with blocks of 256 KiB."""
    return [publish(arena, bytes([number]) * 256 * KIB) for number in range(64)]


def test_what_is_free_can_be_had_in_one_piece(roomy: Arena) -> None:
    """Every other block is released; a block of half the capacity takes their room, and no byte more fits."""
    blocks = full(roomy)
    for block in blocks[::2]:
        block.close()
    with publish(roomy, b"large" * (CAPACITY // 10)) as large:
        assert large.view(0, 5) == b"large"
        with pytest.raises(ArenaFull):
            roomy.draft(256 * KIB)
        assert all(block.view(0, 1) == bytes([2 * n + 1]) for n, block in enumerate(blocks[1::2]))
        for block in blocks[1::2]:
            block.close()
    wait_until_empty(roomy)


def test_there_are_never_pages_for_more_than_the_capacity(roomy: Arena, nothing: int) -> None:
    """Warm pages between blocks go when as many are made elsewhere, before these are written."""
    blocks = full(roomy)
    assert roomy.stats().resident == nothing + CAPACITY
    for block in blocks[::2]:
        block.close()
    with roomy.draft(CAPACITY // 2) as draft:
        for part in range(8):
            draft.write(part * MIB, memoryview(bytes([part]) * MIB))
            assert roomy.stats().resident <= nothing + CAPACITY
        with draft.seal() as large:
            assert [bytes(large.view(part * MIB, 1)) for part in range(8)] == [bytes([n]) for n in range(8)]
    for block in blocks[1::2]:
        block.close()


def test_the_tidying_thread_keeps_within_the_capacity(roomy: Arena, nothing: int) -> None:
    """Two who write at the same time may both have found room; what stays warm makes up for it."""
    blocks = full(roomy)
    for block in blocks[::2]:
        block.close()
    with roomy.draft(CAPACITY // 2) as draft:
        draft.write(0, memoryview(bytes(MIB)))
        # As a neighbour that looked before the line above was executed.
        roomy.segment.reserve(roomy.segment.size - 4 * MIB, 4 * MIB)
        roomy.trimmer.trim()
        assert roomy.stats().resident <= nothing + CAPACITY
    for block in blocks[1::2]:
        block.close()


def test_what_is_given_back_does_not_count_as_held(roomy: Arena) -> None:
    """In a full arena pages of gaps go, however many: a process may die in the middle of it."""
    blocks = full(roomy)
    holds = [roomy.take_if_free(Extent(CAPACITY * n, CAPACITY)) for n in (1, 2)]
    assert None not in holds
    roomy.validate()
    holds.clear()
    roomy.abandon()
    for block in blocks:
        block.close()
    wait_until_empty(roomy)
