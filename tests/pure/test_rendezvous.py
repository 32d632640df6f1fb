"""Where members find each other: a little named memory that anyone may remove when nobody attends it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from other_processes import MEETING, Process, attended

from dask_shm_plugin import rendezvous
from dask_shm_plugin.exceptions import ArenaBusy, ArenaUnavailable
from dask_shm_plugin.layout import MEMBERS
from dask_shm_plugin.rendezvous import Listed, Rendezvous, enter, exists, name_for

SHM = Path("/dev/shm")


class TestNames:
    """A name tells apart what must not meet."""

    def test_a_cluster_has_one_name_on_a_node(self, process: Callable[[], Process], prefix: str) -> None:
        """The same in each process, and no other cluster's."""
        assert name_for("a") == name_for("a") == process()("rendezvous.name_for('a')") != name_for("b")
        assert name_for("a").startswith(f"/{prefix}{os.getuid()}-")

    def test_another_user_has_another_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Users of one node do not get in each other's way."""
        ours = name_for("a")
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        assert name_for("a") != ours
        assert "-12345-" in name_for("a")

    def test_another_pid_namespace_has_another_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The numbers of its processes mean nothing here, though ``/dev/shm`` may be the same."""
        ours, real = name_for("a"), os.stat

        def elsewhere(path: object, **options: object) -> object:
            status = real(path, **options)
            is_namespace = str(path).endswith("ns/pid")
            return os.stat_result((status.st_mode, status.st_ino + 1, *status[2:])) if is_namespace else status

        monkeypatch.setattr(os, "stat", elsewhere)
        assert name_for("a") != ours

    def test_without_proc_there_is_no_arena(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody could be found."""

        def refuse(path: object, **_: object) -> None:
            raise FileNotFoundError(errno.ENOENT, "no /proc", path)

        monkeypatch.setattr(os, "stat", refuse)
        with pytest.raises(ArenaUnavailable, match="/proc"):
            name_for("a")
        monkeypatch.undo()


class TestEntering:
    """One process at a time may change it."""

    def test_it_is_made_when_that_is_wanted(self, name: str, meet: Callable[..., Rendezvous]) -> None:
        """A few KiB at most, for its user only, and empty at first."""
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

    def test_what_one_writes_another_reads(
        self, name: str, meet: Callable[..., Rendezvous], process: Callable[[], Process]
    ) -> None:
        """Also when less is said than before."""
        other = process()
        for said in (MEETING, MEETING._replace(listed=MEETING.listed[1:]), MEETING._replace(listed=())):
            meeting = meet()
            meeting.write(said)
            meeting.close()
            other("meeting = rendezvous.enter(name, create=False)", name=name)
            assert other("meeting.read()") == said
            other("meeting.close()")

    def test_it_has_room_for_all_members(self, meet: Callable[..., Rendezvous]) -> None:
        """As many as the table has."""
        said = MEETING._replace(listed=tuple(Listed(2**40 + n, 2**50 + n, n) for n in range(MEMBERS)))
        meeting = meet()
        meeting.write(said)
        assert meeting.read() == said

    def test_only_one_is_inside(
        self,
        name: str,
        meet: Callable[..., Rendezvous],
        process: Callable[[], Process],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Waiting for it ends; when the other is done, or dead, it is free."""
        monkeypatch.setattr(rendezvous, "_PATIENCE", 0.01)
        other = process()
        other("meeting = rendezvous.enter(name, create=True)", name=name)
        with pytest.raises(ArenaBusy, match="locked"):
            enter(name, create=True)
        other("meeting.unlock()")
        meet().close()
        other("meeting.close(); meeting = rendezvous.enter(name, create=True)")
        other.kill()
        meet()

    def test_whoever_waited_for_a_removed_one_begins_anew(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its lock is worth nothing: by now the name means another file, or none."""
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

    def test_one_that_is_removed_while_one_waits_is_none_unless_it_is_to_be_made(
        self, name: str, meet: Callable[..., Rendezvous], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever only looks finds nothing."""
        meet().unlock()
        real = rendezvous._open

        def open_and_lose(name: str, *, create: bool) -> int | None:
            fd = real(name, create=create)
            (SHM / name[1:]).unlink(missing_ok=True)
            return fd

        monkeypatch.setattr(rendezvous, "_open", open_and_lose)
        assert enter(name, create=False) is None

    @pytest.mark.parametrize("mode", [0o644, 0o660, 0o606, 0o777])
    def test_one_that_others_may_open_is_refused(self, name: str, mode: int) -> None:
        """Somebody else could write there; it is not removed either, for it is not known whose it is."""
        path = SHM / name[1:]
        path.touch()
        path.chmod(mode)
        for create in (True, False):
            with pytest.raises(ArenaUnavailable, match="remove it"):
                enter(name, create=create)
        assert path.exists()

    def test_one_of_another_user_is_refused(
        self, name: str, meet: Callable[..., Rendezvous], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Even where the kernel would let us."""
        meet().close()
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(ArenaUnavailable, match="not this user's own"):
            enter(name, create=True)

    @pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/etc/passwd")])
    def test_one_that_is_no_memory_is_refused(self, name: str, make: Callable[[Path], None]) -> None:
        """A folder, a FIFO, a link to somewhere."""
        path = SHM / name[1:]
        make(path)
        try:
            with pytest.raises(ArenaUnavailable):
                enter(name, create=True)
        finally:
            path.rmdir() if path.is_dir() else path.unlink()

    @pytest.mark.parametrize("at", [0, 12])
    def test_one_of_another_version_is_refused(self, name: str, meet: Callable[..., Rendezvous], at: int) -> None:
        """Its words mean something else."""
        meeting = meet()
        meeting.write(MEETING)
        with (SHM / name[1:]).open("r+b") as file:
            file.seek(at)
            file.write(b"X")
        with pytest.raises(ArenaUnavailable, match="version"):
            meeting.read()

    def test_one_that_was_never_finished_counts_as_empty(self, name: str, meet: Callable[..., Rendezvous]) -> None:
        """Its writer was killed in between."""
        (SHM / name[1:]).write_bytes(b"dask-shm rdv and no more")
        (SHM / name[1:]).chmod(0o600)
        assert meet().read() is None

    def test_a_program_that_is_started_inherits_no_descriptor(self, process: Callable[[], Process], name: str) -> None:
        """It would be present for as long as it runs."""
        other = process()
        attended(other, name)
        other("""
            numbers = [int(entry.name) for entry in os.scandir("/proc/self/fd") if entry.is_file()]
            inherited = [os.get_inheritable(n) for n in numbers if name in os.readlink(f"/proc/self/fd/{n}")]
            """)
        assert other("inherited") == [False]
