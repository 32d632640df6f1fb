"""Whatever somebody else has written, cut short or put in the place of ours: refused, and nobody is harmed by it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from other_processes import JOIN, Process, join, publish, wait_until

from dask_shm_plugin import layout, memberbook, membership, rendezvous, segment, stateword
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.block import Descriptor
from dask_shm_plugin.exceptions import ArenaUnavailable, SharedMemoryError, StaleBlock, TableCorrupt
from dask_shm_plugin.layout import Extent, Row
from dask_shm_plugin.memberbook import Member
from dask_shm_plugin.segment import PAGE
from dask_shm_plugin.stateword import DRAFT, FREE, SEALED
from dask_shm_plugin.table import Table

NOBODY = 65534
MANY = (1 << 64) - 1
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")


def scribble(arena: Arena, word: int, value: int) -> None:
    """Write into a table as somebody does who must not."""
    os.pwrite(arena.segment.fd, value.to_bytes(8, "little"), 8 * word)


def read(arena: Arena, word: int) -> int:
    """Read a word of a table."""
    return int.from_bytes(os.pread(arena.segment.fd, 8, 8 * word), "little")


def word_of(row: Row, what: int = 0) -> int:
    """Return where a word of a block's row lies."""
    return layout.BLOCKS_AT + 8 * row.index + what


@pytest.fixture
def scene(arena: Arena, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[..., None]]:
    """A process with a block and a view of it; what is returned insists that it keeps away, and that its view holds."""
    block = publish(arena, b"mine" * 1000)
    views = [block.view(0, 4000)]
    caplog.set_level(logging.WARNING, "dask_shm_plugin")

    def keeps_away(change: Callable[[], object] = arena.inspect) -> None:
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
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        views.clear()
        block.close()
        wait_until(lambda: arena.has_left, "it has left")

    keeps_away.block = block  # type: ignore[attr-defined]
    yield keeps_away
    views.clear()
    block.close()


class TestTags:
    """A row answers for itself."""

    BODY = (3 * PAGE, 2 * PAGE, 5000, 7, 99)

    @pytest.mark.parametrize("state", [DRAFT, SEALED])
    def test_every_change_of_one_bit_is_found(self, state: int) -> None:
        """In each word that says where a block is and whose."""
        row = np.array([stateword.pack(12, state, self.BODY), *self.BODY, 0, 0], np.uint64)
        assert stateword.are_sound(row[None])
        for word in range(stateword.WORDS):
            for bit in range(64):
                other = row.copy()
                other[word] ^= np.uint64(1 << bit)
                assert not stateword.are_sound(other[None]), (word, bit)
                assert not stateword.is_sound(int(other[0]), other[1:6].tolist()), (word, bit)

    def test_what_a_free_row_says_means_nothing(self) -> None:
        """A member may have died while it wrote there."""
        row = np.array([stateword.pack(12, FREE), *self.BODY, 0, 0], np.uint64)
        assert stateword.are_sound(np.stack([row, row[::-1] * 0 + row]))
        for bit in range(64):
            other = row.copy()
            other[0] ^= np.uint64(1 << bit)
            assert not stateword.are_sound(other[None]), bit

    def test_a_row_that_was_wiped_is_not_sound(self) -> None:
        """Zeros are what most accidents write."""
        assert not stateword.are_sound(np.zeros((1, 8), np.uint64))


class TestTable:
    """A word of the table was changed: who relies on it notices before it does anything."""

    @pytest.mark.parametrize("what", range(6))
    @pytest.mark.parametrize("value", [3 * PAGE, 1 << 40, MANY])
    def test_a_changed_row_is_not_gone_by(
        self, scene: Callable[..., None], arena: Arena, what: int, value: int
    ) -> None:
        """Neither for a new block, whose place would be wrong, nor for one that it names."""
        scribble(arena, word_of(scene.block.row, what), value)
        scene(lambda: arena.draft(PAGE))

    @pytest.mark.parametrize("what", [1, 2, 3])
    def test_a_block_whose_place_was_changed_is_not_mapped(
        self, scene: Callable[..., None], arena: Arena, what: int
    ) -> None:
        """It may lie behind the end of the memory, or be somebody else's."""
        row = scene.block.row
        scribble(arena, word_of(row, what), read(arena, word_of(row, what)) + PAGE)
        scene(lambda: arena.attach_block(Descriptor(arena.arena_id, row)))

    @pytest.mark.parametrize("what", range(3, 6))
    def test_a_draft_whose_row_was_changed_is_not_sealed(
        self, scene: Callable[..., None], arena: Arena, what: int
    ) -> None:
        """A seal would answer for what somebody else has written."""
        draft = arena.draft(PAGE)
        scribble(arena, word_of(draft._hold.row, what), 1 << 20)
        scene(draft.seal)

    def test_a_block_that_looks_free_is_not_written_over(self, scene: Callable[..., None], arena: Arena) -> None:
        """Its state alone was changed."""
        word = word_of(scene.block.row)
        scribble(arena, word, read(arena, word) & ~3)
        scene(lambda: arena.draft(PAGE))

    def test_a_new_block_of_another_that_looks_as_if_it_had_never_been_is_not_written_over(
        self, scene: Callable[..., None], arena: Arena, joined: Callable[[], Process]
    ) -> None:
        """Who has not seen it yet has seen nothing in its place, and must not believe it."""
        other = joined()
        scribble(arena, word_of(Row(*other("(theirs := publish(arena, b'theirs')).row"))), 0)
        scene(lambda: arena.draft(PAGE))
        other.kill()

    @pytest.mark.parametrize("rows", [0, layout.BLOCKS + 1, MANY])
    def test_rows_that_are_not_counted_are_not_written_over(
        self, scene: Callable[..., None], arena: Arena, rows: int
    ) -> None:
        """All blocks beyond would look free."""
        scribble(arena, layout.ROWS_WORD, rows)
        scene(lambda: arena.draft(PAGE))

    def test_a_newcomer_does_not_believe_too_few_rows(self, table: Table, buffer: memoryview, alice: Member) -> None:
        """It has seen none, but there is one where none should be."""
        table.reserve(Extent(0, PAGE), 1, alice)
        buffer.cast("Q")[layout.ROWS_WORD] = 0
        with pytest.raises(TableCorrupt, match="rows"):
            Table(buffer).check()

    def test_what_is_read_without_the_mutex_is_not_taken_for_damage(
        self, table: Table, buffer: memoryview, alice: Member
    ) -> None:
        """A row more or less may be in the making: with any number there, an estimate is an estimate."""
        row = table.reserve(Extent(0, PAGE), 1, alice)
        table.check(alice)
        for rows in (0, 2, MANY):
            buffer.cast("Q")[layout.ROWS_WORD] = rows
            (
                table.weigh(alice),
                table.blocks.drafts(),
                table.blocks.is_trimmed(),
                table.blocks.taken_by_now(),
                table.has_drafts(alice),
            )
            table.count_holders([row])

    @pytest.mark.parametrize("word", [layout.MAGIC_WORD, layout.CAPACITY_WORD])
    def test_a_changed_beginning_is_noticed(self, scene: Callable[..., None], arena: Arena, word: int) -> None:
        """Whatever is done next."""
        scribble(arena, word, read(arena, word) + PAGE)
        scene(lambda: arena.roster.add_role("worker", "tcp://here"))

    def test_a_member_that_was_crossed_out_notices(self, scene: Callable[..., None], arena: Arena) -> None:
        """The others would not count its claims."""
        scribble(arena, layout.MEMBERS_AT + memberbook._ENTRY * arena.member.slot, 0)
        scene()

    def test_a_claim_that_was_crossed_out_is_noticed_by_itself(self, scene: Callable[..., None], arena: Arena) -> None:
        """The tidying thread looks once a second; nothing else has to happen."""
        scribble(arena, layout.claims_offset(arena.member.slot) // 8 + scene.block.row.index, 0)
        wait_until(lambda: arena.is_damaged, "the thread has looked")
        scene()

    def test_a_claim_of_one_who_is_said_to_be_no_member_counts(
        self, arena: Arena, joined: Callable[[], Process]
    ) -> None:
        """A block that it looks at would be freed under its eyes."""
        other = joined()
        block = publish(arena, b"x" * PAGE)
        other("block = arena.attach_block(at); view = block.view(0, 10)", at=block.descriptor)
        word = layout.MEMBERS_AT + memberbook._ENTRY * other("arena.member.slot")
        scribble(arena, word, read(arena, word) & ~1)
        block.close()
        arena.holdings.tidy()
        assert publish(arena, b"y" * PAGE).close() is None
        arena.holdings.tidy()
        assert other("bytes(view)") == b"x" * 10
        scribble(arena, word, read(arena, word) | 1)
        with contextlib.suppress(SharedMemoryError):
            other("del view; block.close(); arena.close()")

    def test_a_claim_on_a_generation_to_come_is_noticed(self, scene: Callable[..., None], arena: Arena) -> None:
        """Nobody would know who holds the block; so it is not freed."""
        block = publish(arena, b"x")
        scribble(arena, layout.MEMBERS_AT + memberbook._ENTRY * 9 + 1, 1)
        scribble(arena, layout.claims_offset(9) // 8 + block.row.index, 1 << 50)
        block.close()
        arena.holdings.tidy()
        assert arena.is_damaged
        scene()

    def test_the_largest_numbers_are_no_crash(self, arena: Arena, table: Table, buffer: memoryview) -> None:
        """What is counted up begins anew, or is refused."""
        scribble(arena, layout.TRIMS_WORD, MANY)
        publish(arena, b"x").close()
        assert arena.holdings.tidy()
        arena.trimmer.trim_all()
        assert not arena.is_damaged
        assert table.trims < MANY
        buffer.cast("Q")[layout.INCARNATION_WORD] = MANY
        with pytest.raises(TableCorrupt, match="incarnation"):
            table.join(0, 1, 1)

    def test_a_damaged_arena_is_not_joined(self, arena: Arena, process: Callable[[], Process]) -> None:
        """By nobody who comes now."""
        block = publish(arena, b"x")
        before = read(arena, word_of(block.row, 1))
        scribble(arena, word_of(block.row, 1), PAGE)
        with pytest.raises(TableCorrupt):
            process()("Arena.attach(at, arena_id)", at=arena.segment.whereabouts, arena_id=arena.arena_id)
        scribble(arena, word_of(block.row, 1), before)
        block.close()

    def test_who_has_left_a_damaged_arena_is_cleaned_up_behind(
        self, arena: Arena, joined: Callable[[], Process]
    ) -> None:
        """It strikes nothing out itself; as soon as it has no view any more, the others see that it is gone."""
        other = joined()
        other("draft = arena.draft(1); draft.write(0, memoryview(b'x')); block = draft.seal(); view = block.view(0, 1)")
        slot = other("arena.member.slot")
        word = layout.claims_offset(slot) // 8 + other("block.row.index")
        claim = read(arena, word)
        scribble(arena, word, 0)
        wait_until(lambda: other("arena.is_damaged"), "the other has noticed")
        scribble(arena, word, claim)
        assert arena.roster.reclaim_dead() is False
        assert other("bytes(view)") == b"x"
        other("del view; block.close()")
        wait_until(lambda: other("arena.has_left"), "the other has left")
        wait_until(lambda: arena.roster.reclaim_dead() or arena.stats().used == 0, "its block is free")
        assert arena.stats().members == 1


class TestBlock:
    """A descriptor says anything."""

    def test_nobody_sees_what_an_earlier_block_has_left_on_the_last_page(self, arena: Arena) -> None:
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
    def test_a_block_that_never_was_is_stale(self, arena: Arena, index: int, generation: int) -> None:
        """Whatever its number."""
        with pytest.raises(StaleBlock):
            arena.attach_block(Descriptor(arena.arena_id, Row(index, generation)))


class TestSegment:
    """The memory was cut short, or is something else."""

    @pytest.mark.parametrize("size", [0, PAGE, layout.TABLE_BYTES, layout.TABLE_BYTES + PAGE])
    def test_memory_that_was_cut_short_is_refused_before_it_is_touched(
        self, process: Callable[[], Process], size: int
    ) -> None:
        """To touch it would be the end of the process."""
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

    def test_a_mapping_that_was_kept_is_not_used_again_when_the_memory_was_cut_short(
        self, process: Callable[[], Process]
    ) -> None:
        """It shows nothing any more, like a new one."""
        one = process()
        one("arena = Arena.create(1 << 21, warm=1 << 21); block = publish(arena, bytes(1 << 20))")
        one("view = block.view(0, 1 << 20); del view; arena.holdings.tidy()")
        assert one("len(arena.holdings._mappings)") == 1
        process()("os.truncate(f'/proc/{at.pid}/fd/{at.fd}', 0)", at=one("arena.segment.whereabouts"))
        with pytest.raises(SharedMemoryError, match="short"):
            one("block.view(0, 1 << 20)")

    def test_a_memfd_cannot_be_cut_short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is sealed, and so are its seals; pages can be given back all the same."""
        monkeypatch.setattr(segment, "_posix_memory_free", lambda: 0)
        one = segment.Segment.create(4 * PAGE)
        for size in (0, 3 * PAGE, 5 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(one.fd, size)
        one.write(0, memoryview(b"x" * 4 * PAGE))
        one.give_back(0, PAGE)
        assert one.resident == 3 * PAGE
        one.close()

    def test_a_foreign_file_is_no_arena(self, tmp_path: Path) -> None:
        """Though it lies where an arena should."""
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
    """What is said in the place where members meet."""

    def test_one_that_leads_into_another_clusters_arena_is_refused(self, cluster: str) -> None:
        """A process that opened its own arena again would lose its locks on it."""
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

    def test_more_members_than_there_can_be_are_cut(self, name: str) -> None:
        """The newest stays, for others to find."""
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
    def test_two_versions_do_not_share(self, cluster: str, process: Callable[[], Process], comes: str) -> None:
        """In whichever order they come, the second one finds out and touches nothing."""
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

    def test_an_arena_that_was_left_as_damaged_is_not_joined_again(self, cluster: str) -> None:
        """Neither by another role of this process, nor after its last role has ended, while views live."""
        arena = join(cluster)
        view = publish(arena, b"x" * 100)
        scribble(arena, layout.MAGIC_WORD, 0)
        with pytest.raises(TableCorrupt):
            arena.inspect()
        with pytest.raises(TableCorrupt):
            join(cluster, "client", "tcp://there")
        membership.leave(cluster, "nanny", "tcp://here")
        again = join(cluster)
        assert again.arena_id != arena.arena_id
        view.close()
        wait_until(lambda: arena.has_left, "the first arena was left")


@root
class TestAnotherUser:
    """A real one: a process that has become ``nobody``."""

    @pytest.fixture
    def stranger(self, process: Callable[[], Process]) -> Process:
        """Another user's process; it has all modules already, for it may be unable to read them."""
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

    def test_another_user_can_open_nothing(self, cluster: str, stranger: Process) -> None:
        """Neither the rendezvous nor the memory, by no name; nor remove anything."""
        arena = join(cluster)
        name = f"/dev/shm{rendezvous.name_for(cluster)}"
        for path in (name, f"/proc/{os.getpid()}/fd/{arena.segment.fd}", f"/proc/{os.getpid()}/mem"):
            for flags in (os.O_RDONLY, os.O_RDWR):
                with pytest.raises(PermissionError):
                    stranger("os.close(os.open(path, flags))", path=path, flags=flags)
        with pytest.raises(PermissionError):
            stranger("os.unlink(name)", name=name)
        with pytest.raises(ArenaUnavailable):
            stranger("Arena.attach(at, arena_id)", at=arena.segment.whereabouts, arena_id=arena.arena_id)
        assert os.fstat(arena.segment.fd).st_mode & 0o777 == 0o600

    def test_another_user_of_the_same_cluster_has_an_arena_of_its_own(self, cluster: str, stranger: Process) -> None:
        """Its name says whose it is; each cleans up behind its own only."""
        arena = join(cluster)
        stranger(JOIN, cluster=cluster)
        assert stranger("arena.arena_id") != arena.arena_id
        stranger("rendezvous.purge()")
        rendezvous.purge()
        assert stranger("arena.stats().members") == arena.stats().members == 1
        stranger("membership.leave(cluster, 'worker', f'tcp://{os.getpid()}')")

    @pytest.mark.parametrize("mode", [0o600, 0o666])
    def test_a_name_that_another_user_has_taken_is_named_and_left_alone(
        self, cluster: str, stranger: Process, process: Callable[[], Process], mode: int
    ) -> None:
        """Whoever comes goes on without sharing, at once."""
        victim = process()
        path = f"/dev/shm{rendezvous.name_for(cluster)}"
        stranger("os.close(os.open(path, os.O_CREAT | os.O_RDWR, mode)); os.chmod(path, mode)", path=path, mode=mode)
        for who in (join, lambda cluster: victim(JOIN, cluster=cluster)):
            with pytest.raises(ArenaUnavailable, match=path):
                who(cluster)
        assert os.stat(path).st_uid == NOBODY
        stranger("os.unlink(path)")
        join(cluster)
