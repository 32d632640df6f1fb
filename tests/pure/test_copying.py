"""Many bytes are copied by several threads, and who calls waits for none that has not begun."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from other_processes import wait_until

from dask_shm_plugin import copying
from dask_shm_plugin.copying import Copier

STEP = copying._STEP

several = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")


@pytest.fixture
def copier() -> Iterator[Copier]:
    """One that ends its threads."""
    copier = Copier()
    yield copier
    copier.close()


def data(size: int) -> np.ndarray:
    """Return random bytes."""
    return np.random.default_rng(size).integers(0, 256, size, np.uint8)


@pytest.mark.parametrize("size", [0, 1, STEP - 1, 4 * STEP - 1, 4 * STEP, 4 * STEP + 1, 7 * STEP + 4097])
def test_a_copy_is_the_same(copier: Copier, size: int) -> None:
    """Every byte, and none beside them."""
    source, around = data(size), np.full(size + 2, 7, np.uint8)
    copier.copy(around[1:-1], source)
    np.testing.assert_array_equal(around[1:-1], source)
    assert around[0] == around[-1] == 7


@several
def test_much_is_copied_by_several_and_little_by_one(copier: Copier) -> None:
    """To start a thread takes as long as to copy some megabytes."""
    source = data(8 * STEP)
    copier.copy(np.empty(STEP, np.uint8), source[:STEP])
    assert copier._threads is None
    copier.copy(np.empty_like(source), source)
    assert copier._threads is not None


@several
def test_helpers_that_are_busy_keep_nobody_waiting(copier: Copier) -> None:
    """It is then done as if there were none."""
    source, free = data(8 * STEP), threading.Event()
    copier._threads = ThreadPoolExecutor(1)
    copier._threads.submit(free.wait)
    try:
        target = np.empty_like(source)
        copier.copy(target, source)
        np.testing.assert_array_equal(target, source)
    finally:
        free.set()


@several
def test_nobody_copies_any_more_when_the_caller_was_interrupted(
    copier: Copier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place may be somebody else's by then."""
    has_begun, over = threading.Event(), []

    def copyto(*_: np.ndarray) -> None:
        if threading.current_thread() is threading.main_thread():
            assert has_begun.wait(10)
            raise KeyboardInterrupt
        has_begun.set()
        time.sleep(0.2)
        over.append(True)

    monkeypatch.setattr(copying.np, "copyto", copyto)
    with pytest.raises(KeyboardInterrupt):
        copier.copy(np.empty(8 * STEP, np.uint8), np.empty(8 * STEP, np.uint8))
    assert over == [True]


@several
def test_what_a_helper_writes_to_is_kept_where_the_wait_for_it_is_interrupted_too(
    copier: Copier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call is over then, but nobody else gets the place before the helper is done."""
    has_begun, go_on = threading.Event(), threading.Event()

    def copyto(*_: np.ndarray) -> None:
        if threading.current_thread() is threading.main_thread():
            assert has_begun.wait(10)
            raise KeyboardInterrupt
        has_begun.set()
        assert go_on.wait(10)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    class Place:
        """What the helper writes to."""

    monkeypatch.setattr(copying.np, "copyto", copyto)
    monkeypatch.setattr(copying, "wait", interrupted)
    place = Place()
    seen = weakref.ref(place)
    with pytest.raises(KeyboardInterrupt):
        copier.copy(np.empty(8 * STEP, np.uint8), np.empty(8 * STEP, np.uint8), lambda: seen())
    del place
    assert seen() is not None
    go_on.set()
    wait_until(lambda: seen() is None, "the helper has let go")


def test_a_helper_that_fails_is_heard_of_when_no_other_copies_any_more(
    copier: Copier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is what it has not copied passed over, nor is the place given up too early."""
    turns, over, together = iter(["fails", "copies on"]), [], threading.Barrier(3)

    def copyto(*_: np.ndarray) -> None:
        if threading.current_thread() is threading.main_thread():
            together.wait(10)
            return
        does = next(turns)
        together.wait(10)
        if does == "fails":
            raise MemoryError
        time.sleep(0.2)
        over.append(True)

    monkeypatch.setattr(copying.np, "copyto", copyto)
    monkeypatch.setattr(copying, "_SMALLEST", 3 * STEP)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    with pytest.raises(MemoryError):
        copier.copy(np.empty(3 * STEP, np.uint8), np.empty(3 * STEP, np.uint8))
    assert over == [True]


def test_many_threads_copy_at_the_same_time(copier: Copier) -> None:
    """Each its own."""
    sources = [data(5 * STEP + n) for n in range(6)]
    targets = [np.empty_like(source) for source in sources]
    with ThreadPoolExecutor(len(sources)) as threads:
        list(threads.map(copier.copy, targets, sources))
    for source, target in zip(sources, targets, strict=True):
        np.testing.assert_array_equal(target, source)


def test_a_copy_is_made_while_the_interpreter_ends() -> None:
    """When no thread can be started any more."""
    lines = f"""
import atexit, numpy as np
from dask_shm_plugin.copying import Copier
source = np.random.default_rng(0).integers(0, 256, {8 * STEP}, np.uint8)
target, copier = np.zeros_like(source), Copier()
atexit.register(lambda: (copier.copy(target, source), print(bool((target == source).all()))))
"""
    done = subprocess.run([sys.executable, "-c", lines], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")
