"""No capacity is lost to gaps between blocks, and there are never more pages than the capacity."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from other_processes import publish, wait_until_empty

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.block import Block
from dask_shm_plugin.exceptions import ArenaFull
from dask_shm_plugin.table.layout import Extent

KIB = 1024
MIB = 1024 * KIB
CAPACITY = 16 * MIB


@pytest.fixture
def roomy() -> Iterator[Arena]:
    """Create an arena of 16 MiB that keeps all freed memory warm; its table is validated at the end."""
    arena = Arena.create(CAPACITY, warm=CAPACITY)
    yield arena
    arena.validate()
    arena.close()


@pytest.fixture
def empty_bytes(roomy: Arena) -> int:
    """Return the resident bytes of the arena without blocks."""
    return roomy.stats().resident


def full(arena: Arena) -> list[Block]:
    """Fill an arena with blocks of 256 KiB."""
    return [publish(arena, bytes([number]) * 256 * KIB) for number in range(64)]


def test_all_free_capacity_is_available_as_one_block(roomy: Arena) -> None:
    """Every other block is released; a block of half the capacity fits then, and no further byte does."""
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


def test_there_are_never_pages_for_more_than_the_capacity(roomy: Arena, empty_bytes: int) -> None:
    """Warm pages between blocks are given back before as many new ones are made elsewhere."""
    blocks = full(roomy)
    assert roomy.stats().resident == empty_bytes + CAPACITY
    for block in blocks[::2]:
        block.close()
    with roomy.draft(CAPACITY // 2) as draft:
        for part in range(8):
            draft.write(part * MIB, memoryview(bytes([part]) * MIB))
            assert roomy.stats().resident <= empty_bytes + CAPACITY
        with draft.seal() as large:
            assert [bytes(large.view(part * MIB, 1)) for part in range(8)] == [bytes([n]) for n in range(8)]
    for block in blocks[1::2]:
        block.close()


def test_trimming_brings_the_pages_back_within_the_capacity(roomy: Arena, empty_bytes: int) -> None:
    """Two processes that write at the same time may both have found room, so trimming must make up for it."""
    blocks = full(roomy)
    for block in blocks[::2]:
        block.close()
    with roomy.draft(CAPACITY // 2) as draft:
        draft.write(0, memoryview(bytes(MIB)))
        # Stands for another member that looked for room before the previous line was executed.
        roomy.segment.reserve(roomy.segment.size - 4 * MIB, 4 * MIB)
        roomy.trimmer.trim()
        assert roomy.stats().resident <= empty_bytes + CAPACITY
    for block in blocks[1::2]:
        block.close()


def test_space_whose_pages_are_given_back_does_not_count_as_used(roomy: Arena) -> None:
    """Drafts for trimming may exceed the capacity of a full arena, and a death must still leave a valid table."""
    blocks = full(roomy)
    holds = [roomy.allocator.take_if_free(Extent(CAPACITY * n, CAPACITY)) for n in (1, 2)]
    assert None not in holds
    roomy.validate()
    holds.clear()
    roomy.allocator.abandon()
    for block in blocks:
        block.close()
    wait_until_empty(roomy)
