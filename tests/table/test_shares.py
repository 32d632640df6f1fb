"""The share of a member in the blocks that it refers to, and the figures that it notes about its other memory."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dask_shm_plugin.table.layout import TABLE_BYTES, Extent
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.table.table import Table

PAGE = 4096


def sealed(table: Table, first: int, pages: int, *holders: Member) -> None:
    """Make a block with holders."""
    row = table.reserve(Extent(first * PAGE, pages * PAGE), 1, holders[0])
    table.seal(row, holders[0])
    for holder in holders[1:]:
        table.acquire(row, holder)


class TestShare:
    """A block counts as its length divided by the number of its holders."""

    def test_a_member_without_claims_has_a_share_of_zero(self, table: Table, alice: Member, bob: Member) -> None:
        """Neither the blocks of other members nor its own drafts count."""
        sealed(table, 0, 1, bob)
        table.reserve(Extent(PAGE, PAGE), 1, alice)
        assert table.share(alice) == 0

    def test_a_block_with_one_holder_counts_in_full(self, table: Table, alice: Member, bob: Member) -> None:
        """A release by that member would free the block."""
        sealed(table, 0, 3, alice)
        assert table.share(alice) == 3 * PAGE
        assert table.share(bob) == 0

    def test_a_block_with_several_holders_is_divided_among_them(self, table: Table, alice: Member, bob: Member) -> None:
        """When one holder is reclaimed, the shares of the others grow."""
        sealed(table, 0, 2, alice, bob)
        sealed(table, 2, 5, bob)
        assert table.share(alice) == PAGE
        assert table.share(bob) == 6 * PAGE
        table.reclaim(bob)
        assert table.share(alice) == 2 * PAGE

    def test_a_released_block_does_not_count(self, table: Table, alice: Member, bob: Member) -> None:
        """Neither the former claim counts, nor the block that is in the same row now."""
        row = table.reserve(Extent(0, PAGE), 1, alice)
        table.seal(row, alice)
        table.release(row, alice)
        sealed(table, 0, 2, bob)
        assert table.share(alice) == 0

    @given(st.lists(st.sets(st.integers(0, 4), min_size=1), max_size=12))
    def test_the_sum_of_all_shares_is_the_bytes_in_use(self, blocks: list[set[int]]) -> None:
        """No byte of a block is counted twice or left out."""
        table = Table.format(np.zeros(TABLE_BYTES, np.uint8).data, bytes(16), 64 * PAGE)
        members = [table.join(slot, 1, 1) for slot in range(5)]
        for number, holders in enumerate(blocks):
            sealed(table, 2 * number, 1 + number % 2, *(members[slot] for slot in holders))
        shares = [table.share(member) for member in members]
        taken = sum(length for _, length in table.blocks.taken().tolist())
        assert abs(sum(shares) - taken) <= len(members)


class TestOtherMemory:
    """A process notes in the table how much shared memory it uses outside the arena, for processes that measure it."""

    def test_the_figure_is_found_by_pid_and_start_time_of_a_member(
        self, table: Table, alice: Member, bob: Member
    ) -> None:
        """The pid alone may belong to another process by now."""
        table.members.note_other_shared(alice, 12345)
        assert table.members.other_shared(alice) == 12345
        assert table.members.find(11, 111) == alice
        assert table.members.other_shared(table.members.find(22, 222)) == 0
        assert table.members.find(11, 112) is None
        assert table.members.find(33, 333) is None
        table.reclaim(alice)
        assert table.members.find(11, 111) is None

    def test_the_next_member_in_a_slot_begins_with_figures_of_zero(self, table: Table, alice: Member) -> None:
        """The next member is another process."""
        table.members.note_other_shared(alice, 12345)
        table.members.note_memory(alice, 1, 2)
        table.reclaim(alice)
        assert table.members.other_shared(table.join(alice.slot, 44, 444)) == 0
        assert table.members.memory_of_workers() == []

    def test_only_members_with_a_limit_count_as_workers(self, table: Table, alice: Member, bob: Member) -> None:
        """A member without a limit runs no worker."""
        table.members.note_memory(alice, 5, 10)
        table.members.note_memory(bob, 7, 0)
        assert table.members.memory_of_workers() == [(11, 5, 10)]
        table.members.note_memory(bob, 7, 20)
        assert table.members.memory_of_workers() == [(11, 5, 10), (22, 7, 20)]
