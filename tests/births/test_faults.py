"""Allocations in other code's locks and loops, lost descriptors, interruptions and failures in the midst of a step."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from births import MIB, births, drafts, figures, newborn, own_drafts
from other_processes import Process, join, publish, wait_until

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.births import switch
from dask_shm_plugin.births.nursery import Nursery
from dask_shm_plugin.linux import syscalls
from dask_shm_plugin.mapping.atlas import ATLAS
from dask_shm_plugin.node import membership

JOIN = "arena = membership.join(cluster, 'worker', f'tcp://{os.getpid()}', capacity=lambda: 64 << 20, warm=2**20)"
BEAR = "from births import *; assert switch.switch_on(arena, None, 3600) is None"


@pytest.fixture
def bearer(cluster: str, member: Callable[[str], Process]) -> Process:
    """Start a process whose arrays are born in the arena."""
    one = member(JOIN)
    one(BEAR)
    return one


# -- an allocation is as with stock NumPy

LOCKED = """
#include <pthread.h>
void *PyObject_CallObject(void *, void *);
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
void *make(void *function, void *arguments) {
    pthread_mutex_lock(&lock);
    void *array = PyObject_CallObject(function, arguments);
    pthread_mutex_unlock(&lock);
    return array;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_an_extension_may_allocate_under_a_lock(bearer: Process, tmp_path: Path) -> None:
    """It waits for its lock with the GIL, so an allocation must never release the GIL."""
    (tmp_path / "locked.c").write_text(LOCKED)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "locked.so", tmp_path / "locked.c"], check=True)
    bearer(
        """
        import ctypes, time
        make = ctypes.PyDLL(path).make
        make.restype, make.argtypes = ctypes.py_object, [ctypes.py_object] * 2
        kept = []
        def work():
            until, kept = time.monotonic() + 20, []
            while figures().reused < 1000 and time.monotonic() < until:
                for _ in range(10):
                    kept.append(make(np.empty, (200 * KIB,)))
                kept.clear()
                time.sleep(0.0005)  # else the thread that adds chunks may never get the GIL
        threads = [threading.Thread(target=in_arena, args=(work,)) for _ in range(2)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        """,
        path=str(tmp_path / "locked.so"),
    )
    assert bearer("figures()").reused


def test_an_allocation_lets_no_other_thread_run(bearer: Process) -> None:
    """So the list of which NumPy makes an array has the same length before and after."""
    bearer("""
        import time
        items, is_over = [0.0] * 40000, False
        def change():
            while not is_over:
                for _ in range(500): items.append(1.0)
                time.sleep(0)
                del items[-500:]
                time.sleep(0)
        def work():
            until, kept = time.monotonic() + 20, []
            while figures().reused < 200 and time.monotonic() < until:
                for _ in range(8):
                    kept.append(np.array(items, float))
                kept.clear()
        thread = threading.Thread(target=change)
        thread.start()
        try:
            in_arena(work)
        finally:
            is_over = True
            thread.join()
    """)
    assert bearer("figures()").reused


# -- descriptors


def test_births_need_no_descriptor(arena: Arena) -> None:
    """Code that closes all descriptors would close it, and its number would become another file's."""
    before = set(os.listdir("/proc/self/fd"))
    with births(arena):
        newborn(np.ones, MIB, np.uint8)
        # A thread may have a file open for a moment, now or when `before` was read.
        wait_until(lambda: set(os.listdir("/proc/self/fd")) <= before, "there are no more descriptors than before")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("how", ["os.fork", "ctypes.PyDLL(None).fork"])
def test_without_the_arenas_descriptor_a_child_has_no_drafts(bearer: Process, how: str) -> None:
    """They cannot be made copy-on-write, and the child must not write into its parent's arrays."""
    bearer("import ctypes, sys; one = newborn(np.ones, 1 << 20, np.uint8); sys.stderr = None")
    bearer("os.close(arena.segment.fd); signal.signal(signal.SIGCHLD, signal.SIG_DFL)")
    bearer(f"""
        def outcome(work):
            if (pid := {how}()) == 0:
                work()
                os._exit(0)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        def free():
            global one
            del one
            gc.collect()
            others = [np.ones(1 << 20, np.uint8) for _ in range(100)]
            os._exit(7 if all(other.all() for other in others) else 1)
        def forget():
            outcome(free) == 7 and os._exit(7)
    """)
    assert bearer("outcome(lambda: one.fill(77))") == -11
    assert bearer("outcome(free)") == bearer("outcome(forget)") == 7
    assert bearer("(one == 1).all()")


# -- interruptions and failures


def test_pages_that_cannot_be_made_are_not_tried_again_at_once(in_small_shm: Process) -> None:
    """No allocation ends in SIGBUS: on a full tmpfs arrays lie in ordinary memory until the memory is looked at again."""
    in_small_shm("""
        import contextlib; from births import *
        arena = Arena.create(8 << 20, warm=1 << 20)
        assert switch.switch_on(arena, None, 3600) is None
        array = newborn(np.ones, 1 << 20, np.uint8)
        wait_until(lambda: figures().bare, "the next chunk is added")
        with switch._nursery._adding, switch._nursery._sealing:
            file = os.open("/dev/shm/of somebody else", os.O_CREAT | os.O_WRONLY)
            with contextlib.suppress(OSError):
                while os.write(file, bytes(4096)):
                    pass
            before, trims = figures(), arena._access.table.trims
            tried = [in_arena(np.ones, 1 << 20, np.uint8) for _ in range(5)]
            after = figures()
        """)
    assert in_small_shm("not any(map(is_born, tried)) and all(map(np.all, tried))")
    assert in_small_shm("after.missed - before.missed, after.reused - before.reused") == (5, 0)
    in_small_shm("wait_until(lambda: arena._access.table.trims > trims, 'others look again for pages')")
    in_small_shm(
        "os.ftruncate(file, 0); tried.clear(); newborn(np.ones, 1 << 20, np.uint8); array = None; gc.collect()"
    )
    in_small_shm("switch.switch_off(arena); wait_until(lambda: arena.stats().used == 0, 'all is free')")


def test_a_chunk_that_is_being_added_when_births_end(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """The addresses are reserved until it is dropped."""
    map_at, is_inside, may_go = arena.segment.map_shared_at, threading.Event(), threading.Event()

    def map_slowly(address: int, offset: int, length: int) -> None:
        map_at(address, offset, length)
        is_inside.set()
        may_go.wait(10)

    with births(arena) as nursery:
        monkeypatch.setattr(arena.segment, "map_shared_at", map_slowly)
        switch.allocate_here()
        try:
            np.ones(MIB, np.uint8)
        finally:
            load = switch.load()
            assert not isinstance(load, str)
            load.set_handler(load.numpys_capsule)
        assert is_inside.wait(10)
        switch.switch_off(arena)
        time.sleep(0.1)
        assert not nursery.is_over
        may_go.set()
        wait_until(lambda: nursery.is_over, "the chunk is dropped")
        assert figures().living == 0
        switch._users = 1


@pytest.mark.parametrize("error", [OSError, RuntimeError])
@pytest.mark.parametrize("step", ["map_shared_at", "born_add"])
def test_a_chunk_whose_adding_is_interrupted_is_dropped(
    nursery: Nursery, arena: Arena, monkeypatch: pytest.MonkeyPatch, step: str, error: type[Exception]
) -> None:
    """It is known before it is mapped, and dropped if the library does not know it."""
    owner = arena.segment if step == "map_shared_at" else nursery._library.functions
    right = getattr(owner, step)
    failures = 2

    def fail(*arguments):
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise error
        return right(*arguments)

    monkeypatch.setattr(owner, step, fail)
    array = newborn(np.ones, MIB, np.uint8)
    wait_until(lambda: drafts(arena) == own_drafts(arena) == MIB, "nothing is left of the failures")
    assert failures < 0
    assert array.all()


def test_a_chunk_that_cannot_be_closed_off_is_dropped_later(
    nursery: Nursery, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile its draft is kept: two processes must not write to it."""
    array = newborn(np.ones, MIB, np.uint8)
    close_off, tries = syscalls.close_off, []

    def fail(address: int, length: int) -> None:
        tries.append(address)
        if len(tries) < 4:
            raise OSError
        close_off(address, length)

    monkeypatch.setattr(syscalls, "close_off", fail)
    del array
    nursery._idle_s = 0.1
    wait_until(lambda: arena.stats().used == 0, "all is given back")
    assert len(tries) >= 4


@pytest.mark.parametrize("where", ["allocator.seal", "ATLAS.add"])
def test_a_seal_that_is_interrupted_is_done_again(
    nursery: Nursery, arena: Arena, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A row that is sealed already is as good as one that is sealed now."""
    array = newborn(np.ones, MIB, np.uint8)
    owner, name = (arena.allocator, "seal") if where == "allocator.seal" else (ATLAS, "add")
    right = getattr(owner, name)

    def interrupt(*arguments) -> None:
        right(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            switch.seal(array.ctypes.data, array.nbytes)
    assert switch.seal(array.ctypes.data, array.nbytes)
    assert ATLAS.locate(array.ctypes.data, array.nbytes) is not None
    assert own_drafts(arena) == 0
    del array
    wait_until(lambda: figures().private == 0, "the array is freed")


# -- forks


def test_a_child_keeps_no_idle_chunks(bearer: Process) -> None:
    """They would take memory that no worker is charged for, as long as the child lives."""
    bearer("one = newborn(np.ones, 1 << 20, np.uint8)")
    bearer("others = [newborn(np.ones, 4 << 20, np.uint8) for _ in range(3)]; others.clear(); gc.collect()")
    assert bearer("figures().idle + figures().bare") > 8 * MIB
    child = bearer.fork()
    wait_until(lambda: bearer("arena.stats().used") == MIB, "idle chunks are given back")
    assert child("one.all()")
    bearer("del one; gc.collect()")
    child.kill()
    wait_until(lambda: bearer("arena.holdings.tidy(), arena.stats().used")[1] == 0, "nothing is left")


def test_blocks_are_held_for_a_child_whatever_fails(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of births, or an interruption, does not keep a fork from holding them."""
    block = publish(join(cluster), b"x")

    def fail() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(membership.births, "before_fork", fail)
    with pytest.raises(KeyboardInterrupt):
        membership._before_fork()
    assert membership._forking.holds
    membership._after_fork()
    block.close()
