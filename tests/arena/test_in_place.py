"""A draft may be written in place, and a block may be read without a mapping of its own."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from other_processes import Process, wait_until_empty

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import MappingRefused, MemoryExhausted
from dask_shm_plugin.units import PAGE


def test_what_is_written_into_an_open_draft_is_in_the_block(arena: Arena) -> None:
    """The draft has all its pages when it is opened, and offers as many bytes as were asked for."""
    data = os.urandom(3 * PAGE + 5)
    with arena.draft(len(data)) as draft:
        room = draft.open()
        assert len(room) == len(data)
        assert arena.segment.missing(draft._home.pages._blocks_from + draft._extent.offset, 4 * PAGE) == 0
        room[:] = data
        del room
        block = draft.seal()
    assert bytes(block.view(0, len(data))) == data
    assert bytes(block.borrow()) == data


def test_a_borrowed_block_cannot_be_written_and_is_held_as_long_as_its_bytes(arena: Arena) -> None:
    """Every slice holds the block, too; the last one gives it back."""
    with arena.draft(2 * PAGE) as draft:
        draft.open()[:] = b"x" * 2 * PAGE
        block = draft.seal()
    view = block.borrow()
    assert view.readonly
    with pytest.raises(ValueError, match="closed"):
        block.borrow()
    part = view[PAGE:]
    del view, block
    arena.holdings.tidy()
    assert arena.stats().used == 2 * PAGE
    assert part == b"x" * PAGE
    del part
    wait_until_empty(arena)


def test_another_member_borrows_the_same_bytes(arena: Arena, joined: Callable[[], Process]) -> None:
    """The bytes are not copied, and go when neither process needs them."""
    other = joined()
    with arena.draft(PAGE + 1) as draft:
        draft.open()[:] = b"y" * (PAGE + 1)
        block = draft.seal()
    other("held = arena.attach_block(descriptor).borrow()", descriptor=block.descriptor)
    block.close()
    arena.holdings.tidy()
    assert other("bytes(held)") == b"y" * (PAGE + 1)
    other("held = None")
    wait_until_empty(arena)


def test_an_open_draft_that_is_given_up_leaves_nothing(arena: Arena) -> None:
    """Leaving the draft without sealing it gives the space back."""
    with arena.draft(PAGE) as draft:
        draft.open()[:1] = b"z"
    wait_until_empty(arena)
    with pytest.raises(ValueError, match="given up"):
        draft.open()


def test_a_forked_child_neither_opens_nor_borrows(arena: Arena, process: Callable[[], Process]) -> None:
    """A child does not inherit the mapping of the whole segment: access would end it."""
    parent = process()
    parent("arena = Arena.create(1 << 20, warm=1 << 20); draft = arena.draft(8); draft.open()[:] = b'12345678'")
    child = parent.fork()
    with pytest.raises(MappingRefused):
        child("draft.open()")
    assert parent("bytes(draft.seal().borrow())") == b"12345678"


def test_a_draft_is_not_opened_if_there_is_no_memory_for_its_pages(in_small_shm: Process) -> None:
    """A store to a missing page would end the process."""
    in_small_shm("""
        arena = Arena.create(8 << 20)
        draft = arena.draft(8 << 20)
        with open("/dev/shm/of somebody else", "wb") as file:
            file.write(bytes(44 << 20))
        """)
    with pytest.raises(MemoryExhausted):
        in_small_shm("draft.open() and None")
    in_small_shm("os.unlink('/dev/shm/of somebody else')")
    in_small_shm("draft.open()[:] = bytes(8 << 20)")
    assert in_small_shm("sum(draft.seal().borrow()[::4096])") == 0
