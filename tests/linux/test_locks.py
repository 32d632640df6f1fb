"""A lock that the kernel drops proves that a process is gone, and a mutex excludes live processes from each other."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from other_processes import Process

from dask_shm_plugin.exceptions import ArenaBusy, ArenaUnavailable
from dask_shm_plugin.linux import mutex as mutexes
from dask_shm_plugin.linux.locks import hold, is_held, let_go
from dask_shm_plugin.linux.mutex import Mutex
from dask_shm_plugin.linux.processes import start_time


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Return the name of a file to lock."""
    (tmp_path / "locked").touch()
    return str(tmp_path / "locked")


@pytest.fixture
def fd(path: str) -> Iterator[int]:
    """Open the file for this process."""
    number = os.open(path, os.O_RDWR)
    yield number
    os.close(number)


@pytest.fixture
def other(process: Callable[[], Process], path: str) -> Process:
    """Start a process that has the file open; its descriptor is called ``fd`` there, too."""
    started = process()
    started("fd = os.open(path, os.O_RDWR)", path=path)
    return started


class Clock:
    """A clock whose time passes only in ``sleep``."""

    def __init__(self) -> None:
        self._now = 0.0
        self.at_next_sleep: Callable[[], object] | None = None

    def monotonic(self) -> float:
        """Return the seconds slept so far."""
        return self._now

    def sleep(self, seconds: float) -> None:
        """Let time pass, and call ``at_next_sleep`` once, if it is set."""
        self._now += seconds
        if self.at_next_sleep is not None:
            self.at_next_sleep()
            self.at_next_sleep = None


class TestBeingAlive:
    """The lock of an open file description proves that a process is alive."""

    def test_a_byte_without_a_holder_is_free(self, fd: int, other: Process) -> None:
        """No byte is locked at first, as each process sees it."""
        assert not is_held(fd, 3)
        assert not other("locks.is_held(fd, 3)")

    def test_a_lock_is_visible_to_other_processes_only(self, fd: int, other: Process) -> None:
        """A query reports the locks of other open file descriptions, not the caller's own."""
        assert hold(fd, 3)
        assert other("locks.is_held(fd, 3)")
        assert not is_held(fd, 3)

    def test_a_byte_has_one_holder(self, fd: int, other: Process) -> None:
        """The second process is refused at once."""
        assert other("locks.hold(fd, 3)")
        assert not hold(fd, 3)

    def test_holding_twice_is_harmless(self, fd: int, other: Process) -> None:
        """The holder may take the lock again, and one release drops it."""
        assert hold(fd, 3)
        assert hold(fd, 3)
        let_go(fd, 3)
        assert other("locks.hold(fd, 3)")

    def test_bytes_are_independent(self, fd: int, other: Process) -> None:
        """Each byte is a lock of its own."""
        assert hold(fd, 3)
        assert not other("locks.is_held(fd, 2)")
        assert other("locks.hold(fd, 4)")

    def test_a_released_lock_can_be_taken_by_another_process(self, fd: int, other: Process) -> None:
        """A release drops the lock on that byte and no other."""
        assert hold(fd, 3)
        assert hold(fd, 4)
        let_go(fd, 3)
        assert other("locks.hold(fd, 3)")
        assert not other("locks.hold(fd, 4)")

    def test_a_shared_lock_has_many_holders_and_excludes_exclusive_ones(self, fd: int, other: Process) -> None:
        """All processes that are present at a rendezvous hold the same byte."""
        assert hold(fd, 3, shared=True)
        assert other("locks.hold(fd, 3, shared=True)")
        assert is_held(fd, 3)
        assert not other("locks.hold(fd, 3)")
        let_go(fd, 3)
        assert is_held(fd, 3)
        assert not other("locks.is_held(fd, 3)")

    def test_two_open_file_descriptions_in_one_process_exclude_each_other(self, fd: int, path: str) -> None:
        """The lock belongs to the open file description, not to the process."""
        second = os.open(path, os.O_RDWR)
        try:
            assert hold(fd, 3)
            assert not hold(second, 3)
            assert is_held(second, 3)
        finally:
            os.close(second)

    def test_closing_another_descriptor_of_the_file_does_not_drop_the_lock(
        self, fd: int, path: str, other: Process
    ) -> None:
        """In this respect it differs from a record lock."""
        assert hold(fd, 3)
        os.close(os.open(path, os.O_RDWR))
        assert other("locks.is_held(fd, 3)")

    def test_a_lock_does_not_change_the_size_of_the_file(self, fd: int) -> None:
        """The locked bytes lie behind the end of the file, where there is no data."""
        assert hold(fd, 255)
        assert os.fstat(fd).st_size == 0

    def test_the_lock_is_dropped_when_its_process_is_killed(self, fd: int, other: Process) -> None:
        """The kernel drops the lock when the last reference to the open file description is gone."""
        assert other("locks.hold(fd, 3)")
        assert is_held(fd, 3)
        other.kill()
        assert not is_held(fd, 3)
        assert hold(fd, 3)

    def test_the_lock_lasts_while_a_forked_child_lives(self, fd: int, other: Process) -> None:
        """A child has inherited its parent's views, so the parent counts as alive until both are gone."""
        assert other("locks.hold(fd, 3)")
        child = other.fork()
        other.kill()
        assert is_held(fd, 3)
        child.kill()
        assert not is_held(fd, 3)

    def test_the_lock_lasts_while_a_mapping_in_a_forked_child_lives(self, fd: int, other: Process) -> None:
        """The child may read its view even after it has closed the descriptor."""
        os.ftruncate(fd, 4096)
        assert other("locks.hold(fd, 3)")
        other("address = syscalls.map_private(fd, 0, 4096)")
        child = other.fork()
        child("os.close(fd)")
        other.kill()
        assert is_held(fd, 3)
        child("syscalls.unmap(address, 4096)")
        assert not is_held(fd, 3)

    def test_a_file_that_cannot_be_locked_raises(self, tmp_path: Path) -> None:
        """Only a lock of another holder makes the answer False; each other failure is an error."""
        reading = os.open(tmp_path, os.O_RDONLY)
        try:
            with pytest.raises(OSError, match="Bad file descriptor"):
                hold(reading, 3)
        finally:
            os.close(reading)


class TestStartTime:
    """The start time distinguishes a process from a later one with the same pid."""

    def test_the_start_time_stays_the_same_while_a_process_lives(self, process: Callable[[], Process]) -> None:
        """The process itself and other processes read the same number."""
        other = process()
        assert start_time(other.pid) == start_time(other.pid) == other("processes.start_time(os.getpid())") > 0

    def test_the_start_time_of_a_dead_process_is_zero(self, process: Callable[[], Process]) -> None:
        """There is no process with this pid any more."""
        other = process()
        other.kill()
        assert start_time(other.pid) == 0

    def test_the_name_of_a_program_does_not_affect_its_start_time(self, process: Callable[[], Process]) -> None:
        """The name is part of the parsed line, and may look like the rest of it."""
        other = process()
        before = start_time(other.pid)
        other("open('/proc/self/comm', 'w').write(') R 1 (9 9')")
        assert ") R 1 (9 9" in Path(f"/proc/{other.pid}/stat").read_text()
        assert start_time(other.pid) == before


def do_nothing() -> None:
    """Do nothing, while the caller holds the mutex."""


class TestMutex:
    """The mutex excludes all threads of all processes from each other."""

    def test_the_mutex_is_free_after_an_exception(self, fd: int) -> None:
        """The mutex is released even if the function raises."""
        mutex = Mutex(fd)
        with pytest.raises(KeyError):
            mutex.run({}.popitem)
        mutex.run(do_nothing)

    def test_the_mutex_excludes_the_threads_of_a_process(self, fd: int) -> None:
        """No two threads ever hold it at the same time."""
        mutex, inside, crowds = Mutex(fd, patience=30), [], set()

        def crowd() -> None:
            inside.append(None)
            os.sched_yield()
            crowds.add(len(inside))
            inside.pop()

        def work() -> None:
            for _ in range(100):
                mutex.run(crowd)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert crowds == {1}

    def test_the_mutex_excludes_processes(self, fd: int, path: str, process: Callable[[], Process]) -> None:
        """Four processes increment a number in the file at the same time, and no increment is lost."""
        os.pwrite(fd, bytes(8), 0)
        others = [process() for _ in range(4)]
        for other in others:
            other("fd = os.open(path, os.O_RDWR)", path=path)
        for other in others:
            other.begin("""
                mutex = Mutex(fd, patience=30)
                def increment():
                    number = int.from_bytes(os.pread(fd, 8, 0), "little")
                    os.pwrite(fd, (number + 1).to_bytes(8, "little"), 0)
                for _ in range(300):
                    mutex.run(increment)
                """)
        for other in others:
            other.end()
        assert int.from_bytes(os.pread(fd, 8, 0), "little") == 1200

    def test_the_wait_for_another_process_is_bounded(self, fd: int, other: Process) -> None:
        """The mutex is usable again as soon as the other process has released it."""
        other("mutex = Mutex(fd); enter(mutex)")
        mutex = Mutex(fd, patience=0.01)
        with pytest.raises(ArenaBusy, match="another process"):
            mutex.run(do_nothing)
        other("leave(mutex)")
        mutex.run(do_nothing)

    def test_after_a_timeout_the_next_wait_is_short(
        self, fd: int, other: Process, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A stopped process delays others only once; after the lock was free, the full timeout applies again."""
        clock = Clock()
        monkeypatch.setattr(mutexes, "time", clock)
        other("mutex = Mutex(fd); enter(mutex)")
        mutex, waited = Mutex(fd, patience=10), []
        for _ in range(3):
            before = clock.monotonic()
            with pytest.raises(ArenaBusy):
                mutex.run(do_nothing)
            waited.append(clock.monotonic() - before)
        assert waited[0] >= 10
        assert max(waited[1:]) < 0.01
        other("leave(mutex)")
        mutex.run(do_nothing)
        other("enter(mutex)")
        before = clock.monotonic()
        with pytest.raises(ArenaBusy):
            mutex.run(do_nothing)
        assert clock.monotonic() - before >= 10

    def test_after_a_timeout_a_short_wait_still_gets_a_lock_that_is_released(
        self, fd: int, other: Process, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A lock that is held at this moment may be held by a process at work, not by a stopped one."""
        monkeypatch.setattr(mutexes, "time", clock := Clock())
        other("mutex = Mutex(fd); enter(mutex)")
        mutex = Mutex(fd)
        with pytest.raises(ArenaBusy):
            mutex.run(do_nothing)
        clock.at_next_sleep = lambda: other("leave(mutex)")
        mutex.run(do_nothing)

    def test_the_wait_for_another_thread_is_bounded(self, fd: int) -> None:
        """The waiting thread gets the same error as for another process."""
        mutex, caught = Mutex(fd, patience=0.01), []

        def enter() -> None:
            try:
                mutex.run(do_nothing)
            except ArenaBusy as error:
                caught.append(error)

        def let_enter() -> None:
            thread = threading.Thread(target=enter)
            thread.start()
            thread.join()

        mutex.run(let_enter)
        assert len(caught) == 1

    def test_code_that_interrupts_the_thread_that_holds_the_mutex_is_refused(self, fd: int) -> None:
        """A signal handler or finalizer runs in that same thread, and would wait for itself."""
        mutex = Mutex(fd, patience=60)

        def interrupt() -> None:
            with mutex.among_threads, pytest.raises(ArenaBusy):
                mutex.run(do_nothing)

        mutex.run(interrupt)
        with mutex.among_threads:
            interrupt()
        mutex.run(do_nothing)

    def test_the_mutex_is_dropped_with_its_holder_even_while_a_forked_child_lives(
        self, fd: int, other: Process
    ) -> None:
        """A death of the holder must not lock the table for as long as its child runs."""
        other("mutex = Mutex(fd); enter(mutex)")
        child = other.fork()
        mutex = Mutex(fd, patience=0.01)
        with pytest.raises(ArenaBusy):
            mutex.run(do_nothing)
        other.kill()
        assert child("1 + 1") == 2
        mutex.run(do_nothing)

    def test_a_forked_child_cannot_take_its_parents_mutex(self, other: Process) -> None:
        """A child is not a member of its parent's arena."""
        other("mutex = Mutex(fd)")
        child = other.fork()
        with pytest.raises(ArenaUnavailable, match="forked"):
            child("mutex.run(dict)")
        other("mutex.run(dict)")

    def test_a_forked_child_is_refused_even_if_its_parent_held_the_mutex(self, other: Process) -> None:
        """The child must not wait for its copy of the thread lock, which no thread would ever release."""
        other("mutex = Mutex(fd, patience=60); enter(mutex)")
        with pytest.raises(ArenaUnavailable, match="forked"):
            other.fork()("mutex.run(dict)")

    def test_a_retired_mutex_cannot_be_taken(self, fd: int, other: Process) -> None:
        """After a process has left, the number of the descriptor may be that of another file."""
        mutex = Mutex(fd)
        # The kernel drops a record lock when any descriptor of its file is closed.
        mutex.run(lambda: mutex.retire(lambda: os.close(os.dup(fd))))
        assert mutex.retired
        for _ in range(2):
            with pytest.raises(ArenaUnavailable, match="left"):
                mutex.run(do_nothing)
        other("mutex = Mutex(fd, patience=0.01); enter(mutex)")

    def test_a_bad_descriptor_raises_at_once(self) -> None:
        """Waiting would not help; the thread lock is released, so that the second call gets the same error."""
        mutex = Mutex(10**6, patience=60)
        for _ in range(2):
            with pytest.raises(ArenaUnavailable, match="cannot be locked"):
                mutex.run(do_nothing)
