"""A rendezvous may be removed while its members live, by whoever clears ``/dev/shm``: they restore it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from other_processes import LEAVE, LOOK, Process, join, publish, wait_until

from dask_shm_plugin import membership, rendezvous
from dask_shm_plugin.rendezvous import exists, name_for

pytestmark = pytest.mark.slow


def remove(cluster: str) -> None:
    """Do what a logout with ``RemoveIPC`` does."""
    Path(f"/dev/shm{name_for(cluster)}").unlink()


def listed(cluster: str) -> set[int]:
    """Return the processes through which a newcomer could join."""
    meeting = rendezvous.enter(name_for(cluster), create=False)
    if meeting is None:
        return set()
    said = meeting.read()
    meeting.close()
    return {process.pid for process in said.listed} if said else set()


def test_its_members_restore_it_and_others_join_through_it(cluster: str, member: Callable[..., Process]) -> None:
    """The arena, and what lies in it, was never gone."""
    arena, second = join(cluster), member()
    with publish(arena, b"kept") as block:
        remove(cluster)
        wait_until(lambda: listed(cluster) == {os.getpid(), second.pid}, "both have restored it")
        third = member(LOOK)
        assert third("arena.arena_id") == arena.arena_id
        third("block = arena.attach_block(found)", found=block.descriptor)
        assert third("bytes(block.view(0, 4))") == b"kept"
    for one in (second, third):
        one(LEAVE)
    membership.leave(cluster, "nanny", "tcp://here")
    assert not exists(name_for(cluster))


def test_it_is_restored_though_it_was_emptied_before(cluster: str, member: Callable[..., Process]) -> None:
    """What it said is not needed; and nobody keeps the new one locked."""
    arena, second = join(cluster), member()
    os.truncate(f"/dev/shm{name_for(cluster)}", 0)
    remove(cluster)
    wait_until(lambda: listed(cluster) == {os.getpid(), second.pid}, "both have restored it")
    assert member(LOOK)("arena.arena_id") == arena.arena_id


def test_it_is_restored_by_whoever_is_left(cluster: str, member: Callable[..., Process]) -> None:
    """The one that made the arena may be dead, and those that are listed and dead help nobody."""
    maker, second = member(), member()
    maker.kill()
    remove(cluster)
    wait_until(lambda: listed(cluster) == {second.pid}, "the other has restored it")
    assert join(cluster).arena_id == second("arena.arena_id")


def test_a_stopped_member_comes_back_to_it(cluster: str, member: Callable[..., Process]) -> None:
    """It wakes up to a new rendezvous, and enters itself."""
    arena, second = join(cluster), member()
    second.stop()
    remove(cluster)
    wait_until(lambda: os.getpid() in listed(cluster), "it is restored")
    second.go_on()
    wait_until(lambda: listed(cluster) == {os.getpid(), second.pid}, "the second has come back")
    assert second("arena.arena_id") == arena.arena_id


def test_where_somebody_began_anew_both_arenas_live(cluster: str, member: Callable[..., Process]) -> None:
    """A newcomer that was quicker has another arena; nobody takes it away, and when it ends, the first is found again."""
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
    """It belongs to no arena; once its parent is dead, nothing brings the name back."""
    parent = member()
    child = parent.fork()
    parent.kill()
    remove(cluster)
    child("membership._restore(cluster)")
    assert not exists(name_for(cluster))
