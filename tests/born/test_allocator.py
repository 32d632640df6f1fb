"""NumPy's memory comes from chunks of the arena where that is possible, and from NumPy's own allocator where not."""

from __future__ import annotations

import contextvars
import ctypes
import gc
import shutil
import subprocess
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from births import KIB, MIB, births, drafts, figures, in_arena, in_thread, is_born, library
from other_processes import wait_until

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.born import nursery as nursery_module
from dask_shm_plugin.born import switch
from dask_shm_plugin.born.nursery import Nursery
from dask_shm_plugin.exceptions import NoHeadRoom

CAPACITY = 64 * MIB


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Create an arena of 64 MiB, and validate its table after the test."""
    one = Arena.create(CAPACITY, warm=MIB)
    yield one
    if not one.has_left:
        one.validate()
    one.close()


@pytest.fixture
def nursery(arena: Arena) -> Iterator[Nursery]:
    """Let arrays be born in the arena; all chunks are given back after the test."""
    with births(arena) as one:
        yield one
        gc.collect()


def test_large_arrays_lie_in_chunks_and_small_ones_do_not(nursery: Nursery) -> None:
    """The bounds are 128 KiB and a quarter of what all drafts of a process may take."""
    sizes = (8, 127 * KIB, 128 * KIB, MIB + 1, 8 * MIB, 17 * MIB)
    arrays = [in_arena(np.empty, size, np.uint8) for size in sizes]
    assert [is_born(array) for array in arrays] == [False, False, True, True, True, False]
    for array in arrays:
        array[:] = 7
    assert not is_born(np.empty(MIB)), "only arrays of tasks are born"


def test_chunks_are_used_again_and_have_little_more_than_the_size(nursery: Nursery, arena: Arena) -> None:
    """A chunk is at most an eighth larger than its array, also when it is used again."""
    for size in range(128 * KIB, 4 * MIB, 99_991):
        array = in_arena(np.ones, size, np.uint8)
        assert is_born(array)
        assert figures().used <= size * 1.13 + 4096
        del array
    before = figures()
    for _ in range(5):
        in_arena(np.ones, MIB, np.uint8)
    assert figures().reused >= before.reused + 4


def test_zeros_are_zeros_in_used_memory(nursery: Nursery) -> None:
    """Small arrays of zeros are born, and large ones are left to the kernel, which has zeroed pages."""
    in_arena(np.ones, MIB, np.uint8)
    zeros = in_arena(np.zeros, MIB, np.uint8)
    assert is_born(zeros)
    assert not zeros.any()
    assert not is_born(in_arena(np.zeros, 5 * MIB, np.uint8))


@pytest.mark.parametrize("sizes", [(MIB, MIB - 8, 3 * MIB, 10, MIB), (10, MIB, 200 * KIB, 100 * KIB, 20 * MIB)])
def test_resizing_keeps_the_content(nursery: Nursery, sizes: tuple[int, ...]) -> None:
    """An array moves into a chunk, out of it, and within it."""

    def resized() -> None:
        array = np.arange(sizes[0] // 8)
        for size in sizes[1:]:
            before = array.copy()
            array.resize(size // 8, refcheck=False)
            length = min(len(before), len(array))
            assert np.array_equal(array[:length], before[:length])
            assert not array[length:].any()
            array[:] = np.arange(len(array))

    in_arena(resized)
    assert figures().used == 0


class Handler(ctypes.Structure):
    """The handler of NEP 49."""

    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("ctx", ctypes.c_void_p),
        ("malloc", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)),
        ("calloc", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)),
        ("realloc", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)),
        ("free", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)),
    )


def our_handler() -> Handler:
    """Return the handler of the library. Its functions are called without the GIL."""
    return Handler.in_dll(library().functions, "born_handler")


def test_without_the_gil_only_idle_chunks_are_handed_out(nursery: Nursery) -> None:
    """An allocation without the GIL never calls Python."""
    handler = our_handler()
    leased = figures().leased
    place = handler.malloc(None, MIB)
    assert place
    assert (figures().leased, figures().used) == (leased, 0)
    handler.free(None, place, MIB)
    address = in_arena(lambda: np.ones(MIB, np.uint8).ctypes.data)
    assert handler.malloc(None, MIB) == address
    handler.free(None, address, MIB)
    assert figures().used == 0


@pytest.mark.parametrize("size", [0, 1, 1 << 40])
def test_a_wrong_size_in_free_does_no_harm(nursery: Nursery, size: int) -> None:
    """NumPy passes another size than that of the allocation for some shapes, such as (2, 0, 2)."""
    handler = our_handler()
    in_arena(np.ones, MIB, np.uint8)
    place = handler.malloc(None, MIB)
    handler.free(None, place, size)
    assert (figures().used, figures().idle) == (0, MIB)
    assert in_arena(np.ones, (2, 0, 2)).size == 0


FAIL = """
#include <stddef.h>
void *fail_and_allocate(void (*set)(void *, const char *), void *kind, void *(*allocate)(void *, size_t)) {
    set(kind, "pending");
    return allocate(NULL, 1 << 20);
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_a_pending_exception_survives_an_allocation(nursery: Nursery, tmp_path: Path) -> None:
    """Python is not called on top of an error; the array lies in ordinary memory."""
    (tmp_path / "fail.c").write_text(FAIL)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "fail.so", tmp_path / "fail.c"], check=True)
    fail_and_allocate = ctypes.PyDLL(str(tmp_path / "fail.so")).fail_and_allocate
    fail_and_allocate.argtypes = [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p]
    set_error = ctypes.cast(ctypes.pythonapi.PyErr_SetString, ctypes.c_void_p)
    leased = figures().leased
    with pytest.raises(KeyError, match="pending"):
        fail_and_allocate(set_error, KeyError, ctypes.cast(our_handler().malloc, ctypes.c_void_p))
    assert figures().leased == leased


def test_arrays_are_freed_in_any_thread(nursery: Nursery) -> None:
    """The last reference may be dropped elsewhere."""
    arrays = [in_thread(lambda: in_arena(np.ones, MIB, np.uint8)) for _ in range(4)]
    assert all(map(is_born, arrays))
    threads = [threading.Thread(target=arrays.pop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert figures().used == 0


def test_arrays_that_live_when_births_end_stay_valid(arena: Arena) -> None:
    """Their memory is given back when they are freed, and nothing is born any more."""
    with births(arena) as nursery:
        array = in_arena(np.arange, MIB)
        switch.switch_off(arena)
        assert not is_born(in_arena(np.arange, MIB))
        array += 1
        assert drafts(arena) == array.nbytes
        assert array[-1] == MIB
        assert not nursery.is_over
        arena.close()
        assert not arena.has_left
        array[:] = 3
        assert array.sum() == 3 * MIB
        del array
        wait_until(lambda: nursery.is_over, "the chunk is given back")
        wait_until(lambda: arena.has_left, "the arena is left")
        switch._users = 1


def test_the_handler_of_a_user_stays(nursery: Nursery) -> None:
    """In a context with another handler, that one is used."""
    own = ctypes.pythonapi.PyCapsule_New(ctypes.byref(our_handler()), b"mem_handler", None)

    def look() -> object:
        library().set_handler(own)
        switch.allocate_here()
        return library().set_handler(own)

    assert contextvars.copy_context().run(look) is own


def test_traced_memory_is_that_of_the_arrays(nursery: Nursery) -> None:
    """`tracemalloc` sees arrays that are born as it sees others."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        array = in_arena(np.ones, MIB, np.uint8)
        assert MIB <= tracemalloc.get_traced_memory()[0] - before < 1.2 * MIB
        del array
        assert tracemalloc.get_traced_memory()[0] - before < MIB / 5
    finally:
        tracemalloc.stop()


def test_all_drafts_together_leave_room(nursery: Nursery, arena: Arena) -> None:
    """Beyond half of the capacity arrays lie in ordinary memory, which is counted."""
    arrays = [in_arena(np.ones, 4 * MIB, np.uint8) for _ in range(20)]
    assert sum(map(is_born, arrays)) == 8
    assert drafts(arena) <= CAPACITY // 2
    assert figures().refused >= 12
    assert arena.budget.drafts() == drafts(arena)
    arena.draft(CAPACITY // 2 - MIB).__exit__(None, None, None)


def test_a_full_arena_gets_the_idle_chunks_back(nursery: Nursery, arena: Arena) -> None:
    """Nothing is kept idle while more than three quarters of the arena are taken."""
    in_arena(np.ones, 4 * MIB, np.uint8)
    with arena.draft(50 * MIB):
        wait_until(lambda: figures().idle == 0, "idle chunks are given back")
        assert not is_born(in_arena(np.ones, 4 * MIB, np.uint8))


def test_idle_chunks_are_bounded_and_age(arena: Arena) -> None:
    """They take an eighth of what all drafts may take, for a second or the time of `shm.warm`."""
    with births(arena, warm=0.2):
        arrays = [in_arena(np.ones, MIB, np.uint8) for _ in range(12)]
        arrays.clear()
        wait_until(lambda: figures().idle <= 4 * MIB, "idle chunks are bounded")
        assert figures().idle
        wait_until(lambda: drafts(arena) == 0, "idle chunks are given back")


def test_the_limit_of_a_worker_counts(arena: Arena) -> None:
    """All drafts have at most half of its memory limit."""
    with births(arena, memory_limit=4 * MIB):
        assert is_born(in_arena(np.ones, MIB, np.uint8))
        assert not is_born(in_arena(np.ones, 2 * MIB, np.uint8))


def test_without_memory_arrays_are_allocated_as_usual(nursery: Nursery, arena: Arena, monkeypatch) -> None:
    """A failed lease is silent, and is not repeated for a while."""
    tries = []

    def refuse(extent):
        tries.append(extent)
        raise NoHeadRoom("none")

    monkeypatch.setattr(arena.pages, "make", refuse)
    arrays = [in_arena(np.ones, MIB, np.uint8) for _ in range(20)]
    assert not any(map(is_born, arrays))
    assert 1 <= len(tries) < 20
    assert figures().refused == 20
    monkeypatch.undo()
    wait_until(lambda: is_born(in_arena(np.ones, MIB, np.uint8)), "arrays are born again")
    wait_until(lambda: arena.stats().blocks == figures().living, "nothing is left of the failed ones")


def test_an_interruption_of_a_lease_is_not_lost(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when the allocation is over."""

    def interrupt(length: int) -> None:
        raise KeyboardInterrupt

    def work() -> None:
        arrays.append(np.ones(MIB, np.uint8))
        for _ in range(100):
            pass

    arrays: list[np.ndarray] = []
    monkeypatch.setattr(nursery, "lease", interrupt)
    with pytest.raises(KeyboardInterrupt):
        in_arena(work)
    assert not any(map(is_born, arrays))


def test_the_table_keeps_rows_for_publishing(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    """No chunk is added while half of the rows are taken."""
    monkeypatch.setattr(nursery_module, "_MAX_ROWS", 3)
    arrays = [in_arena(np.empty, MIB, np.uint8) for _ in range(5)]
    assert sum(map(is_born, arrays)) == 3


def test_a_second_arena_has_no_births_while_the_first_has(nursery: Nursery) -> None:
    """A value for a member of the second arena is copied there."""
    other = Arena.create(MIB)
    assert switch.switch_on(other, None, 4) == "arrays that this process has allocated in an arena are still alive"
    switch.switch_off(other)
    assert is_born(in_arena(np.ones, MIB, np.uint8))
    other.close()


def test_arrays_are_born_in_one_arena_after_another() -> None:
    """A process may leave one cluster and join the next."""
    for _ in range(3):
        arena = Arena.create(CAPACITY)
        with births(arena):
            assert is_born(in_arena(np.ones, MIB, np.uint8))
        arena.close()


def test_threads_allocate_write_and_free_without_mixing_their_memory(nursery: Nursery) -> None:
    """Every array keeps the number that its thread wrote, while others come and go."""
    wrong: list[int] = []

    def work(number: int) -> None:
        random = np.random.default_rng(number)

        def run() -> None:
            kept: list[np.ndarray] = []
            for _ in range(150):
                array = np.empty(int(random.integers(100 * KIB, 2 * MIB)), np.uint8)
                array[:] = number
                kept.append(array)
                if len(kept) > 3 or random.random() < 0.3:
                    old = kept.pop(int(random.integers(len(kept))))
                    if random.random() < 0.3:
                        switch.seal(old.ctypes.data, old.nbytes)
                    wrong.extend(old[old != number][:1])

        in_arena(run)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    wait_until(lambda: figures().private == figures().used == 0, "all are freed")
