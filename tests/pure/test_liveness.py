"""A lock that the kernel drops proves that a process is gone, and excludes the living from each other."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from other_processes import Process

from dask_shm_plugin import liveness
from dask_shm_plugin.exceptions import ArenaBusy, ArenaUnavailable
from dask_shm_plugin.liveness import Mutex, hold, is_held, let_go, start_time


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
    """Start a process that has the file open, under the same name."""
    started = process()
    started("fd = os.open(path, os.O_RDWR)", path=path)
    return started


class Clock:
    """A time that passes only in sleep."""

    def __init__(self) -> None:
        self._now = 0.0
        self.at_next_sleep: Callable[[], object] | None = None

    def monotonic(self) -> float:
        """Return the seconds slept so far."""
        return self._now

    def sleep(self, seconds: float) -> None:
        """Let time pass, and do once what is to be done meanwhile."""
        self._now += seconds
        if self.at_next_sleep is not None:
            self.at_next_sleep()
            self.at_next_sleep = None


class TestBeingAlive:
    """The lock of an open file description."""

    def test_a_byte_that_nobody_holds_is_free(self, fd: int, other: Process) -> None:
        """Nothing is held at first, as all sides see it."""
        assert not is_held(fd, 3)
        assert not other("liveness.is_held(fd, 3)")

    def test_others_see_what_is_held_and_its_holder_does_not(self, fd: int, other: Process) -> None:
        """A process sees the locks of others, not its own."""
        assert hold(fd, 3)
        assert other("liveness.is_held(fd, 3)")
        assert not is_held(fd, 3)

    def test_a_byte_has_one_holder(self, fd: int, other: Process) -> None:
        """Whoever comes second is told so."""
        assert other("liveness.hold(fd, 3)")
        assert not hold(fd, 3)

    def test_holding_twice_is_harmless(self, fd: int, other: Process) -> None:
        """The holder may ask again, and lets go once."""
        assert hold(fd, 3)
        assert hold(fd, 3)
        let_go(fd, 3)
        assert other("liveness.hold(fd, 3)")

    def test_bytes_are_independent(self, fd: int, other: Process) -> None:
        """Each byte is a lock of its own."""
        assert hold(fd, 3)
        assert not other("liveness.is_held(fd, 2)")
        assert other("liveness.hold(fd, 4)")

    def test_what_is_let_go_can_be_held_by_another(self, fd: int, other: Process) -> None:
        """Letting go frees that byte and no other."""
        assert hold(fd, 3)
        assert hold(fd, 4)
        let_go(fd, 3)
        assert other("liveness.hold(fd, 3)")
        assert not other("liveness.hold(fd, 4)")

    def test_a_shared_lock_has_many_holders_and_keeps_others_out(self, fd: int, other: Process) -> None:
        """All who are present hold one byte together."""
        assert hold(fd, 3, shared=True)
        assert other("liveness.hold(fd, 3, shared=True)")
        assert is_held(fd, 3)
        assert not other("liveness.hold(fd, 3)")
        let_go(fd, 3)
        assert is_held(fd, 3)
        assert not other("liveness.is_held(fd, 3)")

    def test_two_descriptions_in_one_process_exclude_each_other(self, fd: int, path: str) -> None:
        """The lock belongs to the open file, not to the process."""
        second = os.open(path, os.O_RDWR)
        try:
            assert hold(fd, 3)
            assert not hold(second, 3)
            assert is_held(second, 3)
        finally:
            os.close(second)

    def test_closing_another_descriptor_of_the_file_drops_nothing(self, fd: int, path: str, other: Process) -> None:
        """In this it differs from a record lock."""
        assert hold(fd, 3)
        os.close(os.open(path, os.O_RDWR))
        assert other("liveness.is_held(fd, 3)")

    def test_the_file_does_not_grow(self, fd: int) -> None:
        """The locked bytes lie behind the end of the file, where no data is."""
        assert hold(fd, 255)
        assert os.fstat(fd).st_size == 0

    def test_it_falls_with_the_process(self, fd: int, other: Process) -> None:
        """SIGKILL drops it."""
        assert other("liveness.hold(fd, 3)")
        assert is_held(fd, 3)
        other.kill()
        assert not is_held(fd, 3)
        assert hold(fd, 3)

    def test_it_lasts_while_a_forked_child_lives(self, fd: int, other: Process) -> None:
        """A child has inherited its parent's views, so the parent counts as alive until both are gone."""
        assert other("liveness.hold(fd, 3)")
        child = other.fork()
        other.kill()
        assert is_held(fd, 3)
        child.kill()
        assert not is_held(fd, 3)

    def test_it_lasts_while_a_mapping_of_the_dead_lives(self, fd: int, other: Process) -> None:
        """A view in a forked child keeps the lock even when the child has closed the descriptor."""
        os.ftruncate(fd, 4096)
        assert other("liveness.hold(fd, 3)")
        other("address = syscalls.map_private(fd, 0, 4096)")
        child = other.fork()
        child("os.close(fd)")
        other.kill()
        assert is_held(fd, 3)
        child("syscalls.unmap(address, 4096)")
        assert not is_held(fd, 3)

    def test_what_cannot_be_locked_raises(self, tmp_path: Path) -> None:
        """Only "somebody has it" is an answer; anything else is an error."""
        reading = os.open(tmp_path, os.O_RDONLY)
        try:
            with pytest.raises(OSError, match="Bad file descriptor"):
                hold(reading, 3)
        finally:
            os.close(reading)


class TestStartTime:
    """When a process started tells it from a later one of the same number."""

    def test_it_stays_the_same_while_a_process_lives(self, process: Callable[[], Process]) -> None:
        """The process itself and others see the same number."""
        other = process()
        assert start_time(other.pid) == start_time(other.pid) == other("liveness.start_time(os.getpid())") > 0

    def test_it_is_zero_for_the_dead(self, process: Callable[[], Process]) -> None:
        """There is no such process any more."""
        other = process()
        other.kill()
        assert start_time(other.pid) == 0

    def test_a_program_may_have_any_name(self, process: Callable[[], Process]) -> None:
        """The name may look like the rest of the line."""
        other = process()
        before = start_time(other.pid)
        other("open('/proc/self/comm', 'w').write(') R 1 (9 9')")
        assert ") R 1 (9 9" in Path(f"/proc/{other.pid}/stat").read_text()
        assert start_time(other.pid) == before


def nothing() -> None:
    """Do nothing inside."""


class TestMutex:
    """Exclusion among all threads of all processes."""

    def test_it_can_be_entered_again_after_it_was_left(self, fd: int) -> None:
        """Leaving gives it back, also when an exception is on its way."""
        mutex = Mutex(fd)
        with pytest.raises(KeyError):
            mutex.run({}.popitem)
        mutex.run(nothing)

    def test_it_excludes_the_threads_of_a_process(self, fd: int) -> None:
        """No two threads are ever inside at once."""
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

    def test_it_excludes_processes(self, fd: int, path: str, process: Callable[[], Process]) -> None:
        """Four processes increment a number in the file at the same time; not one increment is lost."""
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

    def test_waiting_for_another_process_ends(self, fd: int, other: Process) -> None:
        """Patience is bounded, and the mutex is usable again as soon as the other has left."""
        other("mutex = Mutex(fd); enter(mutex)")
        mutex = Mutex(fd, patience=0.01)
        with pytest.raises(ArenaBusy, match="another process"):
            mutex.run(nothing)
        other("leave(mutex)")
        mutex.run(nothing)

    def test_whoever_waited_in_vain_hardly_waits_again(
        self, fd: int, other: Process, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A stopped process stops each other one once; after the lock was free once, waiting is worth while again."""
        clock = Clock()
        monkeypatch.setattr(liveness, "time", clock)
        other("mutex = Mutex(fd); enter(mutex)")
        mutex, waited = Mutex(fd, patience=10), []
        for _ in range(3):
            before = clock.monotonic()
            with pytest.raises(ArenaBusy):
                mutex.run(nothing)
            waited.append(clock.monotonic() - before)
        assert waited[0] >= 10
        assert max(waited[1:]) < 0.01
        other("leave(mutex)")
        mutex.run(nothing)
        other("enter(mutex)")
        before = clock.monotonic()
        with pytest.raises(ArenaBusy):
            mutex.run(nothing)
        assert clock.monotonic() - before >= 10

    def test_whoever_waited_in_vain_gets_in_between_those_who_are_at_work(
        self, fd: int, other: Process, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """That the lock is taken at the very moment does not mean that nobody will ever leave."""
        monkeypatch.setattr(liveness, "time", clock := Clock())
        other("mutex = Mutex(fd); enter(mutex)")
        mutex = Mutex(fd)
        with pytest.raises(ArenaBusy):
            mutex.run(nothing)
        clock.at_next_sleep = lambda: other("leave(mutex)")
        mutex.run(nothing)

    def test_waiting_for_another_thread_ends(self, fd: int) -> None:
        """A thread that cannot enter is told so too."""
        mutex, caught = Mutex(fd, patience=0.01), []

        def enter() -> None:
            try:
                mutex.run(nothing)
            except ArenaBusy as error:
                caught.append(error)

        def let_enter() -> None:
            thread = threading.Thread(target=enter)
            thread.start()
            thread.join()

        mutex.run(let_enter)
        assert len(caught) == 1

    def test_who_interrupts_a_thread_that_is_inside_is_refused(self, fd: int) -> None:
        """It is that very thread, in a signal handler or a finalizer; but the other threads are excluded for it already."""
        mutex = Mutex(fd, patience=60)

        def interrupt() -> None:
            with mutex.among_threads, pytest.raises(ArenaBusy):
                mutex.run(nothing)

        mutex.run(interrupt)
        with mutex.among_threads:
            interrupt()
        mutex.run(nothing)

    def test_it_falls_with_its_holder_even_while_a_forked_child_lives(self, fd: int, other: Process) -> None:
        """A death inside must not lock the table for as long as some child runs."""
        other("mutex = Mutex(fd); enter(mutex)")
        child = other.fork()
        mutex = Mutex(fd, patience=0.01)
        with pytest.raises(ArenaBusy):
            mutex.run(nothing)
        other.kill()
        assert child("1 + 1") == 2
        mutex.run(nothing)

    def test_a_forked_child_may_not_enter_its_parents(self, other: Process) -> None:
        """The parent's membership is not the child's."""
        other("mutex = Mutex(fd)")
        child = other.fork()
        with pytest.raises(ArenaUnavailable, match="forked"):
            child("mutex.run(dict)")
        other("mutex.run(dict)")

    def test_a_forked_child_is_refused_even_when_its_parent_was_inside(self, other: Process) -> None:
        """The child does not wait for a lock of which its copy will never be opened."""
        other("mutex = Mutex(fd, patience=60); enter(mutex)")
        with pytest.raises(ArenaUnavailable, match="forked"):
            other.fork()("mutex.run(dict)")

    def test_a_retired_one_cannot_be_entered(self, fd: int, other: Process) -> None:
        """After a process has left, the number of the descriptor may mean anything."""
        mutex = Mutex(fd)
        # Closing any descriptor drops the lock.
        mutex.run(lambda: mutex.retire(lambda: os.close(os.dup(fd))))
        assert mutex.retired
        for _ in range(2):
            with pytest.raises(ArenaUnavailable, match="left"):
                mutex.run(nothing)
        other("mutex = Mutex(fd, patience=0.01); enter(mutex)")

    def test_a_bad_descriptor_is_no_reason_to_wait(self) -> None:
        """What waiting cannot cure is said at once, and the threads' part is given back."""
        mutex = Mutex(10**6, patience=60)
        for _ in range(2):
            with pytest.raises(ArenaUnavailable, match="cannot be locked"):
                mutex.run(nothing)
