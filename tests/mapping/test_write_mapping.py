"""Only pages that exist are written through a mapping: a store to a missing page may end the process with SIGBUS."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from other_processes import JOIN, Process, join, publish

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import TableCorrupt
from dask_shm_plugin.linux import syscalls
from dask_shm_plugin.linux.segment import Segment
from dask_shm_plugin.mapping.shared import WriteMapping
from dask_shm_plugin.node import membership

MIB = 1 << 20
CLUSTER = "tcp://window"
DATA = np.random.default_rng(0).integers(0, 256, MIB + 4097, np.uint8)


@pytest.fixture
def system_call_writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the sizes, in bytes, of all writes by a system call."""
    sizes: list[int] = []
    write = Segment.write

    def note(segment: Segment, offset: int, data: memoryview) -> None:
        sizes.append(len(data))
        write(segment, offset, data)

    monkeypatch.setattr(Segment, "write", note)
    return sizes


@pytest.fixture
def roomy() -> Iterator[Arena]:
    """Create an arena that keeps all its pages."""
    arena = Arena.create(16 * MIB, warm=1000)
    yield arena
    arena.close()


def put(arena: Arena, offset: int = 0, size: int = len(DATA)) -> None:
    """Publish the data at an offset in a block, check it, and release the block."""
    data = DATA[:size]
    with arena.draft(offset + size) as draft:
        draft.write(offset, data.data)
        with draft.seal() as block:
            assert np.array_equal(np.frombuffer(block.read(offset, size), np.uint8), data)
    arena.holdings.tidy()


def test_new_pages_are_written_by_a_system_call_and_warm_ones_in_place(
    roomy: Arena, system_call_writes: list[int]
) -> None:
    """The same space is written three times, and only its first pages are new."""
    put(roomy)
    assert system_call_writes == [len(DATA)]
    put(roomy)
    put(roomy)
    assert system_call_writes == [len(DATA)]


def test_pages_that_were_given_back_are_written_by_a_system_call(roomy: Arena, system_call_writes: list[int]) -> None:
    """They are missing again, even if the mapping has shown them before."""
    for _ in range(2):
        put(roomy)
        put(roomy)
        roomy.trimmer.trim_all()
    assert system_call_writes == [len(DATA)] * 2


def test_a_part_with_one_missing_page_is_written_by_a_system_call(roomy: Arena, system_call_writes: list[int]) -> None:
    """Such a part is treated as if all its pages were missing."""
    put(roomy)
    put(roomy, offset=4096)
    assert system_call_writes == [len(DATA)] * 2


def test_warm_pages_are_written_in_place_at_any_offset(roomy: Arena, system_call_writes: list[int]) -> None:
    """A frame begins where the previous one ends."""
    with publish(roomy, bytes(4 * MIB)):
        pass
    roomy.holdings.tidy()
    system_call_writes.clear()
    for offset in (1, 4095, 4097, 100_001):
        put(roomy, offset)
    assert system_call_writes == []


def test_a_system_call_writes_if_the_mapping_is_refused(
    roomy: Arena, system_call_writes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may have little address space."""
    monkeypatch.setattr(syscalls, "map_closed", lambda *args: (_ for _ in ()).throw(OSError(12, "none")))
    put(roomy)
    put(roomy)
    assert system_call_writes == [len(DATA)] * 2


def test_a_system_call_writes_if_the_kernel_cannot_fill_the_page_table(
    roomy: Arena, system_call_writes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On such an old kernel, a page fault for each page would be slower than the system call."""
    monkeypatch.setattr(syscalls, "populate", lambda *args: False)
    put(roomy)
    put(roomy)
    assert system_call_writes == [len(DATA)] * 2


def test_the_mappings_for_writing_are_left_out_of_core_dumps(roomy: Arena) -> None:
    """A core dump would read each page of the mapping, and this would make the missing pages of the segment."""
    put(roomy)
    mapped, flags = "", []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        mapped = line if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line) else mapped
        if line.startswith("VmFlags:") and f" {roomy.segment.inode} " in mapped and mapped.split()[1].endswith("s"):
            flags.append(line.split()[1:])
    assert len(flags) >= 2  # the mapping of the table and the write mapping
    assert all("dd" in flag for flag in flags)


def test_a_truncated_segment_is_not_written(roomy: Arena) -> None:
    """A store behind its end would end the process with SIGBUS."""
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
    """A child has nothing to write to the segment, and neither has a process that has left."""

    def mapped(other: Process) -> int:
        lines = Path(f"/proc/{other.pid}/maps").read_text().splitlines()
        return sum("rw-s" in line and "dask-shm" in line for line in lines)

    parent = process()
    parent("arena = Arena.create(16 << 20, warm=1000)")
    parent("for _ in range(2): publish(arena, bytes(1 << 20)).close(); arena.holdings.tidy()")
    assert mapped(parent) == 2  # the write mapping and the mapping of the table
    child = parent.fork()
    assert mapped(child) == 1
    parent("arena.close()")
    assert mapped(parent) == 0


def test_pages_that_another_process_has_given_back_are_not_written_in_place(
    process: Callable[[], Process], system_call_writes: list[int]
) -> None:
    """The parts that this process knows to be mapped are forgotten when any member gives pages back."""
    arena = join(CLUSTER)
    arena.trimmer.warm = 1000
    other = process()
    other(JOIN, cluster=CLUSTER)
    for _ in range(3):
        put(arena, size=MIB // 2)
    assert len(system_call_writes) == 1
    other("arena.trimmer.trim_all()")
    put(arena, size=MIB // 2)
    put(arena, size=MIB // 2)
    assert len(system_call_writes) == 2
    other.kill()
    membership.leave(CLUSTER, "nanny", "tcp://here")


def test_the_pages_of_a_part_are_looked_up_once(roomy: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result holds for parts of that part, too."""
    put(roomy)
    put(roomy)
    monkeypatch.setattr(WriteMapping, "sees", lambda *_: pytest.fail("looked again"))
    put(roomy)
    put(roomy, size=MIB // 2)


LOCKS_ALL = """
import ctypes, sys
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.table.layout import TABLE_BYTES

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
def test_mlockall_makes_pages_only_in_the_opened_part_of_the_mapping(moment: int) -> None:
    """A segment has several times as many offsets as its capacity, so pages for all of them would exceed it."""
    done = subprocess.run([sys.executable, "-c", LOCKS_ALL, str(moment)], capture_output=True, text=True)
    if "not allowed" in done.stderr:
        pytest.skip("this user may not lock so much memory")
    assert int(done.stdout) <= 17 * MIB, done.stderr
