"""An observer sees an arena as it is: without a lock, without joining, and beside members that stand still."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from other_processes import JOIN, LEAVE, Process, wait_until

from dask_shm_plugin.linux.sightings import sightings
from dask_shm_plugin.monitor import arenas, text
from dask_shm_plugin.monitor.seen import BlockSeen, Snapshot
from dask_shm_plugin.node import membership, rendezvous

MIB = 1 << 20


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory, nothing_leaks: None) -> Iterator[Process]:
    """Start an interpreter from which the members are forked."""
    process = Process.start(tmp_path_factory.mktemp("meet"))
    yield process
    process.kill_all()


@pytest.fixture
def member(origin: Process) -> Iterator[Process]:
    """Start a process that is the only member of an arena, as a worker."""
    process = origin.fork()
    process(JOIN, cluster=secrets.token_hex(8))
    yield process
    process.kill_all()
    origin.forked.remove(process)
    rendezvous.purge()


def seen(process: Process) -> Snapshot:
    """Return the snapshot of the arena of a process."""
    arena = process("arena.arena_id.hex()")
    [found] = [one for one in arenas.snapshots() if one.arena == arena]
    return found


def only_block(found: Snapshot) -> BlockSeen:
    """Return the only block of an arena."""
    [block] = found.blocks
    return block


def test_an_arena_is_seen_as_its_members_see_it(member: Process) -> None:
    """Capacity, used and resident bytes, members and roles are the same."""
    member("block = publish(arena, bytes(10_000))")

    def as_said() -> Snapshot | None:
        found, said = seen(member), member("tuple(arena.stats())")
        is_same = (found.capacity, found.used, found.resident, len(found.blocks), len(found.members)) == said
        return found if is_same else None

    # The member makes pages for its labels once a second.
    found = wait_until(as_said, "the figures are the same")
    assert found is not None
    assert (found.used, len(found.blocks), len(found.members)) == (12_288, 1, 1)
    assert found.kind == member("arena.segment.kind")
    assert found.members[0].roles == [("worker", f"tcp://{member.pid}")]
    assert found.largest_fit == found.capacity - found.used
    assert found.age is not None
    assert found.age < 60
    block = only_block(found)
    assert (block.size, block.length, block.state) == (10_000, 12_288, "sealed")
    assert block.owner == f"worker tcp://{member.pid}"


def test_large_pages_are_measured_on_request(member: Process) -> None:
    """A small arena has none."""
    arena = member("arena.arena_id.hex()")
    assert seen(member).large is None
    assert [one.large for one in arenas.snapshots(measure_large=True) if one.arena == arena] == [0]


def test_the_observer_is_no_member_and_leaves_nothing(member: Process) -> None:
    """A look changes neither the members nor the descriptors of the observer."""
    before = set(os.listdir("/proc/self/fd"))
    seen(member)
    assert len(seen(member).members) == 1
    # Connections of earlier clusters of this process may be closed at any moment.
    wait_until(lambda: set(os.listdir("/proc/self/fd")) <= before, "there are no more descriptors than before")
    assert not membership.all_arenas()


def test_a_block_says_which_process_has_a_view(member: Process) -> None:
    """A mapped block has a view; one that is only referred to belongs to a message, or to a child."""
    member("block = publish(arena, bytes(10_000))")
    [holder] = only_block(seen(member)).holders
    assert holder.reason.startswith("a message is under way")
    member("view = arena.view(block.descriptor, 0, 10_000)")
    [holder] = only_block(seen(member)).holders
    assert holder.reason == f"a view lives in pid {member.pid}"


def test_a_label_names_the_key_of_a_block(member: Process) -> None:
    """A block without a label has neither key nor type nor shape."""
    member("block = publish(arena, bytes(10_000))")
    block = only_block(seen(member))
    assert (block.keys, block.type, block.shape) == ([], "", "")
    assert "only travelled" in "\n".join(text.blocks([block]))
    member("from dask_shm_plugin.arena.labels import Label")
    member("arena.labels.add(lambda: [Label((block.descriptor.row,), 'sum-1', 'numpy.ndarray', '3 int8')])")
    member("arena.labels.write()")
    block = only_block(seen(member))
    assert (block.keys, block.type, block.shape) == (["sum-1"], "numpy.ndarray", "3 int8")
    assert block.holders[0].reason == "worker holds key sum-1"


def test_a_draft_is_being_written(member: Process) -> None:
    """A draft is shown with its writer."""
    member("draft = arena.draft(10_000)")
    block = only_block(seen(member))
    assert block.state == "draft"
    assert [holder.reason for holder in block.holders] == ["it is being written"]


def test_a_forked_child_with_a_view_is_named(member: Process) -> None:
    """The parent has dropped its view, the child has not."""
    member("block = publish(arena, bytes(10_000)); view = arena.view(block.descriptor, 0, 10_000)")
    child = member.fork()
    member("del view")
    member("block.close(); gc.collect(); arena.holdings.tidy()")
    holders = {holder.pid: holder.reason for holder in only_block(seen(member)).holders}
    assert holders[child.pid] == "a forked child has a view of it"
    assert "a forked child may have a view" in holders[member.pid]
    child.kill()


def test_a_dead_member_is_called_dead_until_it_is_reclaimed(member: Process, origin: Process) -> None:
    """Its blocks are shown with the reason, and then are gone."""
    other = origin.fork()
    other(JOIN, cluster=member("cluster"))
    other("block = publish(arena, bytes(10_000))")
    member.stop()  # it would reclaim the dead
    try:
        other.kill()
        wait_until(lambda: other.pid not in [pid for one in sightings() for pid in one.descriptors], "it is gone")
        arena = next(one for one in arenas.snapshots() if member.pid in [seen.pid for seen in one.members])
        assert {seen.pid: seen.state for seen in arena.members} == {member.pid: "alive", other.pid: "dead"}
        assert {seen.pid: seen.is_stopped for seen in arena.members} == {member.pid: True, other.pid: False}
        assert "is dead" in only_block(arena).holders[0].reason
    finally:
        member.go_on()
        origin.forked.remove(other)
    wait_until(lambda: not seen(member).blocks, "the dead member is reclaimed")


def test_a_member_that_is_stopped_with_the_lock_does_not_stop_the_observer(member: Process) -> None:
    """The observer needs no lock."""
    member("block = publish(arena, bytes(10_000)); arena_id = arena.arena_id.hex()")
    arena = member("arena_id")
    member("enter(arena._mutex)")
    member.stop()
    try:
        [found] = [one for one in arenas.snapshots() if one.arena == arena]
        assert found.used == 12_288
        assert found.members[0].is_stopped
    finally:
        member.go_on()
    member("leave(arena._mutex)")


def test_an_arena_of_many_blocks_is_seen_at_once(member: Process) -> None:
    """The sizes of a thousand blocks add up."""
    member("blocks = [publish(arena, bytes(10)) for _ in range(200)]")
    found = seen(member)
    assert len(found.blocks) == 200
    assert sum(block.length for block in found.blocks) == found.used == member("arena.stats().used")


def test_a_member_sees_its_own_arena_and_stays_a_member() -> None:
    """Closing another descriptor of the file would drop the lock that proves it alive."""
    cluster = secrets.token_hex(8)
    arena = membership.join(cluster, "client", "here", capacity=lambda: MIB)
    assert arena is not None
    try:
        for _ in range(2):
            [found] = [one for one in arenas.snapshots() if one.arena == arena.arena_id.hex()]
            assert [one.state for one in found.members] == ["alive"]
    finally:
        membership.leave(cluster, "client", "here")


def test_what_is_left_of_a_segment_of_another_version_is_skipped(member: Process) -> None:
    """A table of another layout is not decoded."""
    arena = member("arena.arena_id.hex()")
    member("word = bytes(arena.segment.read(0, 8)); arena.segment.write(0, memoryview(bytes(8)))")
    assert arena not in [one.arena for one in arenas.snapshots()]
    member("arena.segment.write(0, memoryview(word))")
    member(LEAVE)


def test_processes_of_another_user_are_not_seen(member: Process, tmp_path: Path) -> None:
    """A user sees neither the arenas of others nor an error."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    other = Process.start(tmp_path)
    try:
        other("import posix_ipc, dask.utils; from dask_shm_plugin.monitor import arenas")
        other("os.setgid(65534); os.setuid(65534)")
        assert other("arenas.snapshots()") == []
    finally:
        other.kill_all()
