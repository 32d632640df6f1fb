"""A forked child that outlives its parent keeps the blocks that it may read, and no draft."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from other_processes import Process, publish, wait_until, wait_until_empty

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import ArenaUnavailable
from dask_shm_plugin.units import PAGE

MIB = 1024 * 1024


@pytest.fixture
def parent(joined: Callable[[], Process]) -> Process:
    """Start a member with a view of a block, and with most of the arena reserved as drafts."""
    one = joined()
    one("with publish(arena, b'parents') as block: view = block.view(0, 7)")
    one("drafts = [arena.draft(100 << 10) for _ in range(9)]")
    return one


def test_the_drafts_of_a_dead_member_are_freed_while_its_child_lives(arena: Arena, parent: Process) -> None:
    """The housekeeping thread reclaims them; the blocks that the child may read stay until it has ended."""
    child, member = parent.fork(), parent("arena.member")
    parent.kill()
    wait_until(lambda: arena.stats().used == PAGE, "the drafts of the dead member are free")
    arena.validate()
    assert arena.roster.is_live(member)
    publish(arena, b"\xff" * (MIB - PAGE)).close()
    assert child("bytes(view)") == b"parents"
    child.kill()
    wait_until(lambda: not arena.roster.is_live(member), "the dead process is no member any more")
    wait_until_empty(arena)


def test_a_new_draft_reclaims_the_drafts_of_a_dead_member_at_once(arena: Arena, parent: Process) -> None:
    """The new draft does not wait for the housekeeping thread."""
    child = parent.fork()
    parent.kill()
    with arena.draft(MIB - PAGE):
        pass
    assert child("bytes(view)") == b"parents"


def test_space_that_a_dead_member_was_trimming_is_freed_while_its_child_lives(
    arena: Arena, joined: Callable[[], Process]
) -> None:
    """Space whose pages are given back is reserved as a draft."""
    parent = joined()
    parent("hold = arena.allocator.take_if_free(Extent(0, 1 << 20))")
    parent.fork()
    parent.kill()
    with arena.draft(MIB):
        pass


def test_the_drafts_of_a_live_member_stay(arena: Arena, parent: Process) -> None:
    """They stay even if the member is stopped and a forked child of it has died."""
    child = parent.fork()
    child.kill()
    parent.stop()
    assert not arena.roster.reclaim_dead()
    parent.go_on()
    parent("drafts[0].write(0, memoryview(b'x' * 4096)); kept = drafts[0].seal()")
    assert parent("bytes(kept.view(0, 1))") == b"x"


def test_a_child_cannot_write_the_drafts_of_its_parent(arena: Arena, parent: Process) -> None:
    """The space may belong to another member's block by now."""
    child = parent.fork()
    parent.kill()
    with publish(arena, b"\x01" * (MIB - PAGE)) as block:
        with pytest.raises(ArenaUnavailable, match="forked"):
            child("drafts[0].write(0, memoryview(b'x' * 4096))")
        assert set(bytes(block.view(0, MIB - PAGE))) == {1}
