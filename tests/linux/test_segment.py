"""A segment is a span of shared memory without a name; another process opens it through a process that has it open."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from other_processes import Process

from dask_shm_plugin.exceptions import ArenaUnavailable
from dask_shm_plugin.linux import segment as segments
from dask_shm_plugin.linux.segment import Segment, Whereabouts
from dask_shm_plugin.units import PAGE, round_up

KIB = 1024
MIB = 1024 * KIB


def backing_file(segment: Segment) -> str:
    """Return the name of the file behind a segment, as the kernel reports it."""
    return os.readlink(f"/proc/self/fd/{segment.fd}")


@pytest.mark.parametrize(("size", "pages"), [(0, 0), (1, 1), (PAGE, 1), (PAGE + 1, 2), (1 << 45, (1 << 45) // PAGE)])
def test_sizes_are_rounded_up_to_pages(size: int, pages: int) -> None:
    """A block takes whole pages."""
    assert round_up(size) == pages * PAGE


class TestCreating:
    """A new segment is sparse, private to its user, and has no name."""

    def test_a_new_segment_takes_no_memory(self) -> None:
        """Only pages that are written exist."""
        segment = Segment.create(1 << 36)
        try:
            assert segment.size == 1 << 36
            assert segment.resident == 0
        finally:
            segment.close()

    def test_a_new_segment_has_no_name(self, either: Segment, prefix: str) -> None:
        """No process has to remove a name, so none can be left behind."""
        assert os.fstat(either.fd).st_nlink == 0
        assert not list(Path("/dev/shm").glob(f"{prefix}*"))

    def test_only_its_user_may_open_a_segment(self, either: Segment) -> None:
        """The mode is 0600, whatever the umask."""
        assert os.fstat(either.fd).st_mode & 0o777 == 0o600
        assert os.fstat(either.fd).st_uid == os.getuid()

    def test_two_segments_have_different_identities(self, segment: Segment) -> None:
        """Device and inode distinguish them."""
        other = Segment.create(MIB)
        try:
            assert (other.device, other.inode) != (segment.device, segment.inode)
        finally:
            other.close()

    def test_a_segment_is_posix_shared_memory_if_dev_shm_is_large_enough(
        self, segment: Segment, in_small_shm: Process, prefix: str
    ) -> None:
        """POSIX shared memory is the first choice, because administrators can see and limit it."""
        assert backing_file(segment).startswith(f"/dev/shm/{prefix}")
        where = "os.readlink(f'/proc/self/fd/{Segment.create(size).fd}')"
        assert in_small_shm(where, size=8 * MIB).startswith("/dev/shm/")

    def test_a_segment_is_a_memfd_if_dev_shm_is_too_small(self, in_small_shm: Process) -> None:
        """``/dev/shm`` of a default container has 64 MiB, whatever its memory limit."""
        where = "os.readlink(f'/proc/self/fd/{Segment.create(size).fd}')"
        assert in_small_shm(where, size=64 * MIB).startswith("/memfd:")

    def test_the_bytes_to_be_filled_decide_and_not_the_size(self, in_small_shm: Process) -> None:
        """Offsets without pages take no memory."""
        where = "os.readlink(f'/proc/self/fd/{Segment.create(size, filled).fd}')"
        assert in_small_shm(where, size=64 * MIB, filled=8 * MIB).startswith("/dev/shm/")
        assert in_small_shm(where, size=128 * MIB, filled=64 * MIB).startswith("/memfd:")

    def test_a_segment_is_a_memfd_if_there_is_no_dev_shm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A missing ``/dev/shm`` is handled like a full one."""
        monkeypatch.setattr(segments, "SHM_DIRECTORY", "/nowhere")
        segment = Segment.create(MIB)
        try:
            assert backing_file(segment).startswith("/memfd:")
        finally:
            segment.close()

    @pytest.mark.parametrize("size", [-1, 1 << 63, 10**19], ids=["-1 B", "8 EiB", "10 EB"])
    def test_an_impossible_size_is_refused(self, size: int) -> None:
        """The message names the setting to change."""
        with pytest.raises(ArenaUnavailable, match=r"lower shm\.capacity"):
            Segment.create(size)

    @pytest.mark.parametrize("free", [0, 1 << 40], ids=["memfd", "POSIX shared memory"])
    def test_a_size_beyond_the_file_size_limit_is_refused(
        self, process: Callable[[], Process], prefix: str, free: int
    ) -> None:
        """``ulimit -f`` applies to shared memory, too; it must not kill the process, and no name is left."""
        other = process()
        other("from dask_shm_plugin.linux import segment; segment._posix_memory_free = lambda: free", free=free)
        other("resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))")
        with pytest.raises(ArenaUnavailable, match=r"lower shm\.capacity"):
            other("Segment.create(1 << 20)")
        assert not list(Path("/dev/shm").glob(f"{prefix}*"))

    def test_the_name_of_a_new_segment_may_be_purged_by_another_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between creation and unlinking, another process takes the name for a leftover."""
        import posix_ipc

        class Purged(posix_ipc.SharedMemory):
            """Shared memory that another process unlinks at once."""

            def __init__(self, *args: object, **options: object) -> None:
                super().__init__(*args, **options)
                posix_ipc.unlink_shared_memory(self.name)

        monkeypatch.setattr(posix_ipc, "SharedMemory", Purged)
        segment = Segment.create(MIB)
        segment.write(0, memoryview(b"there"))
        segment.close()


class TestOpening:
    """Another process opens a segment through a process that has it open."""

    def test_another_process_opens_it_and_sees_the_same_bytes(
        self, either: Segment, process: Callable[[], Process]
    ) -> None:
        """Both processes see each other's writes, without a name for the segment."""
        other = process()
        other("segment = Segment.open(at)", at=either.whereabouts)
        either.write(5 * PAGE, memoryview(b"from here"))
        other("segment.write(0, memoryview(b'from there'))")
        assert other("os.pread(segment.fd, 9, 5 * 4096)") == b"from here"
        assert os.pread(either.fd, 10, 0) == b"from there"
        assert other("segment.size") == MIB

    def test_a_segment_outlives_the_process_that_created_it(self, process: Callable[[], Process]) -> None:
        """Its memory is freed with the last process that has it open."""
        other, third = process(), process()
        at = other("segment = Segment.create(1 << 20); segment.write(0, memoryview(b'left'))") or other(
            "segment.whereabouts"
        )
        segment = Segment.open(at)
        other.kill()
        third("segment = Segment.open(at)", at=segment.whereabouts)
        assert third("os.pread(segment.fd, 4, 0)") == b"left"
        segment.close()

    def test_whereabouts_can_be_pickled(self, segment: Segment) -> None:
        """Whereabouts are plain data; pickling the segment itself raises an error that names them."""
        assert pickle.loads(pickle.dumps(segment.whereabouts)) == segment.whereabouts
        with pytest.raises(TypeError, match="Whereabouts"):
            pickle.dumps(segment)

    def refuses(self, at: Whereabouts) -> bool:
        """Return whether a segment at these whereabouts is refused, without an open descriptor left behind."""
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(ArenaUnavailable):
            Segment.open(at)
        return set(os.listdir("/proc/self/fd")) == before

    def test_the_whereabouts_of_a_dead_process_are_refused(self, process: Callable[[], Process]) -> None:
        """Its descriptors are gone with it."""
        other = process()
        at = other("Segment.create(1 << 20).whereabouts")
        other.kill()
        assert self.refuses(at)

    def test_a_descriptor_that_is_not_open_is_refused(self, segment: Segment) -> None:
        """The process may have closed the descriptor."""
        assert self.refuses(segment.whereabouts._replace(fd=10**6))

    @pytest.mark.parametrize("change", [{"inode": 1}, {"device": 1}])
    def test_a_file_of_another_identity_is_refused(self, segment: Segment, change: dict[str, int]) -> None:
        """The number of the descriptor may be that of another file by now."""
        assert self.refuses(segment.whereabouts._replace(**change))

    def test_another_segment_in_its_place_is_refused(self, segment: Segment) -> None:
        """A process that was restarted may have another arena under the same descriptor number."""
        other = Segment.create(MIB)
        at = other.whereabouts
        os.dup2(segment.fd, other.fd)
        assert self.refuses(at)
        other.close()  # closes nothing, because the descriptor belongs to another file now
        os.close(at.fd)

    def test_a_fifo_in_its_place_is_refused_without_being_opened(self, tmp_path: Path) -> None:
        """Opening a FIFO would wait for its other end, or wake a process that waits there."""
        os.mkfifo(tmp_path / "fifo")
        fd = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        status = os.fstat(fd)
        assert self.refuses(Whereabouts(os.getpid(), fd, status.st_dev, status.st_ino))
        os.close(fd)

    def test_a_segment_of_another_user_is_refused(self, segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
        """Such a segment is refused even if the kernel would permit access."""
        monkeypatch.setattr(os, "getuid", lambda: os.stat("/proc/self").st_uid + 1)
        assert self.refuses(segment.whereabouts)

    def test_a_file_that_is_replaced_between_the_check_and_the_opening_is_refused(
        self, segment: Segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The other process may close the descriptor and reuse its number at any moment."""
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


def test_a_query_during_close_does_not_reach_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number may be reused at once, and a query would move the position in the other file."""
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
