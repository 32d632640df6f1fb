"""The table: what each of its methods does, over nothing but a buffer."""

from __future__ import annotations

import numpy as np
import pytest

from dask_shm_plugin import layout
from dask_shm_plugin.exceptions import ArenaFull, StaleBlock, TableCorrupt, TableFull
from dask_shm_plugin.layout import BLOCKS, CLAIM_BYTES, MEMBERS, SHARED_BYTES, TABLE_BYTES, Extent, Row
from dask_shm_plugin.memberbook import Member
from dask_shm_plugin.table import Table

PAGE = 4096
CAPACITY = 16 * PAGE


def reserve(table: Table, owner: Member, first: int = 0, pages: int = 1) -> Row:
    """Reserve some pages."""
    return table.reserve(Extent(first * PAGE, pages * PAGE), pages * PAGE - 1, owner)


def sealed(table: Table, owner: Member, first: int = 0, pages: int = 1) -> Row:
    """Make a block of some pages."""
    row = reserve(table, owner, first, pages)
    table.seal(row, owner)
    return row


def parts(table: Table) -> list[tuple[int, int]]:
    """Return what is taken, by offset, in pages."""
    return sorted((offset // PAGE, length // PAGE) for offset, length in table.blocks.taken().tolist())


class TestLayout:
    """A table lies in memory that others have laid out."""

    def test_an_empty_one_holds_nothing(self, table: Table) -> None:
        """It knows its name and capacity, and has neither members nor blocks."""
        assert (table.arena_id, table.capacity) == (bytes(range(16)), CAPACITY)
        assert (table.members(), table.roles(), len(table.blocks.taken()), parts(table)) == ([], [], 0, [])
        table.validate()

    def test_another_process_sees_the_same(self, table: Table, buffer: memoryview, alice: Member) -> None:
        """Nothing is kept outside of the buffer."""
        row = sealed(table, alice)
        second = Table(buffer)
        assert (second.arena_id, second.capacity) == (table.arena_id, CAPACITY)
        assert second.members() == [alice]
        assert second.holders(row.index) == 1
        assert second.blocks.extent(row.index) == Extent(0, PAGE)

    def test_memory_that_is_too_short_is_refused(self) -> None:
        """It would end in the claims of the last member."""
        with pytest.raises(TableCorrupt, match=str(TABLE_BYTES)):
            Table(memoryview(bytearray(TABLE_BYTES - 1)))

    def test_memory_that_was_never_laid_out_is_refused(self, buffer: memoryview) -> None:
        """Zeros are no table."""
        with pytest.raises(TableCorrupt, match="version"):
            Table(buffer)

    def test_a_table_of_another_version_is_refused(self, table: Table, buffer: memoryview) -> None:
        """The version is part of what a table begins with."""
        assert buffer[:8] == b"daskshm" + bytes([layout.VERSION])
        buffer[7] += 1
        with pytest.raises(TableCorrupt, match="version"):
            Table(buffer)

    def test_memory_may_be_longer_than_the_table(self, buffer: memoryview) -> None:
        """Mappings end at a page; what follows the table is left alone."""
        longer = memoryview(bytearray(TABLE_BYTES + 100))
        table = Table.format(longer, bytes(16), CAPACITY)
        table.join(MEMBERS - 1, 1, 1)
        assert not any(longer[TABLE_BYTES:])

    def test_claims_of_members_lie_behind_the_shared_part(self) -> None:
        """Each member's row is a whole number of pages, so that it can be made to exist alone."""
        offsets = [layout.claims_offset(slot) for slot in range(MEMBERS)]
        assert offsets[0] == SHARED_BYTES
        assert set(np.diff(offsets)) == {CLAIM_BYTES}
        assert offsets[-1] + CLAIM_BYTES == TABLE_BYTES
        assert not any(offset % PAGE for offset in offsets)

    def test_a_member_writes_its_own_claims_only(self, table: Table, buffer: memoryview, bob: Member) -> None:
        """What others have claimed lies elsewhere."""
        row = sealed(table, bob)
        alices, bobs = (buffer[layout.claims_offset(slot) : layout.claims_offset(slot + 1)] for slot in (0, 1))
        assert not any(alices)
        assert bobs[8 * row.index : 8 * row.index + 8] == row.generation.to_bytes(8, "little")


class TestMembers:
    """A member is one incarnation of a process."""

    def test_all_slots_are_vacant_at_first(self, table: Table) -> None:
        """There is room for MEMBERS processes."""
        assert table.vacant() == list(range(MEMBERS))

    def test_a_member_is_live_until_it_is_reclaimed(self, table: Table) -> None:
        """Its slot is vacant before and after."""
        member = table.join(7, 1, 1)
        assert table.is_live(member)
        assert table.members() == [member]
        assert 7 not in table.vacant()
        assert table.reclaim(member) == []
        assert not table.is_live(member)
        assert table.members() == []
        assert 7 in table.vacant()

    def test_an_incarnation_is_never_used_again(self, table: Table) -> None:
        """Neither in the same slot nor in another."""
        seen = set()
        for slot in (3, 3, 0, 3, 9):
            member = table.join(slot, 1, 1)
            assert member.slot == slot
            seen.add(member.incarnation)
            table.reclaim(member)
        assert len(seen) == 5

    def test_an_earlier_incarnation_is_not_live(self, table: Table) -> None:
        """The slot alone says nothing."""
        first = table.join(3, 1, 1)
        table.reclaim(first)
        second = table.join(3, 1, 1)
        assert not table.is_live(first)
        assert table.is_live(second)

    def test_reclaiming_an_earlier_incarnation_touches_nothing(self, table: Table) -> None:
        """Whoever reclaims late finds somebody else in the slot."""
        first = table.join(3, 1, 1)
        table.reclaim(first)
        second = table.join(3, 1, 1)
        row = sealed(table, second)
        assert table.reclaim(first) == []
        assert table.is_live(second)
        assert table.holders(row.index) == 1

    @pytest.mark.parametrize("slot", [-1, MEMBERS, 10**9])
    def test_a_slot_that_does_not_exist_is_not_live(self, table: Table, slot: int) -> None:
        """Numbers that came over the wire may be anything."""
        table.join(MEMBERS - 1, 1, 1)
        assert not table.is_live(Member(slot, 1))

    def test_reclaiming_frees_what_only_this_member_held(self, table: Table, alice: Member, bob: Member) -> None:
        """Drafts and last claims are freed; what others refer to stays."""
        mine, draft, shared = sealed(table, alice, 0, 1), reserve(table, alice, 1, 2), sealed(table, alice, 3, 3)
        others = sealed(table, bob, 6, 1)
        table.acquire(shared, bob)
        assert sorted(table.reclaim(alice)) == [Extent(0, PAGE), Extent(PAGE, 2 * PAGE)]
        assert parts(table) == [(3, 3), (6, 1)]
        assert (table.holders(shared.index), table.holders(others.index)) == (1, 1)
        for row in (mine, draft):
            with pytest.raises(StaleBlock):
                table.acquire(row, bob)
        table.validate()

    def test_the_next_in_a_slot_has_no_claims(self, table: Table, alice: Member, bob: Member) -> None:
        """Claims of the one before it are gone, or it would keep blocks for ever."""
        row = sealed(table, alice)
        table.acquire(row, bob)
        table.reclaim(alice)
        table.join(alice.slot, 1, 1)
        assert table.holders(row.index) == 1
        assert table.release(row, bob) == Extent(0, PAGE)


class TestBlocks:
    """FREE, DRAFT, SEALED, FREE."""

    def test_a_draft_takes_its_extent(self, table: Table, alice: Member) -> None:
        """It has no holders, and cannot be acquired."""
        row = reserve(table, alice, 2, 3)
        assert parts(table) == [(2, 3)]
        assert len(table.blocks.taken()) == 1
        assert table.blocks.extent(row.index) == Extent(2 * PAGE, 3 * PAGE)
        assert table.holders(row.index) == 0
        with pytest.raises(StaleBlock):
            table.acquire(row, alice)
        table.validate()

    def test_whoever_seals_refers_to_the_block(self, table: Table, alice: Member) -> None:
        """A sealed block has a holder from its first moment."""
        row = sealed(table, alice)
        assert table.holders(row.index) == 1
        table.validate()

    def test_a_block_is_sealed_once(self, table: Table, alice: Member) -> None:
        """It is no draft any more."""
        row = sealed(table, alice)
        with pytest.raises(StaleBlock):
            table.seal(row, alice)

    def test_a_block_is_free_when_its_last_holder_releases_it(self, table: Table, alice: Member, bob: Member) -> None:
        """The order does not matter, only that no claim is left."""
        row = sealed(table, alice, 1, 2)
        assert table.acquire(row, bob) == (Extent(PAGE, 2 * PAGE), 2 * PAGE - 1)
        assert table.holders(row.index) == 2
        assert table.release(row, alice) is None
        assert table.release(row, bob) == Extent(PAGE, 2 * PAGE)
        assert parts(table) == []
        table.validate()

    def test_claims_are_a_set(self, table: Table, alice: Member, bob: Member) -> None:
        """Acquiring twice is one claim; releasing what one does not hold is none less."""
        row = sealed(table, alice)
        table.acquire(row, bob)
        table.acquire(row, bob)
        assert table.release(row, bob) is None
        assert table.release(row, bob) is None
        assert table.holders(row.index) == 1

    def test_a_released_draft_is_free(self, table: Table, alice: Member) -> None:
        """Nothing is left of what was abandoned."""
        row = reserve(table, alice)
        assert table.release(row, alice) == Extent(0, PAGE)
        assert parts(table) == []
        with pytest.raises(StaleBlock):
            table.seal(row, alice)

    def test_a_draft_is_released_by_its_owner_only(self, table: Table, alice: Member, bob: Member) -> None:
        """Somebody else has nothing of it to release."""
        row = reserve(table, alice)
        assert table.release(row, bob) is None
        table.seal(row, alice)

    def test_a_row_that_is_used_again_has_another_generation(self, table: Table, alice: Member, bob: Member) -> None:
        """A descriptor of its earlier use is stale, whatever state the row is in."""
        old = sealed(table, alice)
        table.release(old, alice)
        new = reserve(table, alice)
        assert new.index == old.index
        assert new.generation > old.generation
        for change in (lambda: table.seal(new, alice), lambda: table.release(new, alice)):
            with pytest.raises(StaleBlock, match=f"generation {old.generation}"):
                table.acquire(old, bob)
            with pytest.raises(StaleBlock):
                table.seal(old, alice)
            assert table.release(old, alice) is None
            assert parts(table) == [(0, 1)]
            change()
        assert parts(table) == []

    @pytest.mark.parametrize(
        "row",
        [Row(0, 0), Row(0, 2), Row(1, 1), Row(BLOCKS, 1), Row(10**9, 1), Row(-1, 1), Row(-(10**9), 1), Row(0, -1)],
    )
    def test_a_descriptor_of_nothing_is_stale(self, table: Table, alice: Member, row: Row) -> None:
        """Numbers that came over the wire may be anything."""
        sealed(table, alice)
        with pytest.raises(StaleBlock):
            table.acquire(row, alice)

    def test_it_is_full_when_every_row_is_taken(self, table: Table, alice: Member) -> None:
        """The error names the remedy; one freed row is enough to go on."""
        for _ in range(BLOCKS):
            table.reserve(Extent(0, PAGE), 1, alice)
        with pytest.raises(TableFull, match="threshold") as caught:
            reserve(table, alice)
        assert isinstance(caught.value, ArenaFull)
        assert len(table.blocks.taken()) == BLOCKS
        table.release(Row(77, 1), alice)
        assert reserve(table, alice) == Row(77, 2)


class TestInvariants:
    """``validate`` notices when something is there that no sequence of calls, and no death, may leave."""

    def test_two_blocks_must_not_overlap(self, table: Table, alice: Member) -> None:
        """One would overwrite the other."""
        reserve(table, alice, 3, 2)
        reserve(table, alice, 0, 4)
        with pytest.raises(TableCorrupt, match="overlap"):
            table.validate()

    def test_neighbours_do_not_overlap(self, table: Table, alice: Member) -> None:
        """An arena may be full to the last page."""
        for first in (3, 1, 0, 2):
            reserve(table, alice, 4 * first, 4)
        table.validate()

    def test_a_block_must_not_end_behind_the_arena(self, table: Table, alice: Member) -> None:
        """There is no memory."""
        reserve(table, alice, table.span // PAGE - 1, 2)
        with pytest.raises(TableCorrupt, match="behind"):
            table.validate()

    def test_blocks_must_not_be_more_than_the_capacity(self, table: Table, alice: Member) -> None:
        """There are more offsets than bytes, so that no room is lost to gaps."""
        reserve(table, alice, 0, CAPACITY // PAGE)
        table.validate()
        reserve(table, alice, table.span // PAGE - 1)
        with pytest.raises(TableCorrupt, match="capacity"):
            table.validate()

    def test_a_block_must_not_be_empty(self, table: Table, alice: Member) -> None:
        """Two of them could lie in one place."""
        table.reserve(Extent(3 * PAGE, 0), 0, alice)
        with pytest.raises(TableCorrupt, match="empty"):
            table.validate()

    def test_a_sealed_block_must_have_a_holder(self, table: Table, alice: Member) -> None:
        """Nobody would ever free it."""
        table.seal(reserve(table, alice), Member(5, 99))
        with pytest.raises(TableCorrupt, match="nobody"):
            table.validate()

    def test_a_draft_must_have_an_owner(self, table: Table, alice: Member) -> None:
        """Nobody would ever free it."""
        reserve(table, Member(alice.slot, alice.incarnation + 1))
        with pytest.raises(TableCorrupt, match="owner"):
            table.validate()

    def test_a_claim_must_not_be_younger_than_its_block(self, table: Table, buffer: memoryview, alice: Member) -> None:
        """It would refer to a block that is yet to come."""
        row = sealed(table, alice)
        buffer[layout.claims_offset(alice.slot) + 8 * row.index] += 1
        sealed(table, alice, 1)
        with pytest.raises(TableCorrupt):
            table.validate()

    def test_a_state_must_be_known(self, table: Table, buffer: memoryview, alice: Member) -> None:
        """Somebody else wrote here."""
        row = sealed(table, alice)
        words = buffer.cast("Q")
        words[layout.BLOCKS_AT + 8 * row.index] |= 3
        with pytest.raises(TableCorrupt, match="state"):
            table.validate()
