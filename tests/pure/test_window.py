"""Warm pages are written through one mapping, all others never: a store where no page exists may end the process."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from other_processes import JOIN, Process, join, publish

from dask_shm_plugin import membership, syscalls
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.exceptions import TableCorrupt
from dask_shm_plugin.segment import Segment
from dask_shm_plugin.window import Window

MIB = 1 << 20
CLUSTER = "tcp://window"
DATA = np.random.default_rng(0).integers(0, 256, MIB + 4097, np.uint8)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect how many bytes were written by a system call, each time."""
    sizes: list[int] = []
    write = Segment.write

    def note(segment: Segment, offset: int, data: memoryview) -> None:
        sizes.append(len(data))
        write(segment, offset, data)

    monkeypatch.setattr(Segment, "write", note)
    return sizes


@pytest.fixture
def roomy() -> Iterator[Arena]:
    """An arena that keeps all its pages."""
    arena = Arena.create(16 * MIB, warm=1000)
    yield arena
    arena.close()


def put(arena: Arena, offset: int = 0, size: int = len(DATA)) -> None:
    """Publish the data, from some offset of a block on, look whether it is there, and let it go."""
    data = DATA[:size]
    with arena.draft(offset + size) as draft:
        draft.write(offset, data.data)
        with draft.seal() as block:
            assert np.array_equal(np.frombuffer(block.read(offset, size), np.uint8), data)
    arena.holdings.tidy()


def test_new_pages_are_written_by_a_system_call_and_warm_ones_in_place(roomy: Arena, written: list[int]) -> None:
    """The same place, again and again."""
    put(roomy)
    assert written == [len(DATA)]
    put(roomy)
    put(roomy)
    assert written == [len(DATA)]


def test_pages_that_were_given_back_are_new(roomy: Arena, written: list[int]) -> None:
    """Also where the mapping has shown them before."""
    for _ in range(2):
        put(roomy)
        put(roomy)
        roomy.trimmer.trim_all()
    assert written == [len(DATA)] * 2


def test_one_page_that_is_missing_is_enough(roomy: Arena, written: list[int]) -> None:
    """What is partly new is written as if it were all new."""
    put(roomy)
    put(roomy, offset=4096)
    assert written == [len(DATA)] * 2


def test_any_offset_will_do(roomy: Arena, written: list[int]) -> None:
    """A frame begins where the one before it ends."""
    with publish(roomy, bytes(4 * MIB)):
        pass
    roomy.holdings.tidy()
    written.clear()
    for offset in (1, 4095, 4097, 100_001):
        put(roomy, offset)
    assert written == []


def test_where_the_mapping_is_refused_a_system_call_writes(
    roomy: Arena, written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may have little address space."""
    monkeypatch.setattr(syscalls, "map_closed", lambda *args: (_ for _ in ()).throw(OSError(12, "none")))
    put(roomy)
    put(roomy)
    assert written == [len(DATA)] * 2


def test_an_old_kernel_that_fills_no_page_table_writes_by_a_system_call(
    roomy: Arena, written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To take a fault for each page would be slower than that."""
    monkeypatch.setattr(syscalls, "populate", lambda *args: False)
    put(roomy)
    put(roomy)
    assert written == [len(DATA)] * 2


def test_a_core_dump_makes_no_pages(roomy: Arena) -> None:
    """It would read every page of what is mapped for writing, and those that the segment lacks would be made."""
    put(roomy)
    mapped, flags = "", []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        mapped = line if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line) else mapped
        if line.startswith("VmFlags:") and f" {roomy.segment.inode} " in mapped and mapped.split()[1].endswith("s"):
            flags.append(line.split()[1:])
    assert len(flags) >= 2  # the table, and what is written through
    assert all("dd" in flag for flag in flags)


def test_a_segment_that_somebody_cuts_short_is_not_written(roomy: Arena) -> None:
    """A store behind its end would be answered by SIGBUS."""
    put(roomy)
    with roomy.draft(len(DATA)) as draft:
        segment, size = roomy.segment, roomy.segment.size
        before, syscalls.status_of = syscalls.status_of, lambda fd: (segment.device, segment.inode, size - 1)
        try:
            with pytest.raises(TableCorrupt):
                draft.write(0, DATA.data)
        finally:
            syscalls.status_of = before


def test_no_child_inherits_the_mapping_and_none_outlives_the_membership(process: Callable[[], Process]) -> None:
    """A child has nothing to write, and who has left has nothing either."""

    def mapped(other: Process) -> int:
        lines = Path(f"/proc/{other.pid}/maps").read_text().splitlines()
        return sum("rw-s" in line and "dask-shm" in line for line in lines)

    parent = process()
    parent("arena = Arena.create(16 << 20, warm=1000)")
    parent("for _ in range(2): publish(arena, bytes(1 << 20)).close(); arena.holdings.tidy()")
    assert mapped(parent) == 2  # and the table
    child = parent.fork()
    assert mapped(child) == 1
    parent("arena.close()")
    assert mapped(parent) == 0


def test_what_another_process_has_given_back_is_not_written_in_place(
    process: Callable[[], Process], written: list[int]
) -> None:
    """However sure this process was that the pages are there."""
    arena = join(CLUSTER)
    arena.trimmer.warm = 1000
    other = process()
    other(JOIN, cluster=CLUSTER)
    for _ in range(3):
        put(arena, size=MIB // 2)
    assert len(written) == 1
    other("arena.trimmer.trim_all()")
    put(arena, size=MIB // 2)
    put(arena, size=MIB // 2)
    assert len(written) == 2
    other.kill()
    membership.leave(CLUSTER, "nanny", "tcp://here")


def test_looking_at_pages_once_is_enough(roomy: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for parts of what was seen."""
    put(roomy)
    put(roomy)
    monkeypatch.setattr(Window, "sees", lambda *_: pytest.fail("looked again"))
    put(roomy)
    put(roomy, size=MIB // 2)


LOCKS_ALL = """
import ctypes, sys
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.layout import TABLE_BYTES

arena, when = Arena.create(256 << 20, 2.0), int(sys.argv[1])
for moment in (2, 1):  # of what is mapped later; of what is mapped now
    if moment == when and ctypes.CDLL(None).mlockall(moment):
        sys.exit("not allowed")
    if moment == 2:
        with arena.draft(1 << 20) as draft:
            draft.write(0, memoryview(bytes(1 << 20)))
            block = draft.seal()
print(arena.segment.resident - TABLE_BYTES)
"""


@pytest.mark.parametrize("moment", [1, 2], ids=["now", "from now on"])
def test_who_locks_all_memory_makes_no_more_than_what_was_opened(moment: int) -> None:
    """A segment has several times as many offsets as its capacity."""
    done = subprocess.run([sys.executable, "-c", LOCKS_ALL, str(moment)], capture_output=True, text=True)
    if "not allowed" in done.stderr:
        pytest.skip("this user may not lock so much memory")
    assert int(done.stdout) <= 17 * MIB, done.stderr
