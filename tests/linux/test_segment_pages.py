"""Pages are written, reserved, given back and mapped; a lack of them raises an exception, never a signal."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

import pytest
from other_processes import Process

from dask_shm_plugin.exceptions import ArenaFull, FileSizeLimited, MappingRefused, MemoryExhausted
from dask_shm_plugin.linux.segment import Segment
from dask_shm_plugin.units import PAGE

MIB = 1 << 20


def read(segment: Segment, offset: int, length: int) -> bytes:
    """Read from a segment without a mapping."""
    return os.pread(segment.fd, length, offset)


class TestPages:
    """Pages exist when they are needed, and a lack of them raises an exception."""

    def test_a_write_changes_only_its_own_bytes(self, either: Segment) -> None:
        """The bytes around them are zero, and only the pages under them exist."""
        either.write(3 * PAGE - 2, memoryview(b"abcd"))
        assert read(either, 3 * PAGE - 4, 8) == b"\0\0abcd\0\0"
        assert either.resident == 2 * PAGE

    def test_a_short_write_is_continued(self, monkeypatch: pytest.MonkeyPatch, segment: Segment) -> None:
        """The kernel may accept fewer bytes than it was given, at any time."""
        real = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:1000], offset))
        data = os.urandom(10_500)
        segment.write(PAGE + 1, memoryview(data))
        assert read(segment, PAGE, len(data) + 2) == b"\0" + data + b"\0"

    def test_an_empty_write_is_allowed(self, segment: Segment) -> None:
        """A value may have empty frames."""
        segment.write(0, memoryview(b""))
        assert segment.resident == 0

    def test_reserved_pages_exist_and_keep_their_content(self, segment: Segment) -> None:
        """A reservation changes no byte."""
        segment.write(PAGE, memoryview(b"kept"))
        segment.reserve(0, 4 * PAGE)
        assert segment.resident == 4 * PAGE
        assert read(segment, PAGE, 4) == b"kept"

    def test_pages_that_are_given_back_do_not_exist_any_more(self, either: Segment) -> None:
        """The part reads as zeros afterwards; its neighbours and the size do not change."""
        either.write(0, memoryview(b"x" * 4 * PAGE))
        either.give_back(PAGE, 2 * PAGE)
        assert either.resident == 2 * PAGE
        assert read(either, 0, 4 * PAGE) == b"x" * PAGE + bytes(2 * PAGE) + b"x" * PAGE
        assert os.fstat(either.fd).st_size == MIB

    def test_the_first_page_of_a_part_is_found(self, either: Segment) -> None:
        """Holes before the page are skipped, and pages outside the part do not count."""
        assert either.first_page(0, MIB) is None
        either.write(5 * PAGE, memoryview(b"x"))
        either.write(9 * PAGE, memoryview(b"x"))
        assert either.first_page(0, MIB) == 5 * PAGE
        assert either.first_page(5 * PAGE, PAGE) == 5 * PAGE
        assert either.first_page(6 * PAGE, 3 * PAGE) is None
        assert either.first_page(6 * PAGE, 4 * PAGE) == 9 * PAGE
        assert either.first_page(0, 5 * PAGE) is None

    def test_a_full_tmpfs_raises_an_exception_and_no_sigbus(self, in_small_shm: Process) -> None:
        """Neither a write nor a reservation ends in SIGBUS, and earlier content is still there."""
        in_small_shm("""
            segment = Segment.create(40 << 20)
            segment.write(0, memoryview(b"mine"))
            with open("/dev/shm/of somebody else", "wb") as file:
                file.write(bytes(40 << 20))
            data = memoryview(bytearray(12 << 20))
            """)
        for action in ("segment.write(1 << 20, data)", "segment.reserve(0, 40 << 20)"):
            with pytest.raises(MemoryExhausted, match=r"lower shm\.capacity") as caught:
                in_small_shm(action)
            assert isinstance(caught.value, ArenaFull)
            assert "/dev/shm" in str(caught.value)
        assert in_small_shm("os.pread(segment.fd, 4, 0)") == b"mine"
        in_small_shm("os.unlink('/dev/shm/of somebody else'); segment.write(1 << 20, data)")

    def test_a_write_beyond_the_file_size_limit_raises_an_exception(
        self, segment: Segment, process: Callable[[], Process]
    ) -> None:
        """A member under ``ulimit -f`` can read the blocks of others, and can write up to its limit."""
        other = process()
        other("segment = Segment.open(at)", at=segment.whereabouts)
        other("resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 4096, 8 * 4096))")
        with pytest.raises(FileSizeLimited, match=r"File too large.*ulimit -f"):
            other("segment.write(7 * 4096, memoryview(bytes(8192)))")
        other("segment.write(7 * 4096, memoryview(bytes(4096)))")

    def test_other_errors_are_not_translated(self, segment: Segment) -> None:
        """An invalid argument must not look like a lack of memory."""
        with pytest.raises(OSError, match="Invalid argument"):
            segment.reserve(0, 0)


class TestMapping:
    """A mapping needs no descriptor of its own."""

    def test_a_refused_mapping_names_the_limits_to_raise(self, process: Callable[[], Process]) -> None:
        """The caller sends bytes instead, and the message names ``ulimit -v``."""
        other = process()
        other("segment = Segment.create(1 << 33)")
        other("resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))")
        for how in ("map_shared", "map_private"):
            with pytest.raises(MappingRefused, match=r"vm\.max_map_count or ulimit -v"):
                other(f"segment.{how}(0, 1 << 33)")

    def test_the_descriptor_may_be_closed_while_mappings_live(self, process: Callable[[], Process]) -> None:
        """Mappings keep the memory without a descriptor."""
        other = process()
        other("""
            import ctypes
            segment = Segment.create(1 << 20)
            segment.write(0, memoryview(b"there"))
            address = segment.map_private(0, 4096)
            segment.close()
            segment.close()
            """)
        assert other("ctypes.string_at(address, 5)") == b"there"
        assert "closed" in other("repr(segment)")

    def test_a_started_program_does_not_inherit_the_descriptor(self, either: Segment) -> None:
        """The program would keep the memory for as long as it runs."""
        listing = ["ls", "-l", "/proc/self/fd"]
        seen = subprocess.run(listing, close_fds=False, capture_output=True, check=True, text=True).stdout
        assert "/dev/null" in seen
        assert os.readlink(f"/proc/self/fd/{either.fd}") not in seen

    def test_the_descriptor_of_a_segment_opened_from_another_process_is_not_inheritable(
        self, process: Callable[[], Process], segment: Segment
    ) -> None:
        """Opening a segment sets close-on-exec as creating one does."""
        other = process()
        other("segment = Segment.open(at)", at=segment.whereabouts)
        assert not other("os.get_inheritable(segment.fd)")
