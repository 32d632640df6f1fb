"""The pages of a segment: written, reserved, given back, mapped; a lack of them is an exception and never a signal."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

import pytest
from other_processes import Process

from dask_shm_plugin.exceptions import ArenaFull, FileSizeLimited, MappingRefused, MemoryExhausted
from dask_shm_plugin.segment import PAGE, Segment

MIB = 1 << 20


def read(segment: Segment, offset: int, length: int) -> bytes:
    """Read from a segment without a mapping."""
    return os.pread(segment.fd, length, offset)


class TestPages:
    """Pages exist when they are needed, and a lack of them is an exception."""

    def test_what_is_written_is_there_and_nothing_else(self, either: Segment) -> None:
        """Bytes go to their place; around them everything is zero."""
        either.write(3 * PAGE - 2, memoryview(b"abcd"))
        assert read(either, 3 * PAGE - 4, 8) == b"\0\0abcd\0\0"
        assert either.resident == 2 * PAGE

    def test_more_is_written_than_one_call_takes(self, monkeypatch: pytest.MonkeyPatch, segment: Segment) -> None:
        """The kernel may take less than it was given, at any time."""
        real = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:1000], offset))
        data = os.urandom(10_500)
        segment.write(PAGE + 1, memoryview(data))
        assert read(segment, PAGE, len(data) + 2) == b"\0" + data + b"\0"

    def test_nothing_can_be_written_too(self, segment: Segment) -> None:
        """Empty frames exist."""
        segment.write(0, memoryview(b""))
        assert segment.resident == 0

    def test_reserved_pages_exist_and_keep_what_they_held(self, segment: Segment) -> None:
        """A reservation changes no byte."""
        segment.write(PAGE, memoryview(b"kept"))
        segment.reserve(0, 4 * PAGE)
        assert segment.resident == 4 * PAGE
        assert read(segment, PAGE, 4) == b"kept"

    def test_pages_that_are_given_back_are_gone(self, either: Segment) -> None:
        """The part reads as zeros afterwards; its neighbours and the size stay."""
        either.write(0, memoryview(b"x" * 4 * PAGE))
        either.give_back(PAGE, 2 * PAGE)
        assert either.resident == 2 * PAGE
        assert read(either, 0, 4 * PAGE) == b"x" * PAGE + bytes(2 * PAGE) + b"x" * PAGE
        assert os.fstat(either.fd).st_size == MIB

    def test_the_first_page_of_a_part_is_found(self, either: Segment) -> None:
        """Holes before it are skipped, pages outside of the part do not count."""
        assert either.first_page(0, MIB) is None
        either.write(5 * PAGE, memoryview(b"x"))
        either.write(9 * PAGE, memoryview(b"x"))
        assert either.first_page(0, MIB) == 5 * PAGE
        assert either.first_page(5 * PAGE, PAGE) == 5 * PAGE
        assert either.first_page(6 * PAGE, 3 * PAGE) is None
        assert either.first_page(6 * PAGE, 4 * PAGE) == 9 * PAGE
        assert either.first_page(0, 5 * PAGE) is None

    def test_a_full_tmpfs_is_an_exception(self, in_small_shm: Process) -> None:
        """Neither writing nor reserving is answered by SIGBUS, and what was there before is still there."""
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

    def test_a_limit_on_the_size_of_files_is_an_exception(
        self, segment: Segment, process: Callable[[], Process]
    ) -> None:
        """A member under ``ulimit -f`` reads what others write, and writes nothing behind its limit."""
        other = process()
        other("segment = Segment.open(at)", at=segment.whereabouts)
        other("resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 4096, 8 * 4096))")
        with pytest.raises(FileSizeLimited, match=r"File too large.*ulimit -f"):
            other("segment.write(7 * 4096, memoryview(bytes(8192)))")
        other("segment.write(7 * 4096, memoryview(bytes(4096)))")

    def test_other_errors_stay_what_they_are(self, segment: Segment) -> None:
        """A mistake is no lack of memory."""
        with pytest.raises(OSError, match="Invalid argument"):
            segment.reserve(0, 0)


class TestMapping:
    """A mapping needs no descriptor of its own."""

    def test_a_shared_mapping_is_refused_by_name(self, process: Callable[[], Process]) -> None:
        """``ulimit -v`` is a reason to send bytes instead; the message says what to raise."""
        other = process()
        other("segment = Segment.create(1 << 33)")
        other("resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))")
        for how in ("map_shared", "map_private"):
            with pytest.raises(MappingRefused, match=r"vm\.max_map_count or ulimit -v"):
                other(f"segment.{how}(0, 1 << 33)")

    def test_the_descriptor_may_be_closed_while_mappings_live(self, process: Callable[[], Process]) -> None:
        """They keep the memory, not the number."""
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

    def test_a_program_that_is_started_inherits_no_descriptor(self, either: Segment) -> None:
        """It would keep the memory for as long as it runs."""
        listing = ["ls", "-l", "/proc/self/fd"]
        seen = subprocess.run(listing, close_fds=False, capture_output=True, check=True, text=True).stdout
        assert "/dev/null" in seen
        assert os.readlink(f"/proc/self/fd/{either.fd}") not in seen

    def test_nor_when_it_was_opened_from_elsewhere(self, process: Callable[[], Process], segment: Segment) -> None:
        """A segment that somebody else made is not inherited either."""
        other = process()
        other("segment = Segment.open(at)", at=segment.whereabouts)
        assert not other("os.get_inheritable(segment.fd)")
