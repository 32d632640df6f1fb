"""A forked child's views hold what they held, whatever its parent does; and then nothing is left of it."""

from __future__ import annotations

import gc
import os

import numpy as np
import pytest
from other_processes import JOIN, wait_until

from dask_shm_plugin import membership
from dask_shm_plugin.forks import Pins
from dask_shm_plugin.references import References

SIZE = 1 << 20


@pytest.fixture
def arena(prefix):
    """An arena with room for one block more than is in use."""
    arena = membership.join("test", "worker", "here", capacity=lambda: 2 * SIZE)
    yield arena
    gc.collect()
    arena.holdings.tidy()
    membership.leave("test", "worker", "here")


def share(arena, value):
    """Publish a block full of one byte and return a view of it."""
    with arena.draft(SIZE) as draft:
        draft.write(0, memoryview(bytes([value]) * SIZE))
        with draft.seal() as block:
            return np.frombuffer(block.view(0, SIZE), dtype=np.uint8)


def fork(look, *at):
    """Fork a child that waits for a byte, looks, and ends; return how to let it look and what it saw."""
    ready, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go)
        os.read(ready, 1)
        os._exit(int(look(*at)))
    os.close(ready)

    def saw():
        os.close(go)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    return saw


def test_a_block_that_the_parent_releases_stays_for_its_child(arena):
    """The place is not used again while the child may look at it."""
    view = share(arena, 7)
    saw = fork(lambda it: it[-1], view)
    del view
    gc.collect()
    arena.holdings.tidy()
    others = [share(arena, 8)]
    assert arena.stats().used == 2 * SIZE
    assert saw() == 7
    wait_until(lambda: arena.stats().used == SIZE, "the child's references stay")
    others.append(share(arena, 9))
    assert [other[0] for other in others] == [8, 9]


def test_a_child_that_ends_without_a_word_leaves_nothing(arena):
    """Also one that is killed."""
    view = share(arena, 7)
    saw = fork(lambda: os.kill(os.getpid(), 9))
    del view
    gc.collect()
    assert saw() == -9
    wait_until(lambda: arena.stats().used == 0, "the child's references stay")


@pytest.mark.parametrize("of_child", [False, True])
def test_a_child_that_closes_all_its_descriptors_keeps_its_views(arena, of_child):
    """Daemons do so, often after another fork."""
    view = share(arena, 7)
    ready, go = os.pipe()

    def look(at):
        os.closerange(3, ready)
        os.closerange(ready + 1, os.sysconf("SC_OPEN_MAX"))
        if of_child and (pid := os.fork()):
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.read(ready, 1)
        os._exit(at[-1])

    pid = os.fork()
    if pid == 0:
        os._exit(look(view))
    os.close(ready)
    del view
    gc.collect()
    for _ in range(3):
        arena.holdings.tidy()
        arena.holdings.unpin()
    others = [share(arena, 8)]
    assert arena.stats().used == 2 * SIZE
    os.close(go)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    wait_until(lambda: arena.stats().used == SIZE, "the child's references stay")
    assert others[0][0] == 8


def test_a_child_may_join_as_itself(arena):
    """It is another process, whatever it has inherited."""
    view = share(arena, 7)

    def join():
        own = membership.join("test", "worker", "child")
        return own is not arena and own.stats().members == 2 and view[0] == 7

    assert fork(join)() == 1
    wait_until(lambda: arena.roster.reclaim_dead() or arena.stats().members == 1, "the child is still a member")


def test_a_fork_without_a_descriptor_left_keeps_what_the_child_looks_at(cluster, process):
    """Nothing of an earlier fork is closed or given back again, and the child's view holds until the child has ended."""
    other = process()  # without children of its own, which would be waited for as well
    other(JOIN, cluster=cluster)
    other("""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with publish(arena, bytes([7]) * 4096) as block:
            view = block.view(0, 4096)
        if (first := os.fork()) == 0:
            os._exit(0)
        os.waitpid(first, 0)
        (ready, go), limits = os.pipe(), resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        if (pid := os.fork()) == 0:
            os.close(go)
            os.read(ready, 1)
            os._exit(view[-1])
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        taken = os.open(os.devnull, os.O_RDONLY)
        del view
        gc.collect()
        for _ in range(3):
            arena.holdings.tidy()
            arena.holdings.unpin()
        publish(arena, bytes([8]) * 4096).close()
        """)
    wait_until(lambda: other("arena.holdings.tidy(), arena.stats().used")[1] == 4096, "what the child looks at stays")
    other("os.close(go)")
    assert other("os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])") == 7
    wait_until(lambda: other("arena.stats().used") == 0, "it goes with the child")
    other("os.close(ready); os.close(taken)")  # nobody else has closed them


def test_a_process_that_stands_still_inside_the_table_keeps_no_fork_from_keeping_its_views(cluster, process):
    """What a fork keeps is noted in this process alone."""
    other, stopped = process(), process()
    other(JOIN, cluster=cluster)
    stopped(JOIN, cluster=cluster)
    other("with publish(arena, b'parents') as block: view = block.view(0, 7)")
    stopped("enter(arena._mutex)")
    child = other.fork()
    stopped("leave(arena._mutex)")
    other("del view, block; gc.collect()")
    for _ in range(3):
        other("arena.holdings.tidy(); arena.holdings.unpin(); publish(arena, b'x' * 4096).close()")
    assert child("bytes(view)") == b"parents"
    child.leave()
    wait_until(lambda: other("arena.stats().used") == 0, "it goes with the child")


def test_a_fork_that_comes_while_a_view_is_made_does_not_wait_for_itself(cluster, process):
    """A signal handler may fork at any moment, and so may a finalizer; the child keeps what is seen already."""
    other = process()
    other(JOIN, cluster=cluster)
    other("""
        from dask_shm_plugin.references import References
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        def interrupted(*entry, enter=References.enter):
            if (pid := os.fork()) == 0:
                os._exit(0)
            os.waitpid(pid, 0)
            return enter(*entry)
        References.enter = interrupted
        with publish(arena, b'mine') as block:
            view = block.view(0, 4)
        """)
    assert other("bytes(view)") == b"mine"
    other("del view; gc.collect()")
    wait_until(
        lambda: other("arena.holdings.unpin(), arena.holdings.tidy(), arena.stats().used")[2] == 0, "nothing is left"
    )


def test_what_is_kept_for_a_child_while_another_ones_is_given_up_is_not_mistaken_for_it():
    """The system uses descriptors and addresses again, so that the two look the same."""
    references, holds = References(print), []

    class Ending(Pins):
        def are_over(self):
            references.keep(Pins(*self))
            return True

    references.keep(Ending(holds, 7, 8, 4096))
    references.unpin()
    assert [type(pins) for pins in references._pins] == [Pins]
