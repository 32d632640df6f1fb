"""What can stand in the way of a member: there is always a reason, and the next may try again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from other_processes import JOIN, Process, join

from dask_shm_plugin import membership, rendezvous
from dask_shm_plugin.exceptions import ArenaBusy, ArenaUnavailable, SharedMemoryError
from dask_shm_plugin.rendezvous import exists, name_for


class TestWhatStandsInTheWay:
    """There is always a reason, and it is a SharedMemoryError."""

    def test_a_capacity_of_nothing_leaves_no_name(self, cluster: str) -> None:
        """Sharing is switched off by it."""
        with pytest.raises(ArenaUnavailable, match=r"shm\.capacity"):
            membership.join(cluster, "nanny", "a", capacity=lambda: 0)
        assert not exists(name_for(cluster))

    def test_a_capacity_that_cannot_be_told_leaves_no_name(self, cluster: str) -> None:
        """Whatever goes wrong: the next may try again."""
        with pytest.raises(ZeroDivisionError):
            membership.join(cluster, "nanny", "a", capacity=lambda: 1 // 0)
        assert not exists(name_for(cluster))
        assert membership.of_cluster(cluster) is None
        join(cluster)

    def test_a_rendezvous_that_others_may_open_is_refused(self, cluster: str) -> None:
        """It is not removed: nobody knows whose it is."""
        path = Path(f"/dev/shm{name_for(cluster)}")
        path.touch()
        path.chmod(0o666)
        try:
            with pytest.raises(ArenaUnavailable, match="remove it"):
                join(cluster)
            assert path.exists()
        finally:
            path.unlink()

    def test_another_version_is_refused(self, cluster: str, member: Callable[..., Process]) -> None:
        """As long as it is there; nothing of it is touched."""
        other = member()
        path = Path(f"/dev/shm{name_for(cluster)}")
        with path.open("r+b") as file:
            file.seek(12)
            file.write(b"\x63")
        before = path.read_bytes()
        for _ in range(2):
            with pytest.raises(ArenaUnavailable, match="another version"):
                join(cluster)
            assert path.read_bytes() == before
        other.kill()
        with pytest.raises(ArenaUnavailable, match="another version"):
            join(cluster)
        join(cluster)

    def test_a_table_of_another_version_is_refused(self, cluster: str, member: Callable[..., Process]) -> None:
        """Even if the rendezvous was the same."""
        other = member()
        other("os.pwrite(arena.segment.fd, b'X', 0)")
        with pytest.raises(SharedMemoryError, match="version"):
            join(cluster)
        assert exists(name_for(cluster))
        other("os.pwrite(arena.segment.fd, b'd', 0)")
        assert join(cluster).arena_id == other("arena.arena_id")

    def test_memory_that_cannot_be_opened_is_no_reason_to_make_a_second_arena(
        self, cluster: str, member: Callable[..., Process]
    ) -> None:
        """Two arenas of one cluster on a node would each have half of the members."""
        other = member()
        other("""
            meeting = rendezvous.enter(rendezvous.name_for(cluster), create=False)
            said = meeting.read()
            meeting.write(said._replace(listed=tuple(listed._replace(fd=10**6) for listed in said.listed)))
            meeting.close()
            """)
        with pytest.raises(ArenaUnavailable, match="cannot be opened"):
            join(cluster)
        assert exists(name_for(cluster))
        assert other("arena.stats().members") == 1

    def test_one_that_others_change_for_too_long_is_busy(
        self, cluster: str, process: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A stopped process stops nobody for long; it is not purged either."""
        monkeypatch.setattr(rendezvous, "_PATIENCE", 0.01)
        other = process()
        other("meeting = rendezvous.enter(name, create=True)", name=name_for(cluster))
        with pytest.raises(ArenaBusy):
            join(cluster)
        join(f"{cluster}-other")
        membership.leave(f"{cluster}-other", "nanny", "tcp://here")
        assert exists(name_for(cluster))
        other("meeting.close()")
        join(cluster)

    def test_a_full_shm_is_no_arena(self, in_small_shm: Process) -> None:
        """No page for the rendezvous: sharing is off, for a reason that can be counted, and no name is left."""
        in_small_shm("""
            file = os.open("/dev/shm/of somebody else", os.O_CREAT | os.O_WRONLY)
            try:
                while os.write(file, bytes(4096)):
                    pass
            except OSError:
                os.close(file)
            """)
        with pytest.raises(SharedMemoryError):
            in_small_shm(JOIN, cluster="any")
        assert in_small_shm("os.listdir('/dev/shm')") == ["of somebody else"]
        in_small_shm("os.unlink('/dev/shm/of somebody else')")
        in_small_shm(JOIN)
