"""Large copies are made by several threads, and the caller waits for no thread that has not begun."""

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

from dask_shm_plugin.linux import copying
from dask_shm_plugin.linux.copying import Copier

STEP = copying._STEP_BYTES

several = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")


@pytest.fixture
def copier() -> Iterator[Copier]:
    """Yield a copier, and end its threads after the test."""
    copier = Copier()
    yield copier
    copier.close()


def data(size: int) -> np.ndarray:
    """Return random bytes."""
    return np.random.default_rng(size).integers(0, 256, size, np.uint8)


@pytest.mark.parametrize("size", [0, 1, STEP - 1, 4 * STEP - 1, 4 * STEP, 4 * STEP + 1, 7 * STEP + 4097])
def test_a_copy_is_exact(copier: Copier, size: int) -> None:
    """Every byte is copied, and the bytes beside the target do not change."""
    source, around = data(size), np.full(size + 2, 7, np.uint8)
    copier.copy(around[1:-1], source)
    np.testing.assert_array_equal(around[1:-1], source)
    assert around[0] == around[-1] == 7


@several
def test_only_a_large_copy_starts_threads(copier: Copier) -> None:
    """To start a thread takes as long as to copy some megabytes."""
    source = data(8 * STEP)
    copier.copy(np.empty(STEP, np.uint8), source[:STEP])
    assert copier._threads is None
    copier.copy(np.empty_like(source), source)
    assert copier._threads is not None


@several
def test_a_copy_does_not_wait_for_busy_helpers(copier: Copier) -> None:
    """The calling thread then copies everything itself."""
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
def test_an_interrupted_copy_ends_after_its_helpers(copier: Copier, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as the call has ended, its target may be reused."""
    has_begun, over = threading.Event(), []

    def copyto(*_: np.ndarray) -> None:
        if threading.current_thread() is threading.main_thread():
            assert has_begun.wait(10)
            raise KeyboardInterrupt
        has_begun.set()
        time.sleep(0.2)
        over.append(True)

    monkeypatch.setattr(copying.np, "copyto", copyto)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(KeyboardInterrupt):
        copier.copy(np.empty(8 * STEP, np.uint8), np.empty(8 * STEP, np.uint8))
    assert over == [True]


@several
def test_a_helper_keeps_the_target_alive_if_the_wait_for_it_is_interrupted(
    copier: Copier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call ends before the helper then, so the helper itself must keep the target from being reused."""
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
        """Stands for the target of the copy."""

    monkeypatch.setattr(copying.np, "copyto", copyto)
    monkeypatch.setattr(copying._Steps, "wait", interrupted)
    place = Place()
    seen = weakref.ref(place)
    with pytest.raises(KeyboardInterrupt):
        copier.copy(np.empty(8 * STEP, np.uint8), np.empty(8 * STEP, np.uint8), lambda: seen())
    del place
    assert seen() is not None
    go_on.set()
    wait_until(lambda: seen() is None, "the helper has dropped the target")


def test_the_error_of_a_helper_is_raised_after_all_helpers_have_finished(
    copier: Copier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that was not copied must be reported, and the target not reused while a helper still copies."""
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
    monkeypatch.setattr(copying, "_MIN_PARALLEL_BYTES", 3 * STEP)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    with pytest.raises(MemoryError):
        copier.copy(np.empty(3 * STEP, np.uint8), np.empty(3 * STEP, np.uint8))
    assert over == [True]


def test_a_helper_is_waited_for_if_the_next_one_cannot_be_started(
    copier: Copier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process has reached its limit of threads after the first helper has begun."""
    has_begun, over, start = threading.Event(), [], threading.Thread.start

    def copyto(*_: np.ndarray) -> None:
        if threading.current_thread() is threading.main_thread():
            assert has_begun.wait(10)
            return
        has_begun.set()
        time.sleep(0.2)
        over.append(True)

    def start_one(thread: threading.Thread) -> None:
        if "_1" in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(copying.np, "copyto", copyto)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(threading.Thread, "start", start_one)
    copier.copy(np.empty(8 * STEP, np.uint8), np.empty(8 * STEP, np.uint8))
    assert over


def test_many_threads_copy_at_the_same_time(copier: Copier) -> None:
    """Concurrent copies with one copier do not mix up their data."""
    sources = [data(5 * STEP + n) for n in range(6)]
    targets = [np.empty_like(source) for source in sources]
    with ThreadPoolExecutor(len(sources)) as threads:
        list(threads.map(copier.copy, targets, sources))
    for source, target in zip(sources, targets, strict=True):
        np.testing.assert_array_equal(target, source)


def test_a_copy_is_made_while_the_interpreter_ends() -> None:
    """The interpreter may refuse to start threads then, so the calling thread copies everything itself."""
    lines = f"""
import atexit, numpy as np
from dask_shm_plugin.linux.copying import Copier
source = np.random.default_rng(0).integers(0, 256, {8 * STEP}, np.uint8)
target, copier = np.zeros_like(source), Copier()
atexit.register(lambda: (copier.copy(target, source), print(bool((target == source).all()))))
"""
    done = subprocess.run([sys.executable, "-c", lines], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")
