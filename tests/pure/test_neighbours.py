"""Arenas of one user on a node know of each other, so that no memory is planned with twice."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from other_processes import Process, join

from dask_shm_plugin import membership, rendezvous
from dask_shm_plugin.exceptions import ArenaBusy
from dask_shm_plugin.segment import round_up
from dask_shm_plugin.table import TABLE_BYTES


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
    with arena._mutex:
        assert len(rendezvous.arenas()) == 1
        with pytest.raises(ArenaBusy):
            other("arena.validate()")
    other("arena.validate()")
