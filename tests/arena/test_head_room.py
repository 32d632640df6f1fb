"""Head-room is read before pages are made, because a control group at its limit kills processes without an error."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest
from control_groups import ControlGroup, make_control_group
from other_processes import Process, publish, wait_until

from dask_shm_plugin.arena import housekeeping
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import ArenaFull, MemoryExhausted, NoHeadRoom
from dask_shm_plugin.linux import limits

MIB = 1 << 20


@pytest.fixture
def group() -> Iterator[ControlGroup]:
    """Create a control group with a limit of 400 MiB."""
    group = make_control_group(f"dask-shm-test-{os.getpid()}", 400 * MIB)
    yield group
    wait_until(group.remove, "the control group is empty")


@pytest.fixture
def confined(group: ControlGroup, process: Callable[[], Process]) -> Iterator[Process]:
    """Start a process in the control group."""
    one = process()
    group.enter(one("os.getpid()"))
    yield one
    for member in (*one.forked, one):
        member.kill()
    assert group.killed() == 0


@pytest.fixture(params=["its own", "the one above", "one that stalls"])
def limited(request: pytest.FixtureRequest, group: ControlGroup) -> ControlGroup:
    """Set the limit on the process's own control group or on an ancestor, to kill or to throttle."""
    if request.param == "the one above":
        group.nest()
    elif request.param == "one that stalls":
        high = group.folder / "memory.high"
        if not high.exists():
            pytest.skip("control groups of version 1 do not throttle")
        high.write_text(str(400 * MIB))
        (group.folder / "memory.max").write_text("max")
    return group


def test_a_write_beyond_the_limit_of_a_control_group_raises_an_exception(
    limited: ControlGroup, confined: Process
) -> None:
    """The process lives on and can share values that fit, whichever control group above it has the limit."""
    confined("from dask_shm_plugin.linux import limits")
    assert confined("limits.tightest()[:2]") == (f"control group {limited.folder}", 400 * MIB)
    confined("arena = Arena.create(1 << 30, warm=1 << 30)")
    confined("data = memoryview(bytes(1 << 20))")
    with pytest.raises(NoHeadRoom, match="control group") as caught:
        confined("""
            with arena.draft(600 << 20) as draft:
                for number in range(600):
                    draft.write(number << 20, data)
            """)
    assert isinstance(caught.value, ArenaFull)
    confined("""
        with arena.draft(100 << 20) as draft:
            for number in range(100):
                draft.write(number << 20, data)
            block = draft.seal()
        """)
    assert confined("block.view(99 << 20, 1 << 20) == data")


def test_concurrent_writers_do_not_rely_on_the_same_head_room(confined: Process) -> None:
    """Four writers together want more memory than the group has left, and none of them is killed."""
    confined("arena = Arena.create(1 << 30); at, arena_id = arena.segment.whereabouts, arena.arena_id")
    writers = [confined.fork() for _ in range(4)]
    for writer in writers:
        # Memory that was never written takes no pages.
        writer("arena = Arena.attach(at, arena_id); data = memoryview(np.zeros(100 << 20, np.uint8))")
    write = "with arena.draft(100 << 20) as draft: draft.write(0, data); block = draft.seal()"
    for _ in range(3):
        for writer in writers:
            writer.begin(f"try:\n    {write}\nexcept NoHeadRoom:\n    block = None")
        for writer in writers:
            writer.end()  # fails if the writer was killed
            writer("block and block.close()")
    wait_until(lambda: confined("arena.stats().used") == 0, "all blocks are released")
    writers[0](write)


FILL_AND_RELEASE = """
    import collections, time
    kept, written, refused = collections.deque(), 0, 0
    until = time.monotonic() + seconds
    # Where processors are scarce, a writer needs longer for its first values.
    while time.monotonic() < until or (written <= 5 and time.monotonic() < until + 15):
        try:
            with arena.draft(len(data)) as draft:
                draft.write(0, data)
                kept.append(draft.seal())
            written += 1
        except ArenaFull:
            refused += 1
            if kept:
                kept.popleft().close()
        if len(kept) > 8:
            kept.popleft().close()
    assert all(block.view(0, 4) == data[:4] for block in kept)
    while kept:
        kept.pop().close()
    """


@pytest.mark.slow
def test_two_arenas_that_compete_for_memory_both_go_on(confined: Process) -> None:
    """Each of two clusters could fill the control group alone; values are refused, and no process is killed."""
    confined("data = memoryview(np.full(32 << 20, 7, np.uint8))")
    owners = [confined.fork(), confined.fork()]
    writers = list(owners)
    for owner in owners:
        where = owner("arena = Arena.create(1 << 30, warm=4)") or owner("arena.segment.whereabouts, arena.arena_id")
        writers.append(confined.fork())
        writers[-1]("arena = Arena.attach(*where, warm=4)", where=where)
    for writer in writers:
        writer.begin(FILL_AND_RELEASE, seconds=5)
    for writer in writers:
        writer.end()  # fails if the writer was killed
    assert all(writer("written") > 5 for writer in writers)
    assert sum(writer("refused") for writer in writers) > 0


def test_head_room_for_the_next_step_of_another_writer_is_left(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other writer may have read the head-room before its pages exist; once they do, they are not counted again."""
    with arena.draft(MIB // 4) as other, arena.draft(MIB // 4) as mine:
        monkeypatch.setattr(limits, "head_room", lambda: MIB // 2 - 1)
        with pytest.raises(NoHeadRoom):
            mine.write(0, memoryview(bytes(MIB // 4)))
        monkeypatch.setattr(limits, "head_room", lambda: MIB // 2)
        other.write(0, memoryview(bytes(MIB // 4)))
        monkeypatch.setattr(limits, "head_room", lambda: MIB // 4)
        mine.write(0, memoryview(bytes(MIB // 4)))


def test_a_long_reservation_reads_the_head_room_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sealing makes the unwritten pages of a draft in the same steps as a write does."""
    asked = []
    monkeypatch.setattr(limits, "head_room", lambda: asked.append(threading.current_thread()) or 1 << 40)
    arena = Arena.create(256 * MIB)
    with arena.draft(200 * MIB) as draft:
        draft.seal().close()
    arena.close()
    # Where this takes long, the housekeeping thread asks, too.
    assert asked.count(threading.current_thread()) == 4


def test_warm_pages_are_given_back_before_a_draft_is_refused(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free pages elsewhere in the arena are of more use to the new block."""
    first, kept = publish(arena, b"x" * (MIB // 4)), publish(arena, b"k" * (MIB // 4))
    first.close()
    wait_until(lambda: arena.stats().used == MIB // 4, "the first block is free")
    resident = arena.stats().resident
    monkeypatch.setattr(limits, "head_room", lambda: MIB // 2 if arena.stats().resident < resident else 0)
    with publish(arena, b"y" * (MIB // 2)) as block:
        assert block.view(0, 3) == b"yyy"
    assert kept.view(0, 3) == b"kkk"
    kept.close()


def test_warm_pages_are_written_even_without_head_room(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such pages exist already, so no new memory is needed; when head-room returns, new pages are made again."""
    monkeypatch.setattr(housekeeping, "_INTERVAL_S", 3600)  # its thread would give the pages back
    publish(arena, b"x" * (MIB // 4)).close()
    wait_until(lambda: arena.stats().used == 0, "the block is free")
    monkeypatch.setattr(limits, "head_room", lambda: 0)
    publish(arena, b"y" * (MIB // 4)).close()
    with pytest.raises(NoHeadRoom):
        publish(arena, b"z" * (MIB // 2))
    monkeypatch.undo()
    publish(arena, b"z" * (MIB // 2)).close()


def test_warm_pages_are_given_back_if_the_file_system_is_full(in_small_shm: Process) -> None:
    """Free pages elsewhere in the arena are given back before a value is refused for lack of pages."""
    in_small_shm("""
        arena = Arena.create(12 << 20, warm=1 << 30)
        first, kept = publish(arena, b"x" * (4 << 20)), publish(arena, b"k" * (1 << 20))
        first.close()
        while arena.stats().used > 1 << 20:
            pass
        free = os.statvfs("/dev/shm").f_bavail * 4096
        with open("/dev/shm/of somebody else", "wb") as file:
            file.write(bytes(free - (1 << 20)))
        """)
    assert in_small_shm("arena.segment.kind") == "POSIX shared memory"
    in_small_shm("second = publish(arena, b'y' * (9 << 19))")
    assert in_small_shm("second.view(9 * (1 << 19) - 3, 3) == b'yyy' and kept.view(0, 3) == b'kkk'")
    with pytest.raises(MemoryExhausted, match="make room in /dev/shm"):
        in_small_shm("publish(arena, b'z' * (3 << 20))")
    in_small_shm("os.unlink('/dev/shm/of somebody else'); publish(arena, b'z' * (3 << 20)).close()")
    in_small_shm("second.close(); kept.close(); arena.close()")
