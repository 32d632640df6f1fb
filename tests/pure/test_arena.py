"""An arena: space for blocks, shared by its members, used again as soon as nobody refers to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from other_processes import Process, publish, wait_until, wait_until_empty

from dask_shm_plugin.arena import Arena, ArenaStats
from dask_shm_plugin.block import Descriptor
from dask_shm_plugin.exceptions import (
    ArenaBusy,
    ArenaFull,
    ArenaUnavailable,
    MappingRefused,
    MembersFull,
    MemoryExhausted,
    StaleBlock,
    TableCorrupt,
)
from dask_shm_plugin.layout import MEMBERS, Row
from dask_shm_plugin.segment import PAGE, Segment

KIB = 1024
MIB = 1024 * KIB


class TestBeginning:
    """An arena is created by its first member and joined by the others."""

    def test_a_new_one_is_empty_and_has_one_member(self, arena: Arena) -> None:
        """Only the table takes memory."""
        stats = arena.stats()
        assert stats == ArenaStats(MIB, 0, stats.resident, 0, 1)
        assert 0 < stats.resident < 2 * MIB
        assert arena.roster.is_live(arena.member)
        assert arena.arena_id.hex()[:4] in repr(arena)

    def test_its_capacity_is_a_number_of_pages(self) -> None:
        """What is left over is not used."""
        arena = Arena.create(2 * PAGE + 17)
        assert arena.stats().capacity == 2 * PAGE
        arena.close()

    @pytest.mark.parametrize("capacity", [0, 1, PAGE - 1, -1])
    def test_no_capacity_is_no_arena(self, capacity: int) -> None:
        """The message names the setting."""
        with pytest.raises(ArenaUnavailable, match=r"shm\.capacity"):
            Arena.create(capacity)

    def test_each_has_a_name_of_its_own(self, arena: Arena) -> None:
        """Random, so that a descriptor of one means nothing in another."""
        other = Arena.create(MIB)
        assert len(arena.arena_id) == len(other.arena_id) == 16
        assert arena.arena_id != other.arena_id
        other.close()

    def test_others_join_it_as_members(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """All see the same, and know each other apart."""
        others = [joined() for _ in range(3)]
        members = {arena.member, *(other("arena.member") for other in others)}
        assert len(members) == arena.stats().members == others[0]("arena.stats().members") == 4
        assert all(arena.roster.is_live(member) for member in members)

    def test_joining_wants_the_very_arena(self, arena: Arena, process: Callable[[], Process]) -> None:
        """Its name must be the one that was told; whoever is refused leaves nothing behind."""
        other = process()
        open_before = other("len(os.listdir('/proc/self/fd'))")
        with pytest.raises(ArenaUnavailable, match="another arena"):
            other("Arena.attach(at, bytes(16))", at=arena.segment.whereabouts)
        assert arena.stats().members == 1
        assert other("len(os.listdir('/proc/self/fd'))") == open_before

    def test_a_segment_without_a_table_is_refused(self, process: Callable[[], Process], segment: Segment) -> None:
        """One that is too short, and one that holds something else."""
        other = process()
        with pytest.raises(ArenaUnavailable):
            other("Arena.attach(at, bytes(16))", at=segment.whereabouts)
        large = Segment.create(1 << 30)
        with pytest.raises(TableCorrupt):
            other("Arena.attach(at, bytes(16))", at=large.whereabouts)
        large.close()

    def test_there_are_only_so_many_places(self, arena: Arena, process: Callable[[], Process]) -> None:
        """Whoever comes too late is told so; a member that leaves makes room."""
        arena._access.run(lambda table: [table.join(slot, 1, 1) for slot in table.vacant()])
        other = process()
        with pytest.raises(MembersFull, match=str(MEMBERS)):
            other("Arena.attach(at, arena_id)", at=arena.segment.whereabouts, arena_id=arena.arena_id)
        arena.roster.reclaim_dead()
        assert arena.stats().members == 1
        other("arena = Arena.attach(at, arena_id, warm=1 << 20)")
        assert arena.stats().members == 2

    def test_a_place_is_free_as_soon_as_its_member_has_left(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """Even while the process lives on, and still remembers the arena."""
        first = joined()
        slot = first("arena.member.slot")
        first("arena.close()")
        assert joined()("arena.member.slot") == slot

    def test_a_place_that_somebody_holds_is_passed_over(
        self, arena: Arena, process: Callable[[], Process], joined: Callable[[], Process]
    ) -> None:
        """Whoever was killed while it joined may live on in a forked child: its place would never look dead."""
        other = process()
        other("segment = Segment.open(at)", at=arena.segment.whereabouts)
        assert other("liveness.hold(segment.fd, slot)", slot=arena.member.slot + 1)
        assert joined()("arena.member.slot") == arena.member.slot + 2

    def test_roles_are_seen_by_all(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """And go with their member."""
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

    def test_a_full_arena_says_so_and_names_the_remedy(self, arena: Arena) -> None:
        """Nothing is taken by an attempt that fails."""
        with publish(arena, bytes(MIB - PAGE)):
            with pytest.raises(ArenaFull, match=r"raise shm\.capacity"):
                arena.draft(PAGE + 1)
            with publish(arena, b"the last page"), pytest.raises(ArenaFull):
                arena.draft(1)
            assert arena.stats().used <= MIB

    def test_more_than_the_capacity_never_fits(self, arena: Arena) -> None:
        """Not even in an empty arena."""
        for size in (MIB + 1, 1 << 40):
            with pytest.raises(ArenaFull):
                arena.draft(size)

    def test_space_is_used_again_at_once(self, arena: Arena) -> None:
        """Whoever has closed its block can have its space, however busy the tidying thread is with it."""
        full = 0
        for _ in range(1000):
            try:
                with arena.draft(MIB) as draft:
                    draft.seal().close()
            except ArenaFull:
                full += 1
        assert full == 0

    def test_space_is_used_again_at_once_when_its_view_goes(self, arena: Arena) -> None:
        """The same, with a mapping that has to be given back first."""
        full = 0
        for _ in range(1000):
            try:
                with arena.draft(MIB) as draft, draft.seal() as block:
                    block.view(0, MIB)
            except ArenaFull:
                full += 1
        assert full == 0

    def test_it_can_be_filled_in_pieces_and_emptied_in_any_order(self, arena: Arena) -> None:
        """No piece gets in another's way."""
        for order in (1, -1):
            blocks = [publish(arena, bytes([number]) * 64 * KIB) for number in range(16)]
            assert arena.stats()[:2] == (MIB, MIB)
            assert all(block.view(0, 64 * KIB) == bytes([n]) * 64 * KIB for n, block in enumerate(blocks))
            for block in blocks[::order]:
                block.close()
            wait_until_empty(arena)
            arena.validate()

    def test_what_was_released_is_stale(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """Whatever lies in its place now: the descriptor means the old one."""
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
        """Nobody reads what is still being written."""
        other = joined()
        with arena.draft(PAGE), pytest.raises(StaleBlock):
            other("arena.attach_block(found)", found=Descriptor(arena.arena_id, Row(0, 1)))

    def test_a_descriptor_of_another_arena_is_stale(self, arena: Arena) -> None:
        """Even when the same row is in use here."""
        other = Arena.create(MIB)
        with publish(arena, b"here") as here, publish(other, b"there") as there:
            assert here.row == there.row
            with pytest.raises(StaleBlock, match="another arena"):
                arena.attach_block(there.descriptor)
        other.close()

    @pytest.mark.parametrize("row", [Row(-1, 1), Row(10**9, 1), Row(0, 0), Row(0, 2**62)])
    def test_a_descriptor_of_nothing_is_stale(self, arena: Arena, row: Row) -> None:
        """Numbers that came over the wire may be anything."""
        with publish(arena, b"x"), pytest.raises(StaleBlock):
            arena.attach_block(Descriptor(arena.arena_id, row))
        wait_until_empty(arena)

    def test_a_busy_table_is_an_exception_and_loses_nothing(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """What is dropped meanwhile is given back when the table is free again."""
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
    """What the kernel refuses is an exception, and leaves everything as it was."""

    def test_mappings_cost_no_descriptors(self, joined: Callable[[], Process]) -> None:
        """Thousands of views under a small ``ulimit -n``."""
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

    def test_a_mapping_that_is_refused_leaves_no_reference(self, process: Callable[[], Process]) -> None:
        """``ulimit -v``: the value is received as bytes then."""
        other = process()
        other("""
            arena = Arena.create(1 << 32)
            with arena.draft(1 << 32) as draft:
                block = draft.seal()
            resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
            """)
        with pytest.raises(MappingRefused):
            other("block.view(0, 1 << 32)")
        assert other("len(views.ATLAS)") == 0
        other("block.close()")
        wait_until(lambda: other("arena.stats().used") == 0, "the arena is empty")

    def test_what_cannot_be_mapped_can_be_read(self, process: Callable[[], Process]) -> None:
        """A copy needs no mapping: the same bytes, private from the beginning."""
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

    def test_a_full_tmpfs_is_an_exception(self, in_small_shm: Process) -> None:
        """No SIGBUS: neither for a draft, nor for whoever joins; what was there is readable, and space is given back."""
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

    def test_a_small_shm_is_no_limit(self, in_small_shm: Process) -> None:
        """Where ``/dev/shm`` is too small for the capacity, the arena is a memfd, and others can join it as well."""
        in_small_shm("arena = Arena.create(64 << 20)")
        in_small_shm("block = publish(arena, os.urandom(56 << 20)); view = block.view(0, 56 << 20)")
        other = in_small_shm.fork()
        other("joined = Arena.attach(arena.segment.whereabouts, arena.arena_id)")
        other("same = joined.attach_block(block.descriptor)")
        assert other("hash(bytes(same.view(0, 56 << 20))) == hash(bytes(view))")
