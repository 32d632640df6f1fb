"""An arena is space for blocks, shared by its members; the space of a block is reused once no process refers to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from other_processes import Process, publish, wait_until, wait_until_empty

from dask_shm_plugin.arena import housekeeping
from dask_shm_plugin.arena.arena import Arena, ArenaStats
from dask_shm_plugin.arena.block import Descriptor
from dask_shm_plugin.arena.references import Hold
from dask_shm_plugin.exceptions import (
    ArenaBusy,
    ArenaFull,
    ArenaUnavailable,
    MappingRefused,
    MembersFull,
    MemoryExhausted,
    StaleBlock,
    TableCorrupt,
    TableFull,
)
from dask_shm_plugin.linux.segment import Segment
from dask_shm_plugin.table import layout
from dask_shm_plugin.table.layout import MEMBERS, BlockId, Extent
from dask_shm_plugin.table.table import Table
from dask_shm_plugin.units import PAGE

KIB = 1024
MIB = 1024 * KIB


class TestBeginning:
    """An arena is created by its first member, and other processes join it."""

    def test_a_new_arena_is_empty_and_has_one_member(self, arena: Arena) -> None:
        """A new arena contains no block, and only its table takes memory."""
        stats = arena.stats()
        assert stats == ArenaStats(MIB, 0, stats.resident, 0, 1)
        assert 0 < stats.resident < 2 * MIB
        assert arena.roster.is_live(arena.member)
        assert arena.arena_id.hex()[:4] in repr(arena)

    def test_the_capacity_is_rounded_down_to_whole_pages(self) -> None:
        """Blocks take whole pages, so a rest of less than one page is of no use."""
        arena = Arena.create(2 * PAGE + 17)
        assert arena.stats().capacity == 2 * PAGE
        arena.close()

    @pytest.mark.parametrize("capacity", [0, 1, PAGE - 1, -1])
    def test_a_capacity_below_one_page_is_refused(self, capacity: int) -> None:
        """No block would fit; the message names the setting to change."""
        with pytest.raises(ArenaUnavailable, match=r"shm\.capacity"):
            Arena.create(capacity)

    def test_each_arena_has_its_own_id(self, arena: Arena) -> None:
        """Each arena has a random id of 16 bytes, so that a descriptor of one arena is not valid in another."""
        other = Arena.create(MIB)
        assert len(arena.arena_id) == len(other.arena_id) == 16
        assert arena.arena_id != other.arena_id
        other.close()

    def test_other_processes_join_as_distinct_members(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """Each process that joins is a member of its own, and all members see the same number of members."""
        others = [joined() for _ in range(3)]
        members = {arena.member, *(other("arena.member") for other in others)}
        assert len(members) == arena.stats().members == others[0]("arena.stats().members") == 4
        assert all(arena.roster.is_live(member) for member in members)

    def test_attaching_with_the_wrong_arena_id_is_refused(self, arena: Arena, process: Callable[[], Process]) -> None:
        """The table must have the expected id; a refused process is no member and leaves no descriptor open."""
        other = process()
        open_before = other("len(os.listdir('/proc/self/fd'))")
        with pytest.raises(ArenaUnavailable, match="another arena"):
            other("Arena.attach(at, bytes(16))", at=arena.segment.whereabouts)
        assert arena.stats().members == 1
        assert other("len(os.listdir('/proc/self/fd'))") == open_before

    def test_a_segment_without_a_table_is_refused(self, process: Callable[[], Process], segment: Segment) -> None:
        """A segment that is too short for a table, and one that contains zeros, are both refused."""
        other = process()
        with pytest.raises(ArenaUnavailable):
            other("Arena.attach(at, bytes(16))", at=segment.whereabouts)
        large = Segment.create(1 << 30)
        with pytest.raises(TableCorrupt):
            other("Arena.attach(at, bytes(16))", at=large.whereabouts)
        large.close()

    def test_joining_an_arena_without_a_vacant_slot_is_refused(
        self, arena: Arena, process: Callable[[], Process]
    ) -> None:
        """The error names the number of slots; once dead members are reclaimed, the process can join."""
        arena._access.run(lambda table: [table.join(slot, 1, 1) for slot in table.vacant()])
        other = process()
        with pytest.raises(MembersFull, match=str(MEMBERS)):
            other("Arena.attach(at, arena_id)", at=arena.segment.whereabouts, arena_id=arena.arena_id)
        arena.roster.reclaim_dead()
        assert arena.stats().members == 1
        other("arena = Arena.attach(at, arena_id, warm=1 << 20)")
        assert arena.stats().members == 2

    def test_a_slot_is_vacant_as_soon_as_its_member_has_left(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """The slot is vacant even while the process lives on and still has the arena object."""
        first = joined()
        slot = first("arena.member.slot")
        first("arena.close()")
        assert joined()("arena.member.slot") == slot

    def test_a_vacant_slot_whose_lock_is_held_is_skipped(
        self, arena: Arena, process: Callable[[], Process], joined: Callable[[], Process]
    ) -> None:
        """A forked child may hold the lock of a dead process, and a member in that slot would never look dead."""
        other = process()
        other("segment = Segment.open(at)", at=arena.segment.whereabouts)
        assert other("locks.hold(segment.fd, slot)", slot=arena.member.slot + 1)
        assert joined()("arena.member.slot") == arena.member.slot + 2

    def test_roles_are_visible_to_all_members_and_end_with_their_member(
        self, arena: Arena, joined: Callable[[], Process]
    ) -> None:
        """Each member reads the roles of all members from the table; a member that leaves takes its roles with it."""
        other = joined()
        arena.roster.add_role("nanny", "tcp://a")
        other("arena.roster.add_role('worker', 'tcp://b')")
        expected = {(arena.member, "nanny", "tcp://a"), (other("arena.member"), "worker", "tcp://b")}
        assert set(arena.roster.roles()) == set(other("arena.roster.roles()")) == expected
        other("arena.close()")
        assert [role.kind for role in arena.roster.roles()] == ["nanny"]
        arena.roster.remove_role("nanny", "tcp://a")
        assert arena.roster.roles() == []


class TestSpace:
    """Space is taken by drafts and blocks, and by nothing else."""

    def test_a_full_arena_raises_an_error_that_names_the_setting(self, arena: Arena) -> None:
        """A draft that does not fit is refused, and the failed attempt takes no space."""
        with publish(arena, bytes(MIB - PAGE)):
            with pytest.raises(ArenaFull, match=r"raise shm\.capacity"):
                arena.draft(PAGE + 1)
            with publish(arena, b"the last page"), pytest.raises(ArenaFull):
                arena.draft(1)
            assert arena.stats().used <= MIB

    def test_a_draft_larger_than_the_capacity_never_fits(self, arena: Arena) -> None:
        """Such a draft is refused even in an empty arena."""
        for size in (MIB + 1, 1 << 40):
            with pytest.raises(ArenaFull):
                arena.draft(size)

    def test_a_draft_that_finds_no_free_row_releases_dropped_references(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The draft does not wait for the housekeeping thread, which usually releases them."""
        monkeypatch.setattr(housekeeping, "start", lambda *_: None)
        arena, holds = Arena.create((layout.BLOCKS + 1) * PAGE), []

        def take_all_rows(table: Table) -> None:
            for n in range(layout.BLOCKS):
                holds.append(Hold())
                arena.allocator._take(table, holds[-1], Extent(n * PAGE, PAGE), 1)

        arena._access.run(take_all_rows)
        with pytest.raises(TableFull, match="threshold"):
            arena.draft(1)
        holds.pop()
        with arena.draft(1):
            pass
        holds.clear()
        arena.close()
        assert arena.has_left

    def test_the_space_of_a_closed_block_is_reused_at_once(self, arena: Arena) -> None:
        """A process that has closed its block can reserve the space, whatever its housekeeping thread is doing."""
        full = 0
        for _ in range(1000):
            try:
                with arena.draft(MIB) as draft:
                    draft.seal().close()
            except ArenaFull:
                full += 1
        assert full == 0

    def test_the_space_of_a_viewed_block_is_reused_at_once(self, arena: Arena) -> None:
        """The space is reusable even though the mapping of the dropped view must be given back first."""
        full = 0
        for _ in range(1000):
            try:
                with arena.draft(MIB) as draft, draft.seal() as block:
                    block.view(0, MIB)
            except ArenaFull:
                full += 1
        assert full == 0

    def test_an_arena_is_filled_with_blocks_and_emptied_in_any_order(self, arena: Arena) -> None:
        """Blocks fill the arena to the last byte without overlap, and the order of their release does not matter."""
        for order in (1, -1):
            blocks = [publish(arena, bytes([number]) * 64 * KIB) for number in range(16)]
            assert arena.stats()[:2] == (MIB, MIB)
            assert all(block.view(0, 64 * KIB) == bytes([n]) * 64 * KIB for n, block in enumerate(blocks))
            for block in blocks[::order]:
                block.close()
            wait_until_empty(arena)
            arena.validate()

    def test_the_descriptor_of_a_released_block_is_stale(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """The descriptor stays stale even after a new block has taken the same row, in this process and in others."""
        other = joined()
        block = publish(arena, b"old")
        descriptor = block.descriptor
        block.close()
        wait_until_empty(arena)
        for one in (arena.attach_block, lambda found: other("arena.attach_block(found)", found=found)):
            with pytest.raises(StaleBlock):
                one(descriptor)
        with publish(arena, b"new") as new:
            assert new.row.index == descriptor.row.index
            for one in (arena.attach_block, lambda found: other("arena.attach_block(found)", found=found)):
                with pytest.raises(StaleBlock):
                    one(descriptor)

    def test_a_draft_cannot_be_attached(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """A draft is still being written, so no process may read it."""
        other = joined()
        with arena.draft(PAGE), pytest.raises(StaleBlock):
            other("arena.attach_block(found)", found=Descriptor(arena.arena_id, BlockId(0, 1)))

    def test_a_descriptor_of_another_arena_is_stale(self, arena: Arena) -> None:
        """A descriptor names its arena, so it is stale even if the same row is in use in this one."""
        other = Arena.create(MIB)
        with publish(arena, b"here") as here, publish(other, b"there") as there:
            assert here.row == there.row
            with pytest.raises(StaleBlock, match="another arena"):
                arena.attach_block(there.descriptor)
        other.close()

    @pytest.mark.parametrize("row", [BlockId(-1, 1), BlockId(10**9, 1), BlockId(0, 0), BlockId(0, 2**62)])
    def test_a_descriptor_with_an_invalid_row_is_stale(self, arena: Arena, row: BlockId) -> None:
        """Row numbers arrive over the network, so any value must be handled."""
        with publish(arena, b"x"), pytest.raises(StaleBlock):
            arena.attach_block(Descriptor(arena.arena_id, row))
        wait_until_empty(arena)

    def test_a_busy_table_raises_an_error_and_loses_no_release(
        self, arena: Arena, joined: Callable[[], Process]
    ) -> None:
        """References that are dropped while another process holds the mutex are released after it has left."""
        block, view = publish(arena, b"x"), publish(arena, b"y").view(0, 1)
        other = joined()
        other("enter(arena._mutex)")
        with pytest.raises(ArenaBusy):
            arena.draft(1)
        with pytest.raises(ArenaBusy):
            arena.attach_block(block.descriptor)
        block.close()
        del view
        assert not arena.holdings.tidy()
        other("leave(arena._mutex)")
        wait_until_empty(arena)


class TestLimits:
    """If the kernel refuses a resource, an exception is raised and the arena stays as it was."""

    def test_mappings_need_no_descriptors(self, joined: Callable[[], Process]) -> None:
        """A process can have thousands of views even with a small ``ulimit -n``."""
        other = joined()
        other("""
            block = publish(arena, bytes(range(256)) * 16)
            open_now = len(os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 3, open_now + 3))
            kept = [np.frombuffer(block.view(0, 4096), np.uint8) for _ in range(2000)]
            """)
        assert other("len(os.listdir('/proc/self/fd')) == open_now")
        assert other("all(view[255] == 255 for view in kept)")
        other("kept.clear(); block.close()")
        wait_until(lambda: other("arena.stats().used") == 0, "the arena is empty")

    def test_a_refused_mapping_leaves_no_reference(self, process: Callable[[], Process]) -> None:
        """A process under ``ulimit -v`` receives the value as bytes, so nothing of the failed view may stay."""
        other = process()
        other("""
            arena = Arena.create(1 << 32)
            with arena.draft(1 << 32) as draft:
                block = draft.seal()
            resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
            """)
        with pytest.raises(MappingRefused):
            other("block.view(0, 1 << 32)")
        assert other("len(ATLAS)") == 0
        other("block.close()")
        wait_until(lambda: other("arena.stats().used") == 0, "the arena is empty")

    def test_a_block_that_cannot_be_mapped_can_be_read(self, process: Callable[[], Process]) -> None:
        """A read needs no mapping: it copies the bytes of the block into private memory."""
        other = process()
        other("""
            arena = Arena.create(1 << 30)
            with arena.draft(300 << 20) as draft:
                draft.write(299 << 20, memoryview(b"the end"))
                block = draft.seal()
            in_use = int(open("/proc/self/statm").read().split()[0]) * 4096
            resource.setrlimit(resource.RLIMIT_AS, (in_use + (200 << 20),) * 2)
            """)
        with pytest.raises(MappingRefused):
            other("block.view(0, 300 << 20)")
        assert other("bytes(copy := block.read(299 << 20, 7))") == b"the end"
        other("copy[:3] = b'own'")
        assert other("bytes(block.read(299 << 20, 7))") == b"the end"
        other("block.close()")
        wait_until(lambda: other("arena.stats().used") == 0, "the arena is empty")

    def test_a_full_tmpfs_raises_an_exception_and_no_sigbus(self, in_small_shm: Process) -> None:
        """Neither a draft nor a joining process gets SIGBUS; existing blocks stay readable, and space is given back."""
        in_small_shm("""
            arena = Arena.create(8 << 20)
            block = publish(arena, b"kept")
            child_sees = arena.segment.whereabouts, arena.arena_id
            file = os.open("/dev/shm/of somebody else", os.O_CREAT | os.O_WRONLY)
            try:
                while os.write(file, bytes(4096)):
                    pass
            except OSError:
                os.close(file)
            """)
        assert in_small_shm("os.readlink(f'/proc/self/fd/{arena.segment.fd}')").startswith("/dev/shm/")
        with pytest.raises(MemoryExhausted):
            in_small_shm("publish(arena, bytes(1 << 20))")
        assert in_small_shm("bytes(block.view(0, 4))") == b"kept"
        other = in_small_shm.fork()
        with pytest.raises(MemoryExhausted):
            other("Arena.attach(*child_sees)")
        assert in_small_shm("arena.stats().members, arena.stats().blocks") == (1, 1)
        in_small_shm("os.unlink('/dev/shm/of somebody else')")
        other("joined = Arena.attach(*child_sees)")
        in_small_shm("publish(arena, bytes(1 << 20)).close(); arena.validate()")
        assert in_small_shm("arena.stats().members") == 2

    def test_an_arena_larger_than_dev_shm_is_a_memfd(self, in_small_shm: Process) -> None:
        """If ``/dev/shm`` is too small for the capacity, the arena is a memfd, and others can join it as well."""
        in_small_shm("arena = Arena.create(64 << 20)")
        in_small_shm("block = publish(arena, os.urandom(56 << 20)); view = block.view(0, 56 << 20)")
        other = in_small_shm.fork()
        other("joined = Arena.attach(arena.segment.whereabouts, arena.arena_id)")
        other("same = joined.attach_block(block.descriptor)")
        assert other("hash(bytes(same.view(0, 56 << 20))) == hash(bytes(view))")
