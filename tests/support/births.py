"""Arrays that are born in an arena, in this process and without Dask."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from other_processes import wait_until

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.births import switch
from dask_shm_plugin.births.library import Figures, Library, load
from dask_shm_plugin.births.nursery import Nursery

T = TypeVar("T")

KIB = 1024
MIB = 1024 * KIB


def library() -> Library:
    """Return the library, which the tests need."""
    found = load()
    assert isinstance(found, Library), found
    return found


def in_arena(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function whose arrays are born in the arena, as a task's are."""

    def call() -> T:
        switch.allocate_here()
        return function(*arguments)

    return contextvars.copy_context().run(call)


def newborn(function: Callable[..., np.ndarray], *arguments: Any) -> np.ndarray:
    """Call a function in the arena until the array that it returns is born: the first of a size never is."""
    until = time.monotonic() + 10
    while not is_born(array := in_arena(function, *arguments)):
        assert time.monotonic() < until, "no array was born"
        del array
        time.sleep(0.001)
    return array


def in_thread(function: Callable[[], T]) -> T:
    """Call a function in another thread."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def figures() -> Figures:
    """Return the figures of this process."""
    found = switch.figures()
    assert found is not None
    return found


def is_born(array: np.ndarray) -> bool:
    """Return whether the data of an array lie in a chunk."""
    nursery = switch._nursery
    return nursery is not None and 0 <= array.ctypes.data - nursery._area < nursery._span


def drafts(arena: Arena) -> int:
    """Return the bytes of all drafts and blocks of an arena, without idle chunks of this process."""
    return _less_idle(lambda: arena.stats().used - figures().bare)


def own_drafts(arena: Arena) -> int:
    """Return the bytes of this process's drafts with arrays, without idle chunks."""
    return _less_idle(arena.budget.drafts)


def _less_idle(count: Callable[[], int]) -> int:
    nursery = switch._nursery
    assert nursery is not None
    with nursery._adding, nursery._sealing:
        return count() - figures().idle


@contextmanager
def births(
    arena: Arena, memory_limit: int | None = None, warm: float = 3600, *, has_worker: bool = True
) -> Iterator[Nursery]:
    """Let arrays be born in an arena, and wait at the end until all of them are given back."""
    reason = switch.switch_on(arena, memory_limit, warm, has_worker=has_worker)
    assert reason is None, reason
    nursery = switch._nursery
    assert nursery is not None
    try:
        yield nursery
    finally:
        switch.switch_off(arena)
        wait_until(lambda: nursery.is_over, "the last chunk is given back")
