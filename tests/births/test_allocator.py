"""NumPy's memory comes from chunks of the arena where that is possible, and from NumPy's own allocator where not."""

from __future__ import annotations

import contextvars
import ctypes
import errno
import shutil
import subprocess
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from births import KIB, MIB, births, drafts, figures, in_arena, in_thread, is_born, library, newborn, own_drafts
from other_processes import publish, wait_until

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.births import bounds, switch
from dask_shm_plugin.births.nursery import _QUIET_S, Nursery
from dask_shm_plugin.linux import limits

CAPACITY = 64 * MIB


def test_large_arrays_lie_in_chunks_and_small_ones_do_not(nursery: Nursery) -> None:
    """The bounds are 128 KiB and a quarter of what all drafts of a process may take."""
    for size in (128 * KIB, MIB + 1, 8 * MIB):
        newborn(np.empty, size, np.uint8)[:] = 7
    for size in (8, 127 * KIB, 17 * MIB):
        assert not any(is_born(in_arena(np.empty, size, np.uint8)) for _ in range(5))
    assert not is_born(np.empty(MIB)), "only arrays of tasks are born"


def test_the_first_array_of_a_size_is_not_born_and_those_that_follow_are(nursery: Nursery) -> None:
    """Chunks are added ahead of need, also while none is freed."""
    first = in_arena(np.ones, MIB, np.uint8)
    assert not is_born(first)
    kept = []
    for _ in range(8):
        wait_until(lambda: figures().bare, "a chunk is added")
        kept.append(in_arena(np.ones, MIB, np.uint8))
    assert all(map(is_born, kept))


def test_as_many_chunks_are_added_as_were_missed_at_once(nursery: Nursery) -> None:
    """Not one for each array that was missed: a loop frees them again."""
    with nursery._adding:
        for _ in range(50):
            pair = [in_arena(np.ones, MIB, np.uint8) for _ in range(2)]
            del pair
        assert figures().missed == 100
    wait_until(lambda: figures().bare >= 2 * MIB, "two chunks are added")
    time.sleep(0.1)
    assert figures().bare <= 3 * MIB, "one may have been wanted before the second array of the first pair"


def test_a_chunk_stays_idle_while_its_size_is_in_use(nursery: Nursery) -> None:
    """It is not given back and added again each second."""
    newborn(np.ones, MIB, np.uint8)
    wait_until(lambda: figures().added >= 2, "a spare one is added")
    added = figures().added
    for _ in range(300):
        in_arena(np.ones, MIB, np.uint8)
        time.sleep(0.01)
    assert figures().added <= added + 1


def test_a_large_chunk_stays_idle_while_a_task_may_be_filling_its_array() -> None:
    """It has no pages, so it takes room in the arena only. A size is in use for a second and 4 ms for each MiB."""
    arena = Arena.create(1024 * MIB, warm=MIB)
    with births(arena):
        in_arena(np.empty, 256 * MIB, np.uint8)
        time.sleep(1.5)
        assert is_born(in_arena(np.empty, 256 * MIB, np.uint8))
        wait_until(lambda: figures().living == 0, "it is given back")
    arena.close()


def test_chunks_are_used_again_and_have_little_more_than_the_size(nursery: Nursery, arena: Arena) -> None:
    """A chunk is at most an eighth larger than its array, also when it is used again."""
    for size in range(128 * KIB, 4 * MIB, 99_991):
        array = newborn(np.ones, size, np.uint8)
        assert figures().used <= size * 1.13 + 4096
        del array
    newborn(np.ones, MIB, np.uint8)
    before = figures()
    for _ in range(5):
        in_arena(np.ones, MIB, np.uint8)
    assert figures().reused >= before.reused + 4


def test_zeros_are_zeros_in_used_memory(nursery: Nursery) -> None:
    """Small arrays of zeros use idle chunks, and large ones are left to the kernel, which has zeroed pages."""
    for _ in range(5):
        assert not is_born(in_arena(np.zeros, MIB, np.uint8))
        time.sleep(0.01)
    assert figures().added == 0, "no chunk is added for zeros, which may never be touched"
    newborn(np.ones, MIB, np.uint8)
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

    for _ in range(5):
        in_arena(resized)
    wait_until(lambda: (in_arena(resized), figures().reused)[1], "chunks are used")
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


def test_chunks_are_handed_out_and_added_without_the_gil(nursery: Nursery) -> None:
    """An allocation never calls Python."""
    handler = our_handler()
    place = handler.malloc(None, MIB)
    assert place
    assert figures().used == 0
    handler.free(None, place, MIB)
    wait_until(lambda: figures().bare, "a chunk is added")
    place = handler.malloc(None, MIB)
    assert figures().used == MIB
    handler.free(None, place, MIB)
    assert figures().used == 0


@pytest.mark.parametrize("size", [0, 1, 1 << 40])
def test_a_wrong_size_in_free_does_no_harm(nursery: Nursery, size: int) -> None:
    """NumPy passes another size than that of the allocation for some shapes, such as (2, 0, 2)."""
    handler = our_handler()
    newborn(np.ones, MIB, np.uint8)
    place = handler.malloc(None, MIB)
    assert figures().used == MIB
    handler.free(None, place, size)
    assert figures().used == 0
    small = handler.malloc(None, 100)
    handler.free(None, small, size)
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
    """Python is not called on top of an error."""
    (tmp_path / "fail.c").write_text(FAIL)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "fail.so", tmp_path / "fail.c"], check=True)
    fail_and_allocate = ctypes.PyDLL(str(tmp_path / "fail.so")).fail_and_allocate
    fail_and_allocate.argtypes = [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p]
    set_error = ctypes.cast(ctypes.pythonapi.PyErr_SetString, ctypes.c_void_p)
    for _ in range(2):
        with pytest.raises(KeyError, match="pending"):
            fail_and_allocate(set_error, KeyError, ctypes.cast(our_handler().malloc, ctypes.c_void_p))


def test_arrays_are_freed_in_any_thread(nursery: Nursery) -> None:
    """The last reference may be dropped elsewhere."""
    arrays = [in_thread(lambda: newborn(np.ones, MIB, np.uint8)) for _ in range(4)]
    threads = [threading.Thread(target=arrays.pop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert figures().used == 0


def test_arrays_that_live_when_births_end_stay_valid(arena: Arena) -> None:
    """Their memory is given back when they are freed, and nothing is born any more."""
    with births(arena) as nursery:
        array = newborn(np.arange, MIB)
        switch.switch_off(arena)
        assert not is_born(in_arena(np.arange, MIB))
        array += 1
        wait_until(lambda: drafts(arena) == 8 * MIB, "idle chunks are given back")
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
        newborn(np.ones, MIB, np.uint8)
        before = traced_in_arrays()
        array = in_arena(np.ones, MIB, np.uint8)
        assert is_born(array)
        assert traced_in_arrays() - before == MIB
        del array
        assert traced_in_arrays() == before
    finally:
        tracemalloc.stop()


def traced_in_arrays() -> int:
    """Return the bytes of all large arrays that `tracemalloc` knows; other threads make small ones meanwhile."""
    is_numpys = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    sizes = [trace.size for trace in tracemalloc.take_snapshot().filter_traces([is_numpys]).traces]
    return sum(size for size in sizes if size >= MIB)


def test_all_drafts_together_leave_room(nursery: Nursery, arena: Arena) -> None:
    """Beyond half of the capacity arrays lie in ordinary memory, which is counted."""
    arrays = [newborn(np.ones, 4 * MIB, np.uint8) for _ in range(8)]
    assert not any(is_born(in_arena(np.ones, 4 * MIB, np.uint8)) for _ in range(5))
    assert drafts(arena) == own_drafts(arena) == sum(array.nbytes for array in arrays) == CAPACITY // 2
    arena.draft(CAPACITY // 2 - MIB).__exit__(None, None, None)


def test_a_full_arena_gets_the_idle_chunks_back(nursery: Nursery, arena: Arena) -> None:
    """Nothing is kept idle while more than three quarters of the arena are taken."""
    newborn(np.ones, 4 * MIB, np.uint8)
    with arena.draft(50 * MIB):
        wait_until(lambda: figures().idle + figures().bare == 0, "idle chunks are given back")
        assert not is_born(in_arena(np.ones, 4 * MIB, np.uint8))


def test_idle_chunks_are_bounded_and_age(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have a bound, which one chunk may exceed, and stay for a second or the time of `shm.warm`."""
    monkeypatch.setattr(bounds, "_MAX_IDLE_BYTES", 2 * MIB)
    monkeypatch.setattr(bounds, "_MAX_WARM_BYTES", 2 * MIB)
    with births(arena, warm=0.2) as nursery:
        assert nursery._idle_s == 0.2
        nursery._idle_s = 3600.0  # none ages before the bound was seen
        arrays = [newborn(np.ones, MIB, np.uint8) for _ in range(5)]
        arrays.clear()
        wait_until(
            lambda: figures().idle + figures().bare == 2 * MIB, "idle chunks are bounded, with pages and without"
        )

        def make_room() -> bool:
            newborn(np.ones, 8 * MIB, np.uint8)  # while this size is in use, and no longer
            return (figures().bare, figures().idle) == (8 * MIB, 0)

        wait_until(make_room, "the others make room")
        nursery._idle_s = 0.2
        wait_until(lambda: arena.stats().used == 0, "idle chunks are given back")


def test_idle_chunks_beyond_the_bound_have_no_pages(nursery: Nursery, arena: Arena) -> None:
    """The pages go when the array is freed, and are made again, in the same chunk, when the next one is allocated."""
    array = newborn(np.ones, 8 * MIB, np.uint8)
    address, resident = array.ctypes.data, arena.segment.resident
    wait_until(lambda: figures().bare == 8 * MIB, "the next chunk is added, without pages")
    with nursery._sealing, nursery._adding:  # the nursery's thread neither adds nor drops
        del array
        assert arena.segment.resident <= resident - 8 * MIB
        assert figures().idle == 0
        again = in_arena(np.ones, 8 * MIB, np.uint8)
        assert again.ctypes.data == address
        assert arena.segment.resident >= resident
        assert again.all()
    assert own_drafts(arena) == 8 * MIB


def test_chunks_without_pages_do_not_hide_free_pages(arena: Arena) -> None:
    """Pages beyond those of drafts and blocks are free, but these drafts have none."""
    arena.trimmer.warm = 0
    before = arena.stats().resident
    with births(arena):
        arrays = [newborn(np.ones, 8 * MIB, np.uint8) for _ in range(2)]
        block = publish(arena, bytes(8 * MIB))
        arrays.clear()
        block.close()
        arena.holdings.tidy()
        assert figures().bare >= 16 * MIB
        arena.budget.measure()
        arena.trimmer.trim()
        assert arena.stats().resident - before < MIB


def test_the_end_of_births_leaves_no_figure_behind(arena: Arena) -> None:
    """What was noted of chunks without pages would hide memory in use for as long as the process is a member."""
    with births(arena):
        newborn(np.ones, 8 * MIB, np.uint8)
        arena.budget.measure()
        assert arena._access.table.members.bare() >= 8 * MIB
    assert arena._access.table.members.bare() == 0


def test_other_processes_look_again_for_the_pages_of_a_dropped_chunk(nursery: Nursery, arena: Arena) -> None:
    """A process may have written there when the place was a block's, and it remembers that pages exist."""
    newborn(np.ones, 8 * MIB, np.uint8)
    before = arena._access.table.trims
    nursery._idle_s = 0.0
    wait_until(lambda: figures().living == 0, "the bare chunks are dropped")
    assert arena._access.table.trims > before


def test_where_no_pages_may_be_made_arrays_lie_in_ordinary_memory(nursery: Nursery, monkeypatch) -> None:
    """A bare chunk stays bare while the machine has no memory left, and no other is added."""
    array = newborn(np.ones, 8 * MIB, np.uint8)
    wait_until(lambda: figures().bare, "the next chunk is added")
    before = figures()
    monkeypatch.setattr(limits, "head_room", lambda: 0)
    nursery._set_limits()
    assert not any(is_born(in_arena(np.ones, 8 * MIB, np.uint8)) for _ in range(5))
    time.sleep(0.1)
    assert (figures().added, figures().missed) == (before.added, before.missed + 5)
    assert array.all()


def test_the_limit_of_a_worker_counts(arena: Arena) -> None:
    """All drafts have what other memory leaves of it."""
    own = arena.budget.measure()
    limit = int((own + 8 * MIB) / 0.6)
    with births(arena, memory_limit=limit):
        limits = bounds.limits_of(arena, limit)
        assert 4 * MIB < limits.drafts < 12 * MIB
        assert limits.largest == limits.drafts // 2
        newborn(np.ones, MIB, np.uint8)
    with births(arena, memory_limit=own):
        assert bounds.limits_of(arena, own)[:4] == (0, 0, 0, 0)
        assert not any(is_born(in_arena(np.ones, MIB, np.uint8)) for _ in range(5))


def test_without_memory_arrays_are_allocated_as_usual(nursery: Nursery, arena: Arena, monkeypatch) -> None:
    """A failure is silent, and no chunk is added for a while."""
    tries = []

    def refuse(address, offset, length):
        tries.append(length)
        raise OSError(errno.ENOMEM, "none")

    monkeypatch.setattr(arena.segment, "map_shared_at", refuse)
    started = time.monotonic()
    for _ in range(20):
        assert not is_born(in_arena(np.ones, MIB, np.uint8))
        time.sleep(0.01)
    wait_until(lambda: tries, "a chunk was tried")
    assert len(tries) <= 1 + (time.monotonic() - started) / _QUIET_S
    assert figures().missed == 20
    monkeypatch.undo()
    newborn(np.ones, MIB, np.uint8)
    wait_until(lambda: arena.stats().blocks == figures().living, "nothing is left of the failed ones")


def test_no_machine_without_overcommitment(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, the kernel may refuse to replace a mapping after it has removed the old one."""
    monkeypatch.setattr(limits, "_read", lambda path: b"2\n" if path.endswith("overcommit_memory") else b"")
    assert "overcommit" in str(switch.switch_on(arena, None, 4))


def test_the_table_keeps_rows_for_publishing(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    """No chunk is added while half of the rows are taken."""
    monkeypatch.setattr(bounds, "_MAX_ROWS", 3)
    arrays = [newborn(np.empty, MIB, np.uint8) for _ in range(3)]
    assert not any(is_born(in_arena(np.empty, MIB, np.uint8)) for _ in range(5))
    del arrays


def test_a_second_arena_has_no_births_while_the_first_has(nursery: Nursery) -> None:
    """A value for a member of the second arena is copied there."""
    other = Arena.create(MIB)
    assert switch.switch_on(other, None, 4) == "arrays that this process has allocated in an arena are still alive"
    switch.switch_off(other)
    newborn(np.ones, MIB, np.uint8)
    other.close()


def test_arrays_are_born_in_one_arena_after_another() -> None:
    """A process may leave one cluster and join the next."""
    for _ in range(3):
        arena = Arena.create(CAPACITY)
        with births(arena):
            newborn(np.ones, MIB, np.uint8)
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
    assert figures().reused
    wait_until(lambda: figures().private == figures().used == 0, "all are freed")
