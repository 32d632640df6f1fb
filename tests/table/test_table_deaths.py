"""A process may die between any two stores into the table: only what it held is free afterwards."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
from deaths import dies

from dask_shm_plugin.table.layout import TABLE_BYTES, BlockId, Extent
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.table.roles import RoleEntry
from dask_shm_plugin.table.table import Table

pytestmark = pytest.mark.slow

PAGE = 4096


class Scene:
    """A table in which three members have something of each kind; ``victim`` is about to do something and to die."""

    def __init__(self) -> None:
        self.buffer = np.zeros(TABLE_BYTES, np.uint8).data
        self.table = Table.format(self.buffer, bytes(16), 64 * PAGE)
        self.other, self.victim, self.third = (self.table.join(slot, slot, slot) for slot in range(3))
        self.table.add_role(self.other, "nanny", "tcp://other")
        self.table.add_role(self.victim, "worker", "tcp://victim")
        self.page = count()
        # These stay whatever the victim does, because another member has them.
        self.others = self.sealed(self.other)
        self.shared = self.sealed(self.victim, self.other)
        self.others_draft = self.reserve(self.other)
        # These are freed with the victim.
        self.own = self.sealed(self.victim)
        self.draft = self.reserve(self.victim)
        self.again = self.reserve(self.victim)
        self.table.release(self.again, self.victim)

    def reserve(self, owner: Member) -> BlockId:
        """Reserve a page that was not used before."""
        return self.table.reserve(Extent(next(self.page) * PAGE, PAGE), PAGE, owner)

    def sealed(self, *holders: Member) -> BlockId:
        """Make a block with holders."""
        row = self.reserve(holders[0])
        self.table.seal(row, holders[0])
        for member in holders[1:]:
            self.table.acquire(row, member)
        return row

    def check(self) -> None:
        """Reclaim the victim as another process does, and check that only objects of other members are left."""
        table = Table(self.buffer)
        for member in table.members.live():
            if member not in (self.other, self.third):
                table.reclaim(member)
        table.validate()
        assert set(table.members.live()) == {self.other, self.third}
        assert table.roles() == [RoleEntry(self.other, "nanny", "tcp://other")]
        left = [table.blocks.extent(row.index) for row in (self.others, self.shared, self.others_draft)]
        assert sorted(map(tuple, table.blocks.taken().tolist())) == sorted(left), (
            "something that the dead member held is still taken"
        )
        assert [table.holders(row.index) for row in (self.others, self.shared)] == [1, 1]
        table.seal(self.others_draft, self.other)
        for row in (self.own, self.draft):
            assert table.release(row, self.third) is None
        assert table.reserve(Extent(63 * PAGE, PAGE), PAGE, self.third).generation > 0
        table.validate()


ACTIONS: dict[str, Callable[[Scene], Any]] = {
    "joins": lambda scene: scene.table.join(200, 1, 1),
    "adds a role": lambda scene: scene.table.add_role(scene.victim, "client", "tcp://somewhere"),
    "removes a role": lambda scene: scene.table.remove_role(scene.victim, "worker", "tcp://victim"),
    "reserves a row that was used before": lambda scene: scene.reserve(scene.victim),
    "reserves a new row": lambda scene: (scene.reserve(scene.victim), scene.reserve(scene.victim)),
    "seals a draft": lambda scene: scene.table.seal(scene.draft, scene.victim),
    "acquires a block": lambda scene: scene.table.acquire(scene.others, scene.victim),
    "releases a draft": lambda scene: scene.table.release(scene.draft, scene.victim),
    "releases a block that others hold": lambda scene: scene.table.release(scene.shared, scene.victim),
    "releases a block that nobody else holds": lambda scene: scene.table.release(scene.own, scene.victim),
    "leaves": lambda scene: scene.table.reclaim(scene.victim),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_a_member_that_dies_during_any_action_is_reclaimed_completely(action: str) -> None:
    """The process dies before each store of the action in turn, and another process cleans up."""
    for store in count():
        scene = Scene()
        is_dead = dies(lambda scene=scene: ACTIONS[action](scene), store)
        scene.check()
        if not is_dead:
            break
    assert store > 0, "the action stores nothing; is it watched?"


@pytest.mark.parametrize("order", ["the dead one first", "the one that cleaned up first"])
def test_a_member_that_dies_while_it_reclaims_another_is_reclaimed_too(order: str) -> None:
    """The reclaiming member dies before each store in turn, and a third member reclaims both in either order."""
    for store in count():
        scene = Scene()
        cleaner = scene.table.join(9, 9, 9)
        scene.sealed(cleaner)
        is_dead = dies(lambda scene=scene: scene.table.reclaim(scene.victim), store)
        both = [scene.victim, cleaner]
        for member in both if order == "the dead one first" else reversed(both):
            Table(scene.buffer).reclaim(member)
        scene.check()
        if not is_dead:
            break
    assert store > 3


@pytest.mark.parametrize("action", ["reserves a row that was used before", "releases a draft", "leaves"])
def test_a_generation_is_not_used_twice_when_a_member_dies(action: str) -> None:
    """Otherwise a descriptor from before the death could name a block that was reserved after it."""
    for store in count():
        scene = Scene()
        used = {scene.others, scene.shared, scene.others_draft, scene.own, scene.draft, scene.again}
        is_dead = dies(lambda scene=scene: ACTIONS[action](scene), store)
        table = Table(scene.buffer)
        table.reclaim(scene.victim)
        fresh = {table.reserve(Extent(page * PAGE, PAGE), 1, scene.third) for page in range(40, 50)}
        assert not used & fresh
        if not is_dead:
            break
