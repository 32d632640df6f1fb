"""Arenas of one user on a node know of each other, so that no memory is planned with twice."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
from other_processes import Process, join, wait_until

from dask_shm_plugin import membership, rendezvous
from dask_shm_plugin.exceptions import ArenaBusy
from dask_shm_plugin.layout import TABLE_BYTES
from dask_shm_plugin.segment import round_up


def assert_nobody_goes_on_planning() -> None:
    """Others on this machine may plan at any time, but none of them for long."""
    fd = os.open("/dev/shm", os.O_RDONLY)
    try:
        wait_until(lambda: rendezvous._flock(fd), "nobody plans")
    finally:
        os.close(fd)


def test_an_arena_is_found_with_a_process_and_its_size(cluster: str) -> None:
    """Whoever plans another one is told how much this one may take."""
    arena = join(cluster)
    (found,) = rendezvous.arenas()
    assert found == (os.getpid(), round_up(TABLE_BYTES) + arena.stats().capacity)
    membership.leave(cluster, "nanny", "tcp://here")
    assert rendezvous.arenas() == []


def test_an_arena_of_several_processes_counts_once(cluster: str, member: Callable[[], Process]) -> None:
    """It does not matter through which of them it is found."""
    join(cluster)
    member()
    assert len(rendezvous.arenas()) == 1


def test_an_arena_whose_processes_are_dead_does_not_count(member: Callable[[], Process]) -> None:
    """What crashed has left a name and no memory."""
    other = member()
    assert len(rendezvous.arenas()) == 1
    other.kill()
    assert rendezvous.arenas() == []


def test_to_look_for_arenas_drops_no_lock(cluster: str, member: Callable[[], Process]) -> None:
    """A process that opened and closed its own arena once more would lose the lock of the table."""
    arena = join(cluster)
    other = member()

    def look() -> None:
        assert len(rendezvous.arenas()) == 1
        with pytest.raises(ArenaBusy):
            other("arena.validate()")

    arena._mutex.run(look)
    other("arena.validate()")


def test_of_two_that_plan_at_the_same_time_the_second_knows_of_the_first(
    cluster: str, process: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the one makes counts for the other, who waits for it."""
    first, waits, seen = process(), threading.Event(), []
    first("planning = rendezvous.planning(); planning.__enter__()")
    lock = rendezvous._flock

    def try_lock(fd: int) -> bool:
        is_mine = lock(fd)
        if not is_mine:
            waits.set()
        return is_mine

    def capacity() -> int:
        seen.extend(rendezvous.arenas())
        return 1 << 20

    monkeypatch.setattr(rendezvous, "_flock", try_lock)
    monkeypatch.setattr(rendezvous, "_PATIENCE_TO_PLAN", 30)
    thread = threading.Thread(
        target=membership.join, args=(cluster, "nanny", "tcp://here"), kwargs={"capacity": capacity}
    )
    thread.start()
    assert waits.wait(10)
    first("import contextlib; rendezvous.planning = contextlib.nullcontext")
    first("arena = membership.join(cluster, 'nanny', 'there', capacity=lambda: 2 << 20)", cluster=f"{cluster}-2")
    first("planning.__exit__(None, None, None)")
    thread.join()
    assert [arena.size for arena in seen] == [round_up(TABLE_BYTES) + (2 << 20)]


def test_who_plans_for_ever_keeps_nobody_from_it(cluster: str, process: Callable[[], Process]) -> None:
    """The directory is everybody's to lock."""
    process()("planning = rendezvous.planning(); planning.__enter__()")
    assert join(cluster).stats().capacity == 1 << 20


def test_a_child_that_was_forked_meanwhile_does_not_go_on_planning(process: Callable[[], Process]) -> None:
    """It has the same open file as its parent, and so the same lock."""
    other = process()
    other("planning = rendezvous.planning(); planning.__enter__()")
    other.fork()
    other("planning.__exit__(None, None, None)")
    assert_nobody_goes_on_planning()


def test_who_is_killed_while_it_plans_keeps_nobody_waiting(process: Callable[[], Process]) -> None:
    """Not even if a child of it lives on, which was forked at that moment."""
    other = process()
    other("planning = rendezvous.planning(); planning.__enter__()")
    child = other.fork()
    other.kill()
    assert_nobody_goes_on_planning()
    child.kill()
