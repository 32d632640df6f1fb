"""Stray writes into shared memory, truncated memory and foreign files are detected, and harm no process."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from other_processes import JOIN, Process, join, publish, wait_until

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.block import Descriptor
from dask_shm_plugin.exceptions import ArenaUnavailable, SharedMemoryError, StaleBlock, TableCorrupt
from dask_shm_plugin.linux import segment
from dask_shm_plugin.node import membership, rendezvous
from dask_shm_plugin.table import layout, members, state_word
from dask_shm_plugin.table.layout import BlockId, Extent
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.table.state_word import DRAFT, FREE, SEALED
from dask_shm_plugin.table.table import Table
from dask_shm_plugin.units import PAGE

NOBODY = 65534
MANY = (1 << 64) - 1
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to run a process as another user")


def overwrite(arena: Arena, word: int, value: int) -> None:
    """Overwrite a word of a table, as a stray write does."""
    os.pwrite(arena.segment.fd, value.to_bytes(8, "little"), 8 * word)


def read(arena: Arena, word: int) -> int:
    """Read a word of a table."""
    return int.from_bytes(os.pread(arena.segment.fd, 8, 8 * word), "little")


def word_of(row: BlockId, what: int = 0) -> int:
    """Return where a word of a block's row lies."""
    return layout.BLOCKS_AT + 8 * row.index + what


@pytest.fixture
def expect_damage(arena: Arena, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[..., None]]:
    """Publish a block, and return a function that checks that this process detects damage and stops using the arena."""
    block = publish(arena, b"mine" * 1000)
    views = [block.view(0, 4000)]
    caplog.set_level(logging.WARNING, "dask_shm_plugin")

    def logged() -> list[str]:
        return [record.levelname for record in caplog.records if record.name.startswith("dask_shm_plugin")]

    def check(change: Callable[[], object] = arena.inspect) -> None:
        with pytest.raises(TableCorrupt):
            change()
        assert arena.is_damaged
        for again in (
            lambda: arena.draft(1),
            lambda: arena.attach_block(block.descriptor),
            arena.roster.roles,
            arena.inspect,
        ):
            with pytest.raises(SharedMemoryError):
                again()
        assert not arena.roster.is_live(arena.member)
        assert arena.stats().capacity == 0
        assert bytes(views[0]) == b"mine" * 1000
        wait_until(logged, "the damage is logged")  # perhaps by the housekeeping thread
        assert logged() == ["WARNING"]
        views.clear()
        block.close()
        wait_until(lambda: arena.has_left, "the process has left the arena")

    check.block = block  # type: ignore[attr-defined]
    yield check
    views.clear()
    block.close()


class TestTags:
    """The tag of a row detects changes of the row."""

    BODY = (3 * PAGE, 2 * PAGE, 5000, 7, 99)

    @pytest.mark.parametrize("state", [DRAFT, SEALED])
    def test_every_change_of_one_bit_is_detected(self, state: int) -> None:
        """The tag covers each word that holds the place, the owner or the state of a block."""
        row = np.array([state_word.pack(12, state, self.BODY), *self.BODY, 0, 0], np.uint64)
        assert state_word.are_sound(row[None])
        for word in range(state_word.WORDS):
            for bit in range(64):
                other = row.copy()
                other[word] ^= np.uint64(1 << bit)
                assert not state_word.are_sound(other[None]), (word, bit)
                assert not state_word.is_sound(int(other[0]), other[1:6].tolist()), (word, bit)

    def test_the_tag_of_a_free_row_covers_its_state_word_only(self) -> None:
        """A member may have died while it wrote the other words, so they have no meaning."""
        row = np.array([state_word.pack(12, FREE), *self.BODY, 0, 0], np.uint64)
        assert state_word.are_sound(np.stack([row, row[::-1] * 0 + row]))
        for bit in range(64):
            other = row.copy()
            other[0] ^= np.uint64(1 << bit)
            assert not state_word.are_sound(other[None]), bit

    def test_a_row_of_zeros_is_not_sound(self) -> None:
        """Zeros are the most likely content of a stray write."""
        assert not state_word.are_sound(np.zeros((1, 8), np.uint64))


class TestTable:
    """After a stray write into the table, a process detects the damage before it acts on the changed word."""

    @pytest.mark.parametrize("what", range(6))
    @pytest.mark.parametrize("value", [3 * PAGE, 1 << 40, MANY])
    def test_a_changed_row_is_detected_before_a_draft_is_placed(
        self, expect_damage: Callable[..., None], arena: Arena, what: int, value: int
    ) -> None:
        """A draft that was placed by a changed row could overlap another block."""
        overwrite(arena, word_of(expect_damage.block.row, what), value)
        expect_damage(lambda: arena.draft(PAGE))

    @pytest.mark.parametrize("what", [1, 2, 3])
    def test_a_block_with_a_changed_extent_or_size_is_not_mapped(
        self, expect_damage: Callable[..., None], arena: Arena, what: int
    ) -> None:
        """The changed extent may end behind the segment, or include another block."""
        row = expect_damage.block.row
        overwrite(arena, word_of(row, what), read(arena, word_of(row, what)) + PAGE)
        expect_damage(lambda: arena.attach_block(Descriptor(arena.arena_id, row)))

    @pytest.mark.parametrize("what", range(3, 6))
    def test_a_draft_whose_row_was_changed_is_not_sealed(
        self, expect_damage: Callable[..., None], arena: Arena, what: int
    ) -> None:
        """Sealing would write a valid tag over the changed row."""
        draft = arena.draft(PAGE)
        overwrite(arena, word_of(draft._hold.row, what), 1 << 20)
        expect_damage(draft.seal)

    def test_a_block_whose_state_was_changed_to_free_is_not_overwritten(
        self, expect_damage: Callable[..., None], arena: Arena
    ) -> None:
        """Only the state of the row was changed, so its tag does not fit."""
        word = word_of(expect_damage.block.row)
        overwrite(arena, word, read(arena, word) & ~3)
        expect_damage(lambda: arena.draft(PAGE))

    def test_a_new_row_that_was_zeroed_is_not_taken_for_an_unused_one(
        self, expect_damage: Callable[..., None], arena: Arena, joined: Callable[[], Process]
    ) -> None:
        """A member that has not read the new row before must not take its zeros for a row that was never used."""
        other = joined()
        overwrite(arena, word_of(BlockId(*other("(theirs := publish(arena, b'theirs')).row"))), 0)
        expect_damage(lambda: arena.draft(PAGE))
        other.kill()

    @pytest.mark.parametrize("rows", [0, layout.BLOCKS + 1, MANY])
    def test_a_changed_number_of_rows_is_detected(
        self, expect_damage: Callable[..., None], arena: Arena, rows: int
    ) -> None:
        """With too small a number, the blocks in all rows beyond it would look free and be overwritten."""
        overwrite(arena, layout.ROWS_WORD, rows)
        expect_damage(lambda: arena.draft(PAGE))

    def test_a_new_member_detects_a_number_of_rows_that_is_too_small(
        self, table: Table, buffer: memoryview, alice: Member
    ) -> None:
        """It has not seen the number before, but finds a row in use directly behind the last counted one."""
        table.reserve(Extent(0, PAGE), 1, alice)
        buffer.cast("Q")[layout.ROWS_WORD] = 0
        with pytest.raises(TableCorrupt, match="rows"):
            Table(buffer).check()

    def test_reads_without_the_mutex_do_not_raise_on_any_number_of_rows(
        self, table: Table, buffer: memoryview, alice: Member
    ) -> None:
        """Another member may be adding a row at that moment, so these reads are only estimates."""
        row = table.reserve(Extent(0, PAGE), 1, alice)
        table.check(alice)
        for rows in (0, 2, MANY):
            buffer.cast("Q")[layout.ROWS_WORD] = rows
            (
                table.share(alice),
                table.blocks.drafts(),
                table.blocks.is_trimmed(),
                table.blocks.taken_by_now(),
                table.has_drafts(alice),
            )
            table.count_holders([row])

    @pytest.mark.parametrize("word", [layout.MAGIC_WORD, layout.CAPACITY_WORD])
    def test_a_changed_header_is_detected_by_the_next_operation(
        self, expect_damage: Callable[..., None], arena: Arena, word: int
    ) -> None:
        """Each operation checks the header of the table first."""
        overwrite(arena, word, read(arena, word) + PAGE)
        expect_damage(lambda: arena.roster.add_role("worker", "tcp://here"))

    def test_a_member_whose_entry_was_cleared_detects_it(
        self, expect_damage: Callable[..., None], arena: Arena
    ) -> None:
        """Other members would not count its claims."""
        overwrite(arena, layout.MEMBERS_AT + members._ENTRY * arena.member.slot, 0)
        expect_damage()

    def test_a_cleared_claim_is_detected_by_the_housekeeping_thread(
        self, expect_damage: Callable[..., None], arena: Arena
    ) -> None:
        """The housekeeping thread checks the table once a second, so no other call is needed."""
        overwrite(arena, layout.claims_offset(arena.member.slot) // 8 + expect_damage.block.row.index, 0)
        wait_until(lambda: arena.is_damaged, "the housekeeping thread has checked the table")
        expect_damage()

    def test_the_claims_of_a_member_whose_entry_was_cleared_still_count(
        self, arena: Arena, joined: Callable[[], Process]
    ) -> None:
        """Otherwise a block would be freed while that member reads it."""
        other = joined()
        block = publish(arena, b"x" * PAGE)
        other("block = arena.attach_block(at); view = block.view(0, 10)", at=block.descriptor)
        word = layout.MEMBERS_AT + members._ENTRY * other("arena.member.slot")
        overwrite(arena, word, read(arena, word) & ~1)
        block.close()
        arena.holdings.tidy()
        assert publish(arena, b"y" * PAGE).close() is None
        arena.holdings.tidy()
        assert other("bytes(view)") == b"x" * 10
        overwrite(arena, word, read(arena, word) | 1)
        with contextlib.suppress(SharedMemoryError):
            other("del view; block.close(); arena.close()")

    def test_a_claim_on_a_future_generation_is_detected(self, expect_damage: Callable[..., None], arena: Arena) -> None:
        """The number of holders is unknown then, so the block is not freed."""
        block = publish(arena, b"x")
        overwrite(arena, layout.MEMBERS_AT + members._ENTRY * 9 + 1, 1)
        overwrite(arena, layout.claims_offset(9) // 8 + block.row.index, 1 << 50)
        block.close()
        arena.holdings.tidy()
        assert arena.is_damaged
        expect_damage()

    def test_counters_at_their_limit_do_not_crash(self, arena: Arena, table: Table, buffer: memoryview) -> None:
        """The trim counter starts again at zero, and a join beyond the last incarnation is refused."""
        overwrite(arena, layout.TRIMS_WORD, MANY)
        publish(arena, b"x").close()
        arena.holdings.tidy()
        assert arena.stats().blocks == 0  # whichever thread has released it
        arena.trimmer.trim_all()
        assert not arena.is_damaged
        assert table.trims < MANY
        buffer.cast("Q")[layout.INCARNATION_WORD] = MANY
        with pytest.raises(TableCorrupt, match="incarnation"):
            table.join(0, 1, 1)

    def test_a_damaged_arena_is_not_joined(self, arena: Arena, process: Callable[[], Process]) -> None:
        """A process that joins checks all rows before it becomes a member."""
        block = publish(arena, b"x")
        before = read(arena, word_of(block.row, 1))
        overwrite(arena, word_of(block.row, 1), PAGE)
        with pytest.raises(TableCorrupt):
            process()("Arena.attach(at, arena_id)", at=arena.segment.whereabouts, arena_id=arena.arena_id)
        overwrite(arena, word_of(block.row, 1), before)
        block.close()

    def test_a_member_that_left_a_damaged_arena_is_reclaimed_by_the_others(
        self, arena: Arena, joined: Callable[[], Process]
    ) -> None:
        """Such a member clears no entry; without views it drops its lock, and the others reclaim its blocks."""
        other = joined()
        other("draft = arena.draft(1); draft.write(0, memoryview(b'x')); block = draft.seal(); view = block.view(0, 1)")
        slot = other("arena.member.slot")
        word = layout.claims_offset(slot) // 8 + other("block.row.index")
        claim = read(arena, word)
        overwrite(arena, word, 0)
        wait_until(lambda: other("arena.is_damaged"), "the other member has detected the damage")
        overwrite(arena, word, claim)
        assert arena.roster.reclaim_dead() is False
        assert other("bytes(view)") == b"x"
        other("del view; block.close()")
        wait_until(lambda: other("arena.has_left"), "the other member has left")
        wait_until(
            lambda: arena.roster.reclaim_dead() or arena.stats().used == 0, "the block of the other member is free"
        )
        assert arena.stats().members == 1


class TestBlock:
    """A descriptor may contain any numbers."""

    def test_bytes_of_an_earlier_block_on_the_last_page_cannot_be_read(self, arena: Arena) -> None:
        """A block ends where its bytes end, not where its pages do."""
        publish(arena, b"secret" * 600).close()
        arena.holdings.tidy()
        with publish(arena, b"short") as block, arena.attach_block(block.descriptor) as again:
            for one in (block, again):
                assert bytes(one.view(0, 5)) == b"short"
                for take in (one.view, one.read):
                    with pytest.raises(ValueError, match="not in a block of 5"):
                        take(0, 6)

    @pytest.mark.parametrize("index", [-1, layout.BLOCKS, MANY, 1 << 200])
    @pytest.mark.parametrize("generation", [-1, 0, 1, MANY, 1 << 200])
    def test_the_descriptor_of_a_block_that_never_existed_is_stale(
        self, arena: Arena, index: int, generation: int
    ) -> None:
        """Any index and generation are handled, even beyond 64 bits."""
        with pytest.raises(StaleBlock):
            arena.attach_block(Descriptor(arena.arena_id, BlockId(index, generation)))


class TestSegment:
    """The segment was truncated, or another file is in its place."""

    @pytest.mark.parametrize("size", [0, PAGE, layout.TABLE_BYTES, layout.TABLE_BYTES + PAGE])
    def test_a_truncated_segment_is_detected_before_it_is_accessed(
        self, process: Callable[[], Process], size: int
    ) -> None:
        """Access behind the end of the segment would end the process with SIGBUS."""
        one, two = process(), process()
        one("arena = Arena.create(1 << 20, warm=1 << 20)")
        one("draft = arena.draft(9); draft.write(0, memoryview(b'x')); block = draft.seal()")
        at, arena_id, name = one("arena.segment.whereabouts, arena.arena_id, block.descriptor")
        two("arena = Arena.attach(at, arena_id)", at=at, arena_id=arena_id)
        process()("os.truncate(f'/proc/{at.pid}/fd/{at.fd}', size)", at=at, size=size)
        for other, lines in ((two, "arena.attach_block(name)"), (one, "arena.draft(1)"), (one, "block.view(0, 1)")):
            with pytest.raises(SharedMemoryError, match="short"):
                other(lines, name=name)
            assert other("arena.is_damaged")
        with pytest.raises(SharedMemoryError):
            process()("Arena.attach(at, arena_id)", at=at, arena_id=arena_id)

    def test_a_kept_mapping_of_a_truncated_segment_is_not_reused(self, process: Callable[[], Process]) -> None:
        """Access to it would end in SIGBUS, as with a new mapping."""
        one = process()
        one("arena = Arena.create(1 << 21, warm=1 << 21); block = publish(arena, bytes(1 << 20))")
        one("view = block.view(0, 1 << 20); del view; arena.holdings.tidy()")
        assert one("len(arena.holdings.mappings)") == 1
        process()("os.truncate(f'/proc/{at.pid}/fd/{at.fd}', 0)", at=one("arena.segment.whereabouts"))
        with pytest.raises(SharedMemoryError, match="short"):
            one("block.view(0, 1 << 20)")

    def test_a_memfd_cannot_be_truncated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its size is sealed, and so are its seals; pages can still be given back."""
        monkeypatch.setattr(segment, "_posix_memory_free", lambda: 0)
        one = segment.Segment.create(4 * PAGE)
        for size in (0, 3 * PAGE, 5 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(one.fd, size)
        one.write(0, memoryview(b"x" * 4 * PAGE))
        one.give_back(0, PAGE)
        assert one.resident == 3 * PAGE
        one.close()

    def test_a_foreign_file_is_refused_as_an_arena(self, tmp_path: Path) -> None:
        """A file may have the expected identity, and no table in it."""
        file = tmp_path / "file"
        file.write_bytes(b"x" * 100)
        os.truncate(file, 1 << 28)
        with file.open("r+b") as opened:
            status = os.fstat(opened.fileno())
            at = segment.Whereabouts(os.getpid(), opened.fileno(), status.st_dev, status.st_ino)
            with pytest.raises(SharedMemoryError):
                Arena.attach(at, bytes(16))
            os.truncate(file, 10)
            with pytest.raises(SharedMemoryError):
                Arena.attach(at, bytes(16))


class TestRendezvous:
    """The content of a rendezvous may be wrong."""

    def test_a_rendezvous_that_leads_to_another_clusters_arena_is_refused(self, cluster: str) -> None:
        """A process that opened its own arena a second time would lose its locks on it."""
        arena = join(cluster)
        second = Path(f"/dev/shm{rendezvous.name_for(cluster + '-second')}")
        second.touch(0o600)
        second.write_bytes(Path(f"/dev/shm{rendezvous.name_for(cluster)}").read_bytes())
        try:
            with pytest.raises(ArenaUnavailable, match="leads to"):
                join(f"{cluster}-second")
        finally:
            second.unlink(missing_ok=True)
        publish(arena, b"x").close()

    def test_a_list_of_too_many_members_is_cut_to_the_newest(self, name: str) -> None:
        """The writer itself is the newest, and stays in the list so that others can find it."""
        meeting = rendezvous.enter(name, create=True)
        assert meeting is not None
        own = rendezvous.Listed(4, 5, 6)
        meeting.write(rendezvous.Meeting(bytes(16), 1, 2, (*[rendezvous.Listed(1, 2, 3)] * 999, own)))
        said = meeting.read()
        assert said is not None
        assert len(said.listed) == layout.MEMBERS
        assert said.listed[-1] == own
        meeting.close()

    @pytest.mark.parametrize("comes", ["an older one", "a newer one"])
    def test_two_versions_of_the_package_do_not_share_an_arena(
        self, cluster: str, process: Callable[[], Process], comes: str
    ) -> None:
        """In either order, the second process detects the other version and changes nothing."""
        other = process()
        other("""
            layout.VERSION += change
            layout.MAGIC += change << 56
            """, change=1 if comes == "an older one" else -1)  # fmt: skip
        other(JOIN, cluster=cluster)
        path = Path(f"/dev/shm{rendezvous.name_for(cluster)}")
        before = path.read_bytes()
        with pytest.raises(ArenaUnavailable, match="another version"):
            join(cluster)
        assert path.read_bytes() == before
        assert other("arena.stats().members") == 1
        other("membership.leave(cluster, 'worker', f'tcp://{os.getpid()}')")
        join(cluster)
        with pytest.raises(ArenaUnavailable, match="another version"):
            other(JOIN)

    def test_a_damaged_arena_is_not_joined_again_by_the_same_process(self, cluster: str) -> None:
        """It is refused to another role of this process, and avoided after the last role has ended while views live."""
        arena = join(cluster)
        view = publish(arena, b"x" * 100)
        overwrite(arena, layout.MAGIC_WORD, 0)
        with pytest.raises(TableCorrupt):
            arena.inspect()
        with pytest.raises(TableCorrupt):
            join(cluster, "client", "tcp://there")
        membership.leave(cluster, "nanny", "tcp://here")
        again = join(cluster)
        assert again.arena_id != arena.arena_id
        view.close()
        wait_until(lambda: arena.has_left, "the process has left the first arena")


@root
class TestAnotherUser:
    """Another user is represented by a process with another user id."""

    @pytest.fixture
    def other_user(self, process: Callable[[], Process]) -> Process:
        """Start another user's process; modules are imported before, because that user may not be able to read them."""
        other = process()
        other(
            """
            import ctypes, posix_ipc
            os.setgroups([])
            os.setresgid(nobody, nobody, nobody)
            os.setresuid(nobody, nobody, nobody)
            ctypes.CDLL(None).prctl(dumpable, 1, 0, 0, 0)
            """,
            nobody=NOBODY,
            dumpable=4,
        )
        assert other("os.getuid(), os.geteuid()") == (NOBODY, NOBODY)
        return other

    def test_another_user_can_neither_open_nor_remove_anything(self, cluster: str, other_user: Process) -> None:
        """Neither the rendezvous, nor the segment, nor the memory of the process is accessible under any path."""
        arena = join(cluster)
        name = f"/dev/shm{rendezvous.name_for(cluster)}"
        for path in (name, f"/proc/{os.getpid()}/fd/{arena.segment.fd}", f"/proc/{os.getpid()}/mem"):
            for flags in (os.O_RDONLY, os.O_RDWR):
                with pytest.raises(PermissionError):
                    other_user("os.close(os.open(path, flags))", path=path, flags=flags)
        with pytest.raises(PermissionError):
            other_user("os.unlink(name)", name=name)
        with pytest.raises(ArenaUnavailable):
            other_user("Arena.attach(at, arena_id)", at=arena.segment.whereabouts, arena_id=arena.arena_id)
        assert os.fstat(arena.segment.fd).st_mode & 0o777 == 0o600

    def test_another_user_of_the_same_cluster_has_an_arena_of_its_own(self, cluster: str, other_user: Process) -> None:
        """The name of a rendezvous contains the user id, and each user purges only its own names."""
        arena = join(cluster)
        other_user(JOIN, cluster=cluster)
        assert other_user("arena.arena_id") != arena.arena_id
        other_user("rendezvous.purge()")
        rendezvous.purge()
        assert other_user("arena.stats().members") == arena.stats().members == 1
        other_user("membership.leave(cluster, 'worker', f'tcp://{os.getpid()}')")

    @pytest.mark.parametrize("mode", [0o600, 0o666])
    def test_a_rendezvous_name_taken_by_another_user_is_reported_and_left_alone(
        self, cluster: str, other_user: Process, process: Callable[[], Process], mode: int
    ) -> None:
        """A process of this user goes on without sharing, and without delay."""
        victim = process()
        path = f"/dev/shm{rendezvous.name_for(cluster)}"
        other_user("os.close(os.open(path, os.O_CREAT | os.O_RDWR, mode)); os.chmod(path, mode)", path=path, mode=mode)
        for who in (join, lambda cluster: victim(JOIN, cluster=cluster)):
            with pytest.raises(ArenaUnavailable, match=path):
                who(cluster)
        assert os.stat(path).st_uid == NOBODY
        other_user("os.unlink(path)")
        join(cluster)
