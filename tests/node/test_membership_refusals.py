"""A process that cannot join gets an error with the reason, and a later attempt is possible."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from other_processes import JOIN, Process, join

from dask_shm_plugin.exceptions import ArenaBusy, ArenaUnavailable, SharedMemoryError
from dask_shm_plugin.node import membership, rendezvous
from dask_shm_plugin.node.rendezvous import exists, name_for


class TestRefusals:
    """Each obstacle to joining raises an error with the reason."""

    def test_a_capacity_of_zero_leaves_no_name(self, cluster: str) -> None:
        """A capacity of zero switches sharing off."""
        with pytest.raises(ArenaUnavailable, match=r"shm\.capacity"):
            membership.join(cluster, "nanny", "a", capacity=lambda: 0)
        assert not exists(name_for(cluster))

    def test_an_error_while_the_capacity_is_computed_leaves_no_name(self, cluster: str) -> None:
        """After any error, the next attempt can succeed."""
        with pytest.raises(ZeroDivisionError):
            membership.join(cluster, "nanny", "a", capacity=lambda: 1 // 0)
        assert not exists(name_for(cluster))
        assert membership.of_cluster(cluster) is None
        join(cluster)

    def test_a_rendezvous_that_other_users_may_open_is_refused(self, cluster: str) -> None:
        """It is not removed, because its owner is not known."""
        path = Path(f"/dev/shm{name_for(cluster)}")
        path.touch()
        path.chmod(0o666)
        try:
            with pytest.raises(ArenaUnavailable, match="remove it"):
                join(cluster)
            assert path.exists()
        finally:
            path.unlink()

    def test_a_rendezvous_of_another_version_is_refused(self, cluster: str, member: Callable[..., Process]) -> None:
        """It is refused as long as it exists, and its content is not changed."""
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
        """The version in the rendezvous may be the same."""
        other = member()
        other("os.pwrite(arena.segment.fd, b'X', 0)")
        with pytest.raises(SharedMemoryError, match="version"):
            join(cluster)
        assert exists(name_for(cluster))
        other("os.pwrite(arena.segment.fd, b'd', 0)")
        assert join(cluster).arena_id == other("arena.arena_id")

    def test_no_second_arena_is_created_if_the_first_cannot_be_opened(
        self, cluster: str, member: Callable[..., Process]
    ) -> None:
        """Two arenas of one cluster on a node would each have only some of the members."""
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

    def test_a_rendezvous_that_stays_locked_raises_arena_busy(
        self, cluster: str, process: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A stopped process delays others only for a short time, and its rendezvous is not purged."""
        monkeypatch.setattr(rendezvous, "_LOCK_TIMEOUT_S", 0.01)
        other = process()
        other("meeting = rendezvous.enter(name, create=True)", name=name_for(cluster))
        with pytest.raises(ArenaBusy):
            join(cluster)
        join(f"{cluster}-other")
        membership.leave(f"{cluster}-other", "nanny", "tcp://here")
        assert exists(name_for(cluster))
        other("meeting.close()")
        join(cluster)

    def test_a_full_dev_shm_raises_an_error_and_leaves_no_name(self, in_small_shm: Process) -> None:
        """There is no page for the rendezvous, so sharing is off, for a reason that can be counted."""
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
