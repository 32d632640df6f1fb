"""The name of a rendezvous may be removed while members live, when ``/dev/shm`` is cleared; the members restore it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from other_processes import LEAVE, LOOK, Process, join, publish, wait_until

from dask_shm_plugin.node import membership, rendezvous
from dask_shm_plugin.node.rendezvous import exists, name_for

pytestmark = pytest.mark.slow


def remove(cluster: str) -> None:
    """Remove the name as a logout with ``RemoveIPC`` does."""
    Path(f"/dev/shm{name_for(cluster)}").unlink()


def listed(cluster: str) -> set[int]:
    """Return the pids of the processes through which a newcomer could join."""
    meeting = rendezvous.enter(name_for(cluster), create=False)
    if meeting is None:
        return set()
    said = meeting.read()
    meeting.close()
    return {process.pid for process in said.listed} if said else set()


def test_members_restore_a_removed_rendezvous_and_others_join_through_it(
    cluster: str, member: Callable[..., Process]
) -> None:
    """The arena and its blocks do not depend on the name."""
    arena, second = join(cluster), member()
    with publish(arena, b"kept") as block:
        remove(cluster)
        wait_until(lambda: listed(cluster) == {os.getpid(), second.pid}, "both members are listed in a new rendezvous")
        third = member(LOOK)
        assert third("arena.arena_id") == arena.arena_id
        third("block = arena.attach_block(found)", found=block.descriptor)
        assert third("bytes(block.view(0, 4))") == b"kept"
    for one in (second, third):
        one(LEAVE)
    membership.leave(cluster, "nanny", "tcp://here")
    assert not exists(name_for(cluster))


def test_a_rendezvous_that_was_emptied_before_is_restored(cluster: str, member: Callable[..., Process]) -> None:
    """Its old content is not needed, and no process keeps the new one locked."""
    arena, second = join(cluster), member()
    os.truncate(f"/dev/shm{name_for(cluster)}", 0)
    remove(cluster)
    wait_until(lambda: listed(cluster) == {os.getpid(), second.pid}, "both members are listed in a new rendezvous")
    assert member(LOOK)("arena.arena_id") == arena.arena_id


def test_a_rendezvous_is_restored_by_any_live_member(cluster: str, member: Callable[..., Process]) -> None:
    """The creator of the arena may be dead, and dead processes are not listed."""
    maker, second = member(), member()
    maker.kill()
    remove(cluster)
    wait_until(lambda: listed(cluster) == {second.pid}, "the live member has restored the rendezvous")
    assert join(cluster).arena_id == second("arena.arena_id")


def test_a_stopped_member_adds_itself_to_the_restored_rendezvous(cluster: str, member: Callable[..., Process]) -> None:
    """When it continues, it finds the new rendezvous and lists itself there."""
    arena, second = join(cluster), member()
    second.stop()
    remove(cluster)
    wait_until(lambda: os.getpid() in listed(cluster), "the rendezvous is restored")
    second.go_on()
    wait_until(lambda: listed(cluster) == {os.getpid(), second.pid}, "the stopped member is listed again")
    assert second("arena.arena_id") == arena.arena_id


def test_a_new_arena_under_the_removed_name_does_not_end_the_old_one(
    cluster: str, member: Callable[..., Process]
) -> None:
    """A newcomer may be quicker than the members; both arenas work, and after the new one the old one is found."""
    second = member()
    second.stop()
    remove(cluster)
    arena = join(cluster)
    second.go_on()
    publish(arena, b"new").close()
    second("membership._restore(cluster)")
    assert second("arena.arena_id") != arena.arena_id
    assert listed(cluster) == {os.getpid()}
    second("publish(arena, b'old').close()")
    membership.leave(cluster, "nanny", "tcp://here")
    wait_until(lambda: listed(cluster) == {second.pid}, "the first arena has its name back")


def test_a_forked_child_restores_nothing(cluster: str, member: Callable[..., Process]) -> None:
    """A child belongs to no arena, so the name stays removed once its parent is dead."""
    parent = member()
    child = parent.fork()
    parent.kill()
    remove(cluster)
    child("membership._restore(cluster)")
    assert not exists(name_for(cluster))
