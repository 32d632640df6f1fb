"""A span of shared memory without a name: others open it through a process that has it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from other_processes import Process

from dask_shm_plugin import segment as segments
from dask_shm_plugin.exceptions import ArenaUnavailable
from dask_shm_plugin.segment import PAGE, Segment, Whereabouts, round_up

KIB = 1024
MIB = 1024 * KIB


def home(segment: Segment) -> str:
    """Return what the kernel says a segment is."""
    return os.readlink(f"/proc/self/fd/{segment.fd}")


@pytest.mark.parametrize(("size", "pages"), [(0, 0), (1, 1), (PAGE, 1), (PAGE + 1, 2), (1 << 45, (1 << 45) // PAGE)])
def test_sizes_are_rounded_up_to_pages(size: int, pages: int) -> None:
    """A block takes whole pages."""
    assert round_up(size) == pages * PAGE


class TestCreating:
    """A new segment is sparse, private to the user, and has no name."""

    def test_it_takes_no_memory_at_first(self) -> None:
        """Only pages that are written exist."""
        segment = Segment.create(1 << 36)
        try:
            assert segment.size == 1 << 36
            assert segment.resident == 0
        finally:
            segment.close()

    def test_it_has_no_name_from_the_beginning(self, either: Segment, prefix: str) -> None:
        """Nobody has to remove it, so nobody can fail to."""
        assert os.fstat(either.fd).st_nlink == 0
        assert not list(Path("/dev/shm").glob(f"{prefix}*"))

    def test_only_its_user_may_open_it(self, either: Segment) -> None:
        """Mode 0600, whatever the umask."""
        assert os.fstat(either.fd).st_mode & 0o777 == 0o600
        assert os.fstat(either.fd).st_uid == os.getuid()

    def test_two_are_not_the_same(self, segment: Segment) -> None:
        """Device and inode tell them apart."""
        other = Segment.create(MIB)
        try:
            assert (other.device, other.inode) != (segment.device, segment.inode)
        finally:
            other.close()

    def test_it_lies_in_posix_shared_memory_where_that_is_large_enough(
        self, segment: Segment, in_small_shm: Process, prefix: str
    ) -> None:
        """The first choice: administrators can see it and bound it."""
        assert home(segment).startswith(f"/dev/shm/{prefix}")
        where = "os.readlink(f'/proc/self/fd/{Segment.create(size).fd}')"
        assert in_small_shm(where, size=8 * MIB).startswith("/dev/shm/")

    def test_it_is_a_memfd_where_posix_shared_memory_is_too_small(self, in_small_shm: Process) -> None:
        """A plain container has 64 MiB, whatever its memory limit."""
        where = "os.readlink(f'/proc/self/fd/{Segment.create(size).fd}')"
        assert in_small_shm(where, size=64 * MIB).startswith("/memfd:")

    def test_what_counts_is_how_much_of_it_will_be_filled(self, in_small_shm: Process) -> None:
        """Offsets without pages take no memory."""
        where = "os.readlink(f'/proc/self/fd/{Segment.create(size, filled).fd}')"
        assert in_small_shm(where, size=64 * MIB, filled=8 * MIB).startswith("/dev/shm/")
        assert in_small_shm(where, size=128 * MIB, filled=64 * MIB).startswith("/memfd:")

    def test_it_is_a_memfd_where_there_is_no_posix_shared_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No ``/dev/shm`` is as good as a full one."""
        monkeypatch.setattr(segments, "SHM_DIRECTORY", "/nowhere")
        segment = Segment.create(MIB)
        try:
            assert home(segment).startswith("/memfd:")
        finally:
            segment.close()

    @pytest.mark.parametrize("size", [-1, 1 << 63, 10**19], ids=["-1 B", "8 EiB", "10 EB"])
    def test_a_size_that_cannot_be_is_no_arena(self, size: int) -> None:
        """The message says what to change."""
        with pytest.raises(ArenaUnavailable, match=r"lower shm\.capacity"):
            Segment.create(size)

    @pytest.mark.parametrize("free", [0, 1 << 40], ids=["memfd", "POSIX shared memory"])
    def test_a_limit_on_the_size_of_files_is_no_arena(
        self, process: Callable[[], Process], prefix: str, free: int
    ) -> None:
        """``ulimit -f`` counts for shared memory too; it does not kill the process, and no name is left."""
        other = process()
        other("from dask_shm_plugin import segment; segment._posix_memory_free = lambda: free", free=free)
        other("resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))")
        with pytest.raises(ArenaUnavailable, match=r"lower shm\.capacity"):
            other("Segment.create(1 << 20)")
        assert not list(Path("/dev/shm").glob(f"{prefix}*"))

    def test_a_purger_may_remove_the_name_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between creating and unlinking, somebody who purges finds a name that nobody attends."""
        import posix_ipc

        class Purged(posix_ipc.SharedMemory):
            """Shared memory that somebody else unlinks at once."""

            def __init__(self, *args: object, **options: object) -> None:
                super().__init__(*args, **options)
                posix_ipc.unlink_shared_memory(self.name)

        monkeypatch.setattr(posix_ipc, "SharedMemory", Purged)
        segment = Segment.create(MIB)
        segment.write(0, memoryview(b"there"))
        segment.close()


class TestOpening:
    """Others find it through a process that has it."""

    def test_another_process_opens_it_and_sees_the_same_bytes(
        self, either: Segment, process: Callable[[], Process]
    ) -> None:
        """Both ways, and without a name."""
        other = process()
        other("segment = Segment.open(at)", at=either.whereabouts)
        either.write(5 * PAGE, memoryview(b"from here"))
        other("segment.write(0, memoryview(b'from there'))")
        assert other("os.pread(segment.fd, 9, 5 * 4096)") == b"from here"
        assert os.pread(either.fd, 10, 0) == b"from there"
        assert other("segment.size") == MIB

    def test_it_outlives_the_process_that_made_it(self, process: Callable[[], Process]) -> None:
        """Memory goes with its last process, whichever that is."""
        other, third = process(), process()
        at = other("segment = Segment.create(1 << 20); segment.write(0, memoryview(b'left'))") or other(
            "segment.whereabouts"
        )
        segment = Segment.open(at)
        other.kill()
        third("segment = Segment.open(at)", at=segment.whereabouts)
        assert third("os.pread(segment.fd, 4, 0)") == b"left"
        segment.close()

    def test_whereabouts_travel(self, segment: Segment) -> None:
        """They are plain data; the segment is not, and says so."""
        assert pickle.loads(pickle.dumps(segment.whereabouts)) == segment.whereabouts
        with pytest.raises(TypeError, match="Whereabouts"):
            pickle.dumps(segment)

    def refuses(self, at: Whereabouts) -> bool:
        """Tell whether a place is refused, without a descriptor being left."""
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(ArenaUnavailable):
            Segment.open(at)
        return set(os.listdir("/proc/self/fd")) == before

    def test_a_process_that_is_gone_is_refused(self, process: Callable[[], Process]) -> None:
        """It has taken its descriptors along."""
        other = process()
        at = other("Segment.create(1 << 20).whereabouts")
        other.kill()
        assert self.refuses(at)

    def test_a_number_that_is_not_open_is_refused(self, segment: Segment) -> None:
        """The process has closed it."""
        assert self.refuses(segment.whereabouts._replace(fd=10**6))

    @pytest.mark.parametrize("change", [{"inode": 1}, {"device": 1}])
    def test_another_identity_is_refused(self, segment: Segment, change: dict[str, int]) -> None:
        """The number stands for another file by now."""
        assert self.refuses(segment.whereabouts._replace(**change))

    def test_another_segment_in_its_place_is_refused(self, segment: Segment) -> None:
        """A process that was restarted may have another arena under the same number."""
        other = Segment.create(MIB)
        at = other.whereabouts
        os.dup2(segment.fd, other.fd)
        assert self.refuses(at)
        other.close()  # closes nothing: it is not the other's any more
        os.close(at.fd)

    def test_a_fifo_in_its_place_is_refused_without_being_opened(self, tmp_path: Path) -> None:
        """Opening a FIFO would wait for the other end, and wake somebody."""
        os.mkfifo(tmp_path / "fifo")
        fd = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        status = os.fstat(fd)
        assert self.refuses(Whereabouts(os.getpid(), fd, status.st_dev, status.st_ino))
        os.close(fd)

    def test_a_segment_of_another_user_is_refused(self, segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is not ours, even where the kernel would let us."""
        monkeypatch.setattr(os, "getuid", lambda: os.stat("/proc/self").st_uid + 1)
        assert self.refuses(segment.whereabouts)

    def test_something_else_that_comes_between_looking_and_opening_is_refused(
        self, segment: Segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The other process may close the number at any moment, and use it again."""
        (tmp_path / "other").write_bytes(b"")
        real = os.open
        monkeypatch.setattr(os, "open", lambda path, flags, *rest: real(tmp_path / "other", flags, *rest))
        with pytest.raises(ArenaUnavailable, match="not the segment"):
            Segment.open(segment.whereabouts)
        monkeypatch.undo()
        links = [
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}")
        ]
        assert str(tmp_path / "other") not in links


def test_who_asks_while_a_segment_is_closed_does_not_ask_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number is anybody's as soon as it is closed; to look for pages there would move somebody's place in a file."""
    segment, close = Segment.create(MIB), os.close
    (tmp_path / "other").write_bytes(bytes(MIB))

    def closed_and_used_again(fd: int) -> None:
        close(fd)
        assert os.open(tmp_path / "other", os.O_RDONLY) == fd
        assert segment.missing(PAGE, PAGE) == PAGE
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0
        close(fd)

    monkeypatch.setattr(os, "close", closed_and_used_again)
    segment.close()
