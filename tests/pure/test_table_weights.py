"""What a member's references weigh, and what it says of its other memory."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dask_shm_plugin.layout import TABLE_BYTES, Extent
from dask_shm_plugin.memberbook import Member
from dask_shm_plugin.table import Table, Weight

PAGE = 4096


def sealed(table: Table, first: int, pages: int, *holders: Member) -> None:
    """Make a block with holders."""
    row = table.reserve(Extent(first * PAGE, pages * PAGE), 1, holders[0])
    table.seal(row, holders[0])
    for holder in holders[1:]:
        table.acquire(row, holder)


class TestWeight:
    """A shared byte counts once, in shares of its holders; what one holds alone is all its own."""

    def test_without_references_it_is_nothing(self, table: Table, alice: Member, bob: Member) -> None:
        """The blocks of others do not count, nor do drafts."""
        sealed(table, 0, 1, bob)
        table.reserve(Extent(PAGE, PAGE), 1, alice)
        assert table.weigh(alice) == Weight(0, 0)

    def test_what_one_holds_alone_counts_whole(self, table: Table, alice: Member, bob: Member) -> None:
        """Giving it up would free it."""
        sealed(table, 0, 3, alice)
        assert table.weigh(alice) == Weight(3 * PAGE, 3 * PAGE)
        assert table.weigh(bob) == Weight(0, 0)

    def test_what_several_hold_is_shared_among_them(self, table: Table, alice: Member, bob: Member) -> None:
        """When one goes, the other's share grows."""
        sealed(table, 0, 2, alice, bob)
        sealed(table, 2, 5, bob)
        assert table.weigh(alice) == Weight(PAGE, 0)
        assert table.weigh(bob) == Weight(6 * PAGE, 5 * PAGE)
        table.reclaim(bob)
        assert table.weigh(alice) == Weight(2 * PAGE, 2 * PAGE)

    def test_what_was_released_weighs_nothing(self, table: Table, alice: Member, bob: Member) -> None:
        """Neither the claim that is gone, nor the block that lies in its row by now."""
        row = table.reserve(Extent(0, PAGE), 1, alice)
        table.seal(row, alice)
        table.release(row, alice)
        sealed(table, 0, 2, bob)
        assert table.weigh(alice) == Weight(0, 0)

    @given(st.lists(st.sets(st.integers(0, 4), min_size=1), max_size=12))
    def test_all_shares_together_are_what_is_taken(self, blocks: list[set[int]]) -> None:
        """No byte counts twice on a node, and none is left out."""
        table = Table.format(np.zeros(TABLE_BYTES, np.uint8).data, bytes(16), 64 * PAGE)
        members = [table.join(slot, 1, 1) for slot in range(5)]
        for number, holders in enumerate(blocks):
            sealed(table, 2 * number, 1 + number % 2, *(members[slot] for slot in holders))
        weights = [table.weigh(member) for member in members]
        taken = sum(length for _, length in table.blocks.taken().tolist())
        assert abs(sum(weight.share for weight in weights) - taken) <= len(members)
        for member, weight in zip(members, weights, strict=True):
            alone = [1 + number % 2 for number, holders in enumerate(blocks) if holders == {member.slot}]
            assert weight.alone == sum(alone) * PAGE


class TestOtherMemory:
    """A process says how much shared memory of its own it uses, for whoever measures it from outside."""

    def test_it_is_known_of_members_only(self, table: Table, alice: Member, bob: Member) -> None:
        """By pid and time of start: a number alone may be somebody else's by now."""
        table.note_other_shared(alice, 12345)
        assert table.other_shared(alice) == 12345
        assert table.find(11, 111) == alice
        assert table.other_shared(table.find(22, 222)) == 0
        assert table.find(11, 112) is None
        assert table.find(33, 333) is None
        table.reclaim(alice)
        assert table.find(11, 111) is None

    def test_the_next_in_a_slot_begins_with_nothing(self, table: Table, alice: Member) -> None:
        """It is another process."""
        table.note_other_shared(alice, 12345)
        table.note_memory(alice, 1, 2)
        table.reclaim(alice)
        assert table.other_shared(table.join(alice.slot, 44, 444)) == 0
        assert table.memory_of_workers() == []

    def test_the_memory_of_those_counts_who_have_a_limit(self, table: Table, alice: Member, bob: Member) -> None:
        """The others are no workers."""
        table.note_memory(alice, 5, 10)
        table.note_memory(bob, 7, 0)
        assert table.memory_of_workers() == [(11, 5, 10)]
        table.note_memory(bob, 7, 20)
        assert table.memory_of_workers() == [(11, 5, 10), (22, 7, 20)]
