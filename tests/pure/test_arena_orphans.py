"""A forked child outlives its parent: it keeps what it looks at, and nothing that nobody needs any more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from other_processes import Process, publish, wait_until, wait_until_empty

from dask_shm_plugin.arena import Arena
from dask_shm_plugin.exceptions import ArenaUnavailable
from dask_shm_plugin.segment import PAGE

MIB = 1024 * 1024


@pytest.fixture
def parent(joined: Callable[[], Process]) -> Process:
    """Start a member with a view of a block, and with most of the arena as drafts."""
    one = joined()
    one("with publish(arena, b'parents') as block: view = block.view(0, 7)")
    one("drafts = [arena.draft(100 << 10) for _ in range(9)]")
    return one


def test_drafts_of_the_dead_are_free_though_a_child_lives(arena: Arena, parent: Process) -> None:
    """Unasked; what the child looks at stays until it has ended."""
    child, member = parent.fork(), parent("arena.member")
    parent.kill()
    wait_until(lambda: arena.stats().used == PAGE, "the drafts are free")
    arena.validate()
    assert arena.roster.is_live(member)
    publish(arena, b"\xff" * (MIB - PAGE)).close()
    assert child("bytes(view)") == b"parents"
    child.kill()
    wait_until(lambda: not arena.roster.is_live(member), "the dead one is no member")
    wait_until_empty(arena)


def test_a_draft_finds_the_space_of_a_dead_ones_drafts(arena: Arena, parent: Process) -> None:
    """At once, not when the tidying thread comes by."""
    child = parent.fork()
    parent.kill()
    with arena.draft(MIB - PAGE):
        pass
    assert child("bytes(view)") == b"parents"


def test_pages_that_a_dead_one_was_giving_back_are_free_though_a_child_lives(
    arena: Arena, joined: Callable[[], Process]
) -> None:
    """They are a draft, too."""
    parent = joined()
    parent("hold = arena.take_if_free(table.Extent(0, 1 << 20))")
    parent.fork()
    parent.kill()
    with arena.draft(MIB):
        pass


def test_drafts_of_the_living_stay(arena: Arena, parent: Process) -> None:
    """Also when it stands still, and when a forked child of it has died."""
    child = parent.fork()
    child.kill()
    parent.stop()
    assert not arena.roster.reclaim_dead()
    parent.go_on()
    parent("drafts[0].write(0, memoryview(b'x' * 4096)); kept = drafts[0].seal()")
    assert parent("bytes(kept.view(0, 1))") == b"x"


def test_a_child_cannot_write_its_parents_drafts(arena: Arena, parent: Process) -> None:
    """They may be blocks by now, even of somebody else."""
    child = parent.fork()
    parent.kill()
    with publish(arena, b"\x01" * (MIB - PAGE)) as block:
        with pytest.raises(ArenaUnavailable, match="forked"):
            child("drafts[0].write(0, memoryview(b'x' * 4096))")
        assert set(bytes(block.view(0, MIB - PAGE))) == {1}
