"""Each method of the table does what it says, over a plain buffer."""

from __future__ import annotations

import numpy as np
import pytest

from dask_shm_plugin.exceptions import ArenaFull, StaleBlock, TableCorrupt, TableFull
from dask_shm_plugin.table import layout, state_word
from dask_shm_plugin.table.layout import BLOCKS, CLAIM_BYTES, MEMBERS, SHARED_BYTES, TABLE_BYTES, BlockId, Extent
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.table.table import Table

PAGE = 4096
CAPACITY = 16 * PAGE


def reserve(table: Table, owner: Member, first: int = 0, pages: int = 1) -> BlockId:
    """Reserve some pages."""
    return table.reserve(Extent(first * PAGE, pages * PAGE), pages * PAGE - 1, owner)


def sealed(table: Table, owner: Member, first: int = 0, pages: int = 1) -> BlockId:
    """Make a block of some pages."""
    row = reserve(table, owner, first, pages)
    table.seal(row, owner)
    return row


def parts(table: Table) -> list[tuple[int, int]]:
    """Return offset and length of the parts in use, in pages, sorted by offset."""
    return sorted((offset // PAGE, length // PAGE) for offset, length in table.blocks.taken().tolist())


class TestLayout:
    """A table is laid out in memory that it is given."""

    def test_a_new_table_has_neither_members_nor_blocks(self, table: Table) -> None:
        """It contains only the id and the capacity of the arena."""
        assert (table.arena_id, table.capacity) == (bytes(range(16)), CAPACITY)
        assert (table.members.live(), table.roles(), len(table.blocks.taken()), parts(table)) == ([], [], 0, [])
        table.validate()

    def test_another_process_sees_the_same(self, table: Table, buffer: memoryview, alice: Member) -> None:
        """All state is in the buffer, so a second table over the same buffer shows the same content."""
        row = sealed(table, alice)
        second = Table(buffer)
        assert (second.arena_id, second.capacity) == (table.arena_id, CAPACITY)
        assert second.members.live() == [alice]
        assert second.holders(row.index) == 1
        assert second.blocks.extent(row.index) == Extent(0, PAGE)

    def test_a_buffer_that_is_too_short_is_refused(self) -> None:
        """Such a buffer would end within the claims of the last member."""
        with pytest.raises(TableCorrupt, match=str(TABLE_BYTES)):
            Table(memoryview(bytearray(TABLE_BYTES - 1)))

    def test_a_buffer_of_zeros_is_refused(self, buffer: memoryview) -> None:
        """A table begins with a magic number."""
        with pytest.raises(TableCorrupt, match="version"):
            Table(buffer)

    def test_a_table_of_another_version_is_refused(self, table: Table, buffer: memoryview) -> None:
        """The version is part of the magic number."""
        assert buffer[:8] == b"daskshm" + bytes([layout.VERSION])
        buffer[7] += 1
        with pytest.raises(TableCorrupt, match="version"):
            Table(buffer)

    def test_a_buffer_may_be_longer_than_the_table(self, buffer: memoryview) -> None:
        """Mappings end at a page boundary, and bytes behind the table are not changed."""
        longer = memoryview(bytearray(TABLE_BYTES + 100))
        table = Table.format(longer, bytes(16), CAPACITY)
        table.join(MEMBERS - 1, 1, 1)
        assert not any(longer[TABLE_BYTES:])

    def test_claims_of_members_lie_behind_the_shared_part(self) -> None:
        """The claims of each member take whole pages, so that these can be made when the member joins."""
        offsets = [layout.claims_offset(slot) for slot in range(MEMBERS)]
        assert offsets[0] == SHARED_BYTES
        assert set(np.diff(offsets)) == {CLAIM_BYTES}
        assert offsets[-1] + CLAIM_BYTES == TABLE_BYTES
        assert not any(offset % PAGE for offset in offsets)

    def test_a_member_writes_its_own_claims_only(self, table: Table, buffer: memoryview, bob: Member) -> None:
        """The claims of other members lie elsewhere, and do not change."""
        row = sealed(table, bob)
        alices, bobs = (buffer[layout.claims_offset(slot) : layout.claims_offset(slot + 1)] for slot in (0, 1))
        assert not any(alices)
        assert bobs[8 * row.index : 8 * row.index + 8] == row.generation.to_bytes(8, "little")


class TestMembers:
    """A member is one incarnation of a process."""

    def test_all_slots_are_vacant_at_first(self, table: Table) -> None:
        """A new table has MEMBERS vacant slots."""
        assert table.vacant() == list(range(MEMBERS))

    def test_a_member_is_live_until_it_is_reclaimed(self, table: Table) -> None:
        """Its slot is vacant before it joins and after it is reclaimed."""
        member = table.join(7, 1, 1)
        assert table.members.is_live(member)
        assert table.members.live() == [member]
        assert 7 not in table.vacant()
        assert table.reclaim(member) == []
        assert not table.members.is_live(member)
        assert table.members.live() == []
        assert 7 in table.vacant()

    def test_an_incarnation_is_never_reused(self, table: Table) -> None:
        """A later member gets a new incarnation, in the same slot and in another one."""
        seen = set()
        for slot in (3, 3, 0, 3, 9):
            member = table.join(slot, 1, 1)
            assert member.slot == slot
            seen.add(member.incarnation)
            table.reclaim(member)
        assert len(seen) == 5

    def test_an_earlier_incarnation_is_not_live(self, table: Table) -> None:
        """The slot number alone does not identify a member."""
        first = table.join(3, 1, 1)
        table.reclaim(first)
        second = table.join(3, 1, 1)
        assert not table.members.is_live(first)
        assert table.members.is_live(second)

    def test_reclaiming_an_earlier_incarnation_touches_nothing(self, table: Table) -> None:
        """A process that reclaims late finds another member in the slot."""
        first = table.join(3, 1, 1)
        table.reclaim(first)
        second = table.join(3, 1, 1)
        row = sealed(table, second)
        assert table.reclaim(first) == []
        assert table.members.is_live(second)
        assert table.holders(row.index) == 1

    @pytest.mark.parametrize("slot", [-1, MEMBERS, 10**9])
    def test_a_slot_that_does_not_exist_is_not_live(self, table: Table, slot: int) -> None:
        """A slot number may arrive over the network, so any value must be handled."""
        table.join(MEMBERS - 1, 1, 1)
        assert not table.members.is_live(Member(slot, 1))

    def test_reclaiming_frees_the_blocks_and_drafts_that_only_this_member_held(
        self, table: Table, alice: Member, bob: Member
    ) -> None:
        """Blocks to which other members refer stay."""
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

    def test_the_next_member_in_a_slot_has_no_claims(self, table: Table, alice: Member, bob: Member) -> None:
        """The claims of the previous member would keep blocks for ever."""
        row = sealed(table, alice)
        table.acquire(row, bob)
        table.reclaim(alice)
        table.join(alice.slot, 1, 1)
        assert table.holders(row.index) == 1
        assert table.release(row, bob) == Extent(0, PAGE)


class TestBlocks:
    """A block is FREE, then DRAFT, then SEALED, then FREE again."""

    def test_a_draft_takes_its_extent_and_cannot_be_acquired(self, table: Table, alice: Member) -> None:
        """A draft has no holders, because only its owner uses it."""
        row = reserve(table, alice, 2, 3)
        assert parts(table) == [(2, 3)]
        assert len(table.blocks.taken()) == 1
        assert table.blocks.extent(row.index) == Extent(2 * PAGE, 3 * PAGE)
        assert table.holders(row.index) == 0
        with pytest.raises(StaleBlock):
            table.acquire(row, alice)
        table.validate()

    def test_the_member_that_seals_a_block_holds_it(self, table: Table, alice: Member) -> None:
        """A sealed block has a holder from its first moment."""
        row = sealed(table, alice)
        assert table.holders(row.index) == 1
        table.validate()

    def test_a_block_is_sealed_once(self, table: Table, alice: Member) -> None:
        """A sealed block is no draft, so a second seal finds no draft."""
        row = sealed(table, alice)
        with pytest.raises(StaleBlock):
            table.seal(row, alice)

    def test_a_block_is_free_when_its_last_holder_releases_it(self, table: Table, alice: Member, bob: Member) -> None:
        """The order of the releases does not matter; the block is free when no claim is left."""
        row = sealed(table, alice, 1, 2)
        assert table.acquire(row, bob) == (Extent(PAGE, 2 * PAGE), 2 * PAGE - 1)
        assert table.holders(row.index) == 2
        assert table.release(row, alice) is None
        assert table.release(row, bob) == Extent(PAGE, 2 * PAGE)
        assert parts(table) == []
        table.validate()

    def test_claims_are_a_set(self, table: Table, alice: Member, bob: Member) -> None:
        """Acquiring twice makes one claim, and releasing without a claim changes nothing."""
        row = sealed(table, alice)
        table.acquire(row, bob)
        table.acquire(row, bob)
        assert table.release(row, bob) is None
        assert table.release(row, bob) is None
        assert table.holders(row.index) == 1

    def test_a_released_draft_is_free(self, table: Table, alice: Member) -> None:
        """A released draft gives its extent back and cannot be sealed."""
        row = reserve(table, alice)
        assert table.release(row, alice) == Extent(0, PAGE)
        assert parts(table) == []
        with pytest.raises(StaleBlock):
            table.seal(row, alice)

    def test_a_draft_is_released_by_its_owner_only(self, table: Table, alice: Member, bob: Member) -> None:
        """A release by another member changes nothing."""
        row = reserve(table, alice)
        assert table.release(row, bob) is None
        table.seal(row, alice)

    def test_a_reused_row_has_a_new_generation(self, table: Table, alice: Member, bob: Member) -> None:
        """A descriptor of the earlier generation is stale, whether the row is a draft, a block or free."""
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
        [
            BlockId(0, 0),
            BlockId(0, 2),
            BlockId(1, 1),
            BlockId(BLOCKS, 1),
            BlockId(10**9, 1),
            BlockId(-1, 1),
            BlockId(-(10**9), 1),
            BlockId(0, -1),
        ],
    )
    def test_a_descriptor_with_an_invalid_row_is_stale(self, table: Table, alice: Member, row: BlockId) -> None:
        """Row numbers arrive over the network, so any value must be handled."""
        sealed(table, alice)
        with pytest.raises(StaleBlock):
            table.acquire(row, alice)

    def test_a_table_is_full_when_every_row_is_taken(self, table: Table, alice: Member) -> None:
        """The error names the setting to change, and one released row is enough to go on."""
        for _ in range(BLOCKS):
            table.reserve(Extent(0, PAGE), 1, alice)
        with pytest.raises(TableFull, match="threshold") as caught:
            reserve(table, alice)
        assert isinstance(caught.value, ArenaFull)
        assert len(table.blocks.taken()) == BLOCKS
        table.release(BlockId(77, 1), alice)
        assert reserve(table, alice) == BlockId(77, 2)


class TestInvariants:
    """``validate`` detects states to which no sequence of calls, and no death, can lead."""

    def test_overlapping_blocks_are_detected(self, table: Table, alice: Member) -> None:
        """One of the two blocks would overwrite the other."""
        reserve(table, alice, 3, 2)
        reserve(table, alice, 0, 4)
        with pytest.raises(TableCorrupt, match="overlap"):
            table.validate()

    def test_adjacent_blocks_are_valid(self, table: Table, alice: Member) -> None:
        """An arena may be full to the last page."""
        for first in (3, 1, 0, 2):
            reserve(table, alice, 4 * first, 4)
        table.validate()

    def test_a_block_that_ends_behind_the_arena_is_detected(self, table: Table, alice: Member) -> None:
        """There is no memory behind the arena."""
        reserve(table, alice, table.span // PAGE - 1, 2)
        with pytest.raises(TableCorrupt, match="behind"):
            table.validate()

    def test_blocks_beyond_the_capacity_are_detected(self, table: Table, alice: Member) -> None:
        """There are more offsets than bytes, so the offsets alone do not bound the bytes."""
        reserve(table, alice, 0, CAPACITY // PAGE)
        table.validate()
        reserve(table, alice, table.span // PAGE - 1)
        with pytest.raises(TableCorrupt, match="capacity"):
            table.validate()

    def test_an_empty_block_is_detected(self, table: Table, alice: Member) -> None:
        """Two empty blocks could lie in the same place."""
        table.reserve(Extent(3 * PAGE, 0), 0, alice)
        with pytest.raises(TableCorrupt, match="empty"):
            table.validate()

    def test_a_sealed_block_without_a_holder_is_detected(self, table: Table, alice: Member) -> None:
        """No release would ever free it."""
        table.seal(reserve(table, alice), Member(5, 99))
        with pytest.raises(TableCorrupt, match="nobody"):
            table.validate()

    def test_a_draft_without_a_live_owner_is_detected(self, table: Table, alice: Member) -> None:
        """No member would ever seal or release it."""
        reserve(table, Member(alice.slot, alice.incarnation + 1))
        with pytest.raises(TableCorrupt, match="owner"):
            table.validate()

    def test_a_claim_on_a_future_generation_is_detected(
        self, table: Table, buffer: memoryview, alice: Member, bob: Member
    ) -> None:
        """The claim would hold a block that does not exist yet."""
        row = sealed(table, alice)
        table.acquire(row, bob)
        buffer[layout.claims_offset(alice.slot) + 8 * row.index] += 1
        with pytest.raises(TableCorrupt, match="a claim is younger than its block"):
            table.validate()

    def test_an_unknown_state_is_detected(self, table: Table, buffer: memoryview, alice: Member) -> None:
        """Only a stray write can produce it."""
        row = sealed(table, alice)
        words, at = buffer.cast("Q"), layout.BLOCKS_AT + 8 * row.index
        words[at] = state_word.pack(row.generation, 3, words[at + 1 : at + state_word.WORDS].tolist())
        with pytest.raises(TableCorrupt, match="a block is in no known state"):
            table.validate()
