"""A rendezvous that nobody attends is a leftover: it is removed by the next who comes, and no other ever is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from other_processes import Process, attended

from dask_shm_plugin import rendezvous
from dask_shm_plugin.liveness import start_time
from dask_shm_plugin.rendezvous import Listed, Meeting, Rendezvous, exists, purge
from dask_shm_plugin.segment import Whereabouts

SHM = Path("/dev/shm")


class TestPresence:
    """Whoever is listed shows that it lives."""

    def test_one_is_attended_as_long_as_anyone_is_present(
        self, name: str, meet: Callable[..., Rendezvous], process: Callable[[], Process]
    ) -> None:
        """One's own presence does not count; the last to go makes the difference."""
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

    def test_a_forked_child_is_not_present_for_its_parent(
        self, name: str, meet: Callable[..., Rendezvous], process: Callable[[], Process]
    ) -> None:
        """Nobody can join through it. What it does with what it has inherited changes nothing for its parent."""
        other = process()
        attended(other, name)
        child = other.fork()
        child("meeting.close()")
        meeting = meet()
        assert meeting.is_attended
        other.kill()
        assert not meeting.is_attended

    def test_only_the_living_can_help(self, process: Callable[[], Process]) -> None:
        """Neither the dead, nor who has got their number since."""
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
    """What crashed processes have left is removed, and nothing else."""

    def test_what_nobody_attends_is_removed(self, name: str, process: Callable[[], Process]) -> None:
        """A rendezvous, an empty one, and the name of a segment that was caught between making and unlinking."""
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

    def test_what_is_attended_stays(self, name: str, process: Callable[[], Process]) -> None:
        """Until the process itself is gone, whether a forked child of it lives or not."""
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

    def test_what_is_being_changed_stays(self, name: str, process: Callable[[], Process]) -> None:
        """Somebody is about to attend it."""
        other = process()
        other("meeting = rendezvous.enter(name, create=True)", name=name)
        purge()
        assert exists(name)

    def test_what_is_not_ours_stays(self, name: str, prefix: str) -> None:
        """Others may have put anything there: names of other users, modes that we do not make, folders."""
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

    def test_one_that_was_made_anew_meanwhile_stays(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A purger that waited for a removed one must not remove its successor."""
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

    def test_no_posix_shared_memory_is_nothing_to_purge(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It never raises."""
        monkeypatch.setattr(rendezvous, "SHM_DIRECTORY", "/nowhere")
        purge()
