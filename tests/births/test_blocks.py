"""In a block of the client, each large array is born: a chunk without pages stands by for the next one."""

from __future__ import annotations

import contextvars
import gc
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from births import KIB, MIB, births, drafts, figures, in_arena, in_thread, is_born
from other_processes import Process, wait_until

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.block import Descriptor
from dask_shm_plugin.births import switch
from dask_shm_plugin.births.nursery import Nursery
from dask_shm_plugin.linux import limits
from dask_shm_plugin.mapping.atlas import ATLAS


@pytest.fixture
def nursery(arena: Arena) -> Iterator[Nursery]:
    """Let arrays be born in blocks only."""
    with births(arena, has_worker=False) as one:
        yield one
        gc.collect()


def stands_by(nursery: Nursery) -> bool:
    return nursery._library.stands_by()


def test_the_first_array_of_a_length_is_born_and_takes_no_more_than_it_needs(nursery: Nursery, arena: Arena) -> None:
    """The rest of the chunk goes back to the arena, and the next one stands by."""
    with switch.block():
        first = np.full(3 * MIB, 7, np.uint8)
        wait_until(lambda: stands_by(nursery), "the next one stands by")
        second = np.full(5 * MIB + 1, 8, np.uint8)
    assert is_born(first)
    assert is_born(second)
    assert not is_born(np.full(3 * MIB, 7, np.uint8)), "the block is over"
    wait_until(lambda: not stands_by(nursery), "nothing stands by after the block")
    wait_until(lambda: drafts(arena) == 3 * MIB + 5 * MIB + 256 * KIB, "the rest is given back")
    assert arena.budget.drafts() == 3 * MIB + 5 * MIB + 256 * KIB
    assert (first == 7).all()
    assert (second == 8).all()
    del first, second
    wait_until(lambda: arena.stats().used == 0, "all is given back")


def test_it_is_sealed_like_every_array(nursery: Nursery, arena: Arena) -> None:
    """At its own length, also before the nursery's thread has given back the rest; later writes stay private."""
    with switch.block(), nursery._sealing:
        array = np.full(3 * MIB, 7, np.uint8)
        assert switch.seal(array.ctypes.data, array.nbytes)
    place = ATLAS.locate(array.ctypes.data, array.nbytes)
    assert place is not None
    array[:] = 9
    with arena.attach_block(Descriptor(place.arena_id, place.row)) as block:
        assert bytes(block.view(0, 4)) == b"\7\7\7\7"
    assert arena.stats().used == 3 * MIB


def test_small_arrays_and_zeros_leave_it_alone(nursery: Nursery) -> None:
    """Below 1 MiB nothing is shared, and the pages of zeros may never be touched."""
    with switch.block():
        small, zeros = np.ones(900 * KIB, np.uint8), np.zeros(8 * MIB, np.uint8)
        assert stands_by(nursery)
    assert not is_born(small)
    assert not is_born(zeros)


def test_blocks_end_with_an_exception_and_may_be_nested(nursery: Nursery) -> None:
    """The outer block goes on after the inner one."""
    with switch.block():
        with pytest.raises(ZeroDivisionError), switch.block():
            1 / 0  # noqa: B018 - raises
        wait_until(lambda: stands_by(nursery), "the outer block goes on")
        assert is_born(np.ones(MIB, np.uint8))
    assert not is_born(np.ones(MIB, np.uint8))


def test_only_the_thread_of_the_block_allocates_there(nursery: Nursery) -> None:
    """And another thread may free what it has made."""
    with switch.block():
        assert not in_thread(lambda: contextvars.Context().run(lambda: is_born(np.ones(MIB, np.uint8))))
        box = [np.ones(MIB, np.uint8)]
    assert is_born(box[0])
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    assert figures().used == 0


@pytest.mark.parametrize("short", ["of memory", "of room"])
def test_without_room_arrays_lie_in_ordinary_memory(
    nursery: Nursery, arena: Arena, monkeypatch: pytest.MonkeyPatch, short: str
) -> None:
    """Nothing stands by then, and the block does not wait for it."""
    if short == "of memory":
        monkeypatch.setattr(limits, "head_room", lambda: 0)
        taken = None
    else:
        taken = arena.draft(arena.capacity * 3 // 4)
    with switch.block():
        array = np.full(3 * MIB, 7, np.uint8)
        assert not stands_by(nursery)
    assert not is_born(array)
    assert (array == 7).all()
    del taken


def test_an_array_that_is_too_long_lies_in_ordinary_memory(nursery: Nursery, arena: Arena) -> None:
    """The chunk on standby stays for the next one."""
    with switch.block():
        assert stands_by(nursery)
        array = np.full(arena.capacity, 7, np.uint8)
        assert stands_by(nursery)
    assert not is_born(array)


def test_where_there_is_a_worker_nothing_stands_by(arena: Arena) -> None:
    """Its tasks' arrays are born within the limits of the worker."""
    with births(arena) as nursery:
        with switch.block():
            assert not stands_by(nursery)
            for _ in range(3):
                wait_until(lambda: is_born(np.ones(MIB, np.uint8)), "arrays of this length are born")
        assert is_born(in_arena(np.ones, MIB, np.uint8))


def test_a_worker_that_joins_later_sets_the_limits(nursery: Nursery, arena: Arena) -> None:
    """The client and the worker of one process share the nursery."""
    with switch.block():
        assert stands_by(nursery)
        assert switch.switch_on(arena, 64 * MIB, 3600) is None
        nursery._library.functions.born_wake()
        wait_until(lambda: not stands_by(nursery), "nothing stands by any more")
    switch.switch_off(arena)


JOIN = "arena = membership.join(cluster, 'client', 'Client-1', capacity=lambda: 64 << 20, warm=2**20)"
BLOCK = """
from births import *
assert switch.switch_on(arena, None, 3600, has_worker=False) is None
block = switch.block()
block.__enter__()
one = np.full(3 << 20, 1, np.uint8)
"""


def test_parent_and_child_do_not_see_each_others_writes(cluster: str, member: Callable[[str], Process]) -> None:
    """A fork within a block ends what stands by, and seals the arrays."""
    parent = member(JOIN)
    parent(BLOCK)
    assert parent("is_born(one)")
    child = parent.fork()
    child("one[:] = 11; new = np.ones(5 << 20, np.uint8)")
    parent("one[:5] = 21; two = np.full(5 << 20, 2, np.uint8)")
    assert child("(one == 11).all() and (new == 1).all()")
    assert parent("one[:6].tolist(), int(two.sum())") == ([21] * 5 + [1], 10 << 20)


def test_a_death_gives_back_what_stands_by(cluster: str, member: Callable[[str], Process]) -> None:
    """And the arrays that were born."""
    other, victim = member(JOIN), member(JOIN)
    victim(BLOCK)
    victim.kill()
    wait_until(lambda: other("arena.roster.reclaim_dead(), arena.stats().used")[1] == 0, "all is free")
    other("arena.validate()")
