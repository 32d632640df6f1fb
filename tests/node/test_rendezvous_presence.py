"""A rendezvous that no process attends is a leftover, which the next process removes; no other is removed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from other_processes import Process, attended

from dask_shm_plugin.linux.processes import start_time
from dask_shm_plugin.linux.segment import Whereabouts
from dask_shm_plugin.node import rendezvous
from dask_shm_plugin.node.rendezvous import Listed, Meeting, Rendezvous, exists, purge

SHM = Path("/dev/shm")


class TestPresence:
    """Each listed process shows by a lock that it is alive."""

    def test_a_rendezvous_is_attended_until_the_last_process_is_gone(
        self, name: str, meet: Callable[..., Rendezvous], process: Callable[[], Process]
    ) -> None:
        """The presence of the asking process itself does not count."""
        others = [process() for _ in range(2)]
        for other in others:
            attended(other, name)
        meeting = meet()
        for other, end in zip(others, ("meeting.close()", "os.kill(os.getpid(), 9)"), strict=True):
            assert meeting.is_attended
            other.begin(end)
            other.is_killed()
        assert not meeting.is_attended
        meeting.attend()
        assert not meeting.is_attended

    def test_a_forked_child_does_not_attend_for_its_parent(
        self, name: str, meet: Callable[..., Rendezvous], process: Callable[[], Process]
    ) -> None:
        """No process can join through the child, and closing its inherited rendezvous does not affect the parent."""
        other = process()
        attended(other, name)
        child = other.fork()
        child("meeting.close()")
        meeting = meet()
        assert meeting.is_attended
        other.kill()
        assert not meeting.is_attended

    def test_whereabouts_name_only_live_processes(self, process: Callable[[], Process]) -> None:
        """A dead process is left out, and so is a later process with the same pid."""
        here = Listed(os.getpid(), start_time(os.getpid()), 3)
        other = process()
        dead = Listed(other.pid, start_time(other.pid), 4)
        assert dead.is_alive
        other.kill()
        later = here._replace(started=here.started + 1)
        assert [listed.is_alive for listed in (here, dead, later)] == [True, False, False]
        said = Meeting(bytes(16), 5, 6, (dead, here, later, Listed(2**22 + 1, 0, 5)))
        assert list(said.whereabouts()) == [Whereabouts(os.getpid(), 3, 5, 6)]


class TestPurging:
    """Leftovers of crashed processes are removed, and nothing else."""

    def test_purging_removes_names_that_no_process_attends(self, name: str, process: Callable[[], Process]) -> None:
        """These are a rendezvous, an empty one, and the name of a segment that its creator has not unlinked."""
        other = process()
        attended(other, name)
        other.kill()
        empty, segment = (SHM / f"{name[1:]}{end}" for end in ("-empty", "-segment-00"))
        for path in (empty, segment):
            path.touch(0o600)
        assert exists(name)
        purge()
        assert not exists(name)
        assert not empty.exists()
        assert not segment.exists()

    def test_an_attended_rendezvous_is_not_purged(self, name: str, process: Callable[[], Process]) -> None:
        """A rendezvous stays until its process is gone, even if a forked child of that process lives on."""
        other = process()
        attended(other, name)
        purge()
        assert exists(name)
        child = other.fork()
        purge()
        assert exists(name)
        other.kill()
        purge()
        assert not exists(name)
        assert child("1 + 1") == 2

    def test_a_rendezvous_that_is_being_changed_is_not_purged(self, name: str, process: Callable[[], Process]) -> None:
        """The process that has locked it is about to attend it."""
        other = process()
        other("meeting = rendezvous.enter(name, create=True)", name=name)
        purge()
        assert exists(name)

    def test_names_that_are_not_ours_are_not_purged(self, name: str, prefix: str) -> None:
        """They may be names of other users, files with other modes, or folders."""
        uid = os.getuid()
        foreign, open_to_all, folder = (SHM / f"{prefix}{end}" for end in (f"{uid + 1}-x", f"{uid}-x", f"{uid}-folder"))
        foreign.touch(0o600)
        open_to_all.touch()
        open_to_all.chmod(0o666)
        folder.mkdir()
        try:
            purge()
            assert foreign.exists()
            assert open_to_all.exists()
            assert folder.exists()
        finally:
            foreign.unlink()
            open_to_all.unlink()
            folder.rmdir()

    def test_a_rendezvous_that_was_replaced_during_the_wait_is_not_purged(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A process that waited to purge a removed rendezvous must not remove its successor."""
        (SHM / name[1:]).touch(0o600)
        real = rendezvous._open

        def open_and_replace(name: str, *, create: bool) -> int | None:
            fd = real(name, create=create)
            (SHM / name[1:]).unlink()
            (SHM / name[1:]).touch(0o600)
            return fd

        monkeypatch.setattr(rendezvous, "_open", open_and_replace)
        purge()
        assert exists(name)

    def test_purging_without_dev_shm_does_not_raise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without POSIX shared memory there is nothing to purge."""
        monkeypatch.setattr(rendezvous, "SHM_DIRECTORY", "/nowhere")
        purge()
