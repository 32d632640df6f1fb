"""A forked child's views keep their content whatever its parent does, and nothing is left when the child has ended."""

from __future__ import annotations

import gc
import os

import numpy as np
import pytest
from other_processes import JOIN, wait_until

from dask_shm_plugin.arena.forks import ForkHold
from dask_shm_plugin.arena.references import References
from dask_shm_plugin.node import membership

SIZE = 1 << 20


@pytest.fixture
def arena(prefix):
    """Create an arena with room for one block more than the test uses."""
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
    """Fork a child that waits, calls ``look`` and exits with the result; return a function that gets this result."""
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
    """The space is not reused while the child may read it."""
    view = share(arena, 7)
    saw = fork(lambda it: it[-1], view)
    del view
    gc.collect()
    arena.holdings.tidy()
    others = [share(arena, 8)]
    assert arena.stats().used == 2 * SIZE
    assert saw() == 7
    wait_until(lambda: arena.stats().used == SIZE, "the references for the child are released")
    others.append(share(arena, 9))
    assert [other[0] for other in others] == [8, 9]


def test_a_child_that_is_killed_leaves_nothing(arena):
    """The parent sees the end of its child by a lock, so the child need not report it."""
    view = share(arena, 7)
    saw = fork(lambda: os.kill(os.getpid(), 9))
    del view
    gc.collect()
    assert saw() == -9
    wait_until(lambda: arena.stats().used == 0, "the references for the child are released")


@pytest.mark.parametrize("of_child", [False, True])
def test_a_child_that_closes_all_its_descriptors_keeps_its_views(arena, of_child):
    """Daemons close all their descriptors, often after another fork."""
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
        arena.holdings.references.release_ended_children()
    others = [share(arena, 8)]
    assert arena.stats().used == 2 * SIZE
    os.close(go)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    wait_until(lambda: arena.stats().used == SIZE, "the references for the child are released")
    assert others[0][0] == 8


def test_a_child_may_join_as_a_member_of_its_own(arena):
    """The child is another process, whatever it has inherited."""
    view = share(arena, 7)

    def join():
        own = membership.join("test", "worker", "child")
        return own is not arena and own.stats().members == 2 and view[0] == 7

    assert fork(join)() == 1
    wait_until(lambda: arena.roster.reclaim_dead() or arena.stats().members == 1, "the child is no member any more")


def test_a_fork_without_a_free_descriptor_keeps_the_blocks_of_the_child(cluster, process):
    """The holds of an earlier fork are not released twice, and the block stays until the child has ended."""
    other = process()  # a process without other children, because it would wait for these as well
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
            arena.holdings.references.release_ended_children()
        publish(arena, bytes([8]) * 4096).close()
        """)
    wait_until(
        lambda: other("arena.holdings.tidy(), arena.stats().used")[1] == 4096, "only the block of the child is left"
    )
    other("os.close(go)")
    assert other("os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])") == 7
    wait_until(lambda: other("arena.stats().used") == 0, "the block of the child is released")
    other("os.close(ready); os.close(taken)")  # fails if another descriptor was closed in their place


def test_a_fork_keeps_its_blocks_while_another_process_holds_the_mutex(cluster, process):
    """The holds for a child are recorded in the parent alone, so the fork does not need the mutex."""
    other, stopped = process(), process()
    other(JOIN, cluster=cluster)
    stopped(JOIN, cluster=cluster)
    other("with publish(arena, b'parents') as block: view = block.view(0, 7)")
    stopped("enter(arena._mutex)")
    child = other.fork()
    stopped("leave(arena._mutex)")
    other("del view, block; gc.collect()")
    for _ in range(3):
        other(
            "arena.holdings.tidy(); arena.holdings.references.release_ended_children(); publish(arena, b'x' * 4096).close()"
        )
    assert child("bytes(view)") == b"parents"
    child.leave()
    wait_until(lambda: other("arena.stats().used") == 0, "the block of the child is released")


def test_a_fork_that_interrupts_the_making_of_a_view_does_not_deadlock(cluster, process):
    """A signal handler or a finalizer may fork at any moment, in a thread that holds the mutex."""
    other = process()
    other(JOIN, cluster=cluster)
    other("""
        from dask_shm_plugin.arena.references import References
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        def interrupted(*entry, enter=References.add):
            if (pid := os.fork()) == 0:
                os._exit(0)
            os.waitpid(pid, 0)
            return enter(*entry)
        References.add = interrupted
        with publish(arena, b'mine') as block:
            view = block.view(0, 4)
        """)
    assert other("bytes(view)") == b"mine"
    other("del view; gc.collect()")
    wait_until(
        lambda: (
            other("arena.holdings.references.release_ended_children(), arena.holdings.tidy(), arena.stats().used")[2]
            == 0
        ),
        "all references are released",
    )


def test_a_fork_hold_that_equals_an_ended_one_is_kept():
    """The kernel reuses descriptor numbers and addresses, so a new fork hold may equal one that has just ended."""
    references, holds = References(print), []

    class Ending(ForkHold):
        def are_over(self):
            references.keep(ForkHold(*self))
            return True

    references.keep(Ending(holds, 7, 8, 4096))
    references.release_ended_children()
    assert [type(one) for one in references._fork_holds] == [ForkHold]
