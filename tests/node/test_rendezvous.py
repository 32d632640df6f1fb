"""Members find each other in a rendezvous, a small named file that is removed if no process attends it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from other_processes import MEETING, Process, attended

from dask_shm_plugin.exceptions import ArenaBusy, ArenaUnavailable
from dask_shm_plugin.node import rendezvous
from dask_shm_plugin.node.rendezvous import Listed, Rendezvous, enter, exists, name_for
from dask_shm_plugin.table.layout import MEMBERS

SHM = Path("/dev/shm")


class TestNames:
    """The name of a rendezvous separates processes that cannot share memory."""

    def test_a_cluster_has_one_name_on_a_node(self, process: Callable[[], Process], prefix: str) -> None:
        """Each process computes the same name, and another cluster has another name."""
        assert name_for("a") == name_for("a") == process()("rendezvous.name_for('a')") != name_for("b")
        assert name_for("a").startswith(f"/{prefix}{os.getuid()}-")

    def test_another_user_has_another_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Users of one node do not share a rendezvous."""
        ours = name_for("a")
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        assert name_for("a") != ours
        assert "-12345-" in name_for("a")

    def test_another_pid_namespace_has_another_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Pids of another namespace are not valid here, although ``/dev/shm`` may be the same."""
        ours, real = name_for("a"), os.stat

        def elsewhere(path: object, **options: object) -> object:
            status = real(path, **options)
            is_namespace = str(path).endswith("ns/pid")
            return os.stat_result((status.st_mode, status.st_ino + 1, *status[2:])) if is_namespace else status

        monkeypatch.setattr(os, "stat", elsewhere)
        assert name_for("a") != ours

    def test_without_proc_a_name_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without ``/proc``, no process could be found through the rendezvous."""

        def refuse(path: object, **_: object) -> None:
            raise FileNotFoundError(errno.ENOENT, "no /proc", path)

        monkeypatch.setattr(os, "stat", refuse)
        with pytest.raises(ArenaUnavailable, match="/proc"):
            name_for("a")
        monkeypatch.undo()


class TestEntering:
    """Only one process at a time may change a rendezvous."""

    def test_entering_creates_a_rendezvous_only_if_asked_to(self, name: str, meet: Callable[..., Rendezvous]) -> None:
        """A new rendezvous has at most 16 KiB, only its user can open it, and it is empty."""
        assert enter(name, create=False) is None
        assert not exists(name)
        meeting = meet()
        assert exists(name)
        assert meeting.read() is None
        status = (SHM / name[1:]).stat()
        assert status.st_mode & 0o777 == 0o600
        meeting.write(MEETING)
        assert (SHM / name[1:]).stat().st_size <= 16384
        assert name in repr(meeting)

    def test_the_content_that_one_process_writes_is_read_by_another(
        self, name: str, meet: Callable[..., Rendezvous], process: Callable[[], Process]
    ) -> None:
        """The new content may be shorter than the old."""
        other = process()
        for said in (MEETING, MEETING._replace(listed=MEETING.listed[1:]), MEETING._replace(listed=())):
            meeting = meet()
            meeting.write(said)
            meeting.close()
            other("meeting = rendezvous.enter(name, create=False)", name=name)
            assert other("meeting.read()") == said
            other("meeting.close()")

    def test_a_rendezvous_has_room_for_all_members(self, meet: Callable[..., Rendezvous]) -> None:
        """A rendezvous can list as many processes as the table has slots."""
        said = MEETING._replace(listed=tuple(Listed(2**40 + n, 2**50 + n, n) for n in range(MEMBERS)))
        meeting = meet()
        meeting.write(said)
        assert meeting.read() == said

    def test_only_one_process_can_lock_a_rendezvous(
        self,
        name: str,
        meet: Callable[..., Rendezvous],
        process: Callable[[], Process],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The wait for the lock is bounded, and the lock is free when its holder unlocks or dies."""
        monkeypatch.setattr(rendezvous, "_LOCK_TIMEOUT_S", 0.01)
        other = process()
        other("meeting = rendezvous.enter(name, create=True)", name=name)
        with pytest.raises(ArenaBusy, match="locked"):
            enter(name, create=True)
        other("meeting.unlock()")
        meet().close()
        other("meeting.close(); meeting = rendezvous.enter(name, create=True)")
        other.kill()
        meet()

    def test_a_process_that_waited_for_a_removed_rendezvous_starts_again(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its lock is of no use, because the name leads to another file or to none by now."""
        real, opened = rendezvous._open, []

        def open_and_lose(name: str, *, create: bool) -> int | None:
            fd = real(name, create=create)
            opened.append(fd)
            if len(opened) <= 2:
                (SHM / name[1:]).unlink()
            if len(opened) == 2:
                (SHM / name[1:]).touch(0o600)
            return fd

        monkeypatch.setattr(rendezvous, "_open", open_and_lose)
        meeting = enter(name, create=True)
        assert len(opened) == 3
        meeting.write(MEETING)
        assert (SHM / name[1:]).read_bytes()[16:32] == MEETING.arena_id
        meeting.close()

    def test_a_rendezvous_that_is_removed_during_the_wait_is_not_found(
        self, name: str, meet: Callable[..., Rendezvous], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A process that must not create a rendezvous gets None."""
        meet().unlock()
        real = rendezvous._open

        def open_and_lose(name: str, *, create: bool) -> int | None:
            fd = real(name, create=create)
            (SHM / name[1:]).unlink(missing_ok=True)
            return fd

        monkeypatch.setattr(rendezvous, "_open", open_and_lose)
        assert enter(name, create=False) is None

    @pytest.mark.parametrize("mode", [0o644, 0o660, 0o606, 0o777])
    def test_a_rendezvous_that_other_users_may_open_is_refused(self, name: str, mode: int) -> None:
        """Another user could write to it; it is not removed, because its owner is not known."""
        path = SHM / name[1:]
        path.touch()
        path.chmod(mode)
        for create in (True, False):
            with pytest.raises(ArenaUnavailable, match="remove it"):
                enter(name, create=create)
        assert path.exists()

    def test_a_rendezvous_of_another_user_is_refused(
        self, name: str, meet: Callable[..., Rendezvous], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Such a rendezvous is refused even if the kernel would permit access."""
        meet().close()
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(ArenaUnavailable, match="not this user's own"):
            enter(name, create=True)

    @pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/etc/passwd")])
    def test_a_rendezvous_that_is_no_regular_file_is_refused(self, name: str, make: Callable[[Path], None]) -> None:
        """The name may be that of a folder, a FIFO or a symbolic link."""
        path = SHM / name[1:]
        make(path)
        try:
            with pytest.raises(ArenaUnavailable):
                enter(name, create=True)
        finally:
            path.rmdir() if path.is_dir() else path.unlink()

    @pytest.mark.parametrize("at", [0, 12])
    def test_a_rendezvous_of_another_version_is_refused(
        self, name: str, meet: Callable[..., Rendezvous], at: int
    ) -> None:
        """Another version may use another format."""
        meeting = meet()
        meeting.write(MEETING)
        with (SHM / name[1:]).open("r+b") as file:
            file.seek(at)
            file.write(b"X")
        with pytest.raises(ArenaUnavailable, match="version"):
            meeting.read()

    def test_an_incomplete_rendezvous_counts_as_empty(self, name: str, meet: Callable[..., Rendezvous]) -> None:
        """Its writer may have been killed while it wrote."""
        (SHM / name[1:]).write_bytes(b"dask-shm rdv and no more")
        (SHM / name[1:]).chmod(0o600)
        assert meet().read() is None

    def test_a_started_program_does_not_inherit_the_descriptor(self, process: Callable[[], Process], name: str) -> None:
        """Otherwise the program would attend the rendezvous for as long as it runs."""
        other = process()
        attended(other, name)
        other("""
            numbers = [int(entry.name) for entry in os.scandir("/proc/self/fd") if entry.is_file()]
            inherited = [os.get_inheritable(n) for n in numbers if name in os.readlink(f"/proc/self/fd/{n}")]
            """)
        assert other("inherited") == [False]
