"""The free space that a process has cached follows the table exactly."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from arena_fixtures import MIB
from other_processes import JOIN, Process, join, publish

from dask_shm_plugin.node import membership
from dask_shm_plugin.table import free_space
from dask_shm_plugin.table.layout import SPREAD
from dask_shm_plugin.table.placement import Room
from dask_shm_plugin.units import PAGE

CLUSTER = "tcp://freespace"


@pytest.mark.parametrize("seed", range(3))
def test_the_cached_free_space_equals_a_new_computation_while_two_processes_use_the_arena(
    process: Callable[[], Process], seed: int
) -> None:
    """Two processes reserve and release in turn, and one of them dies and is reclaimed; blocks never overlap."""
    arena = join(CLUSTER)
    other = process()
    other(JOIN, cluster=CLUSTER)
    other("import random; kept = []; chance = random.Random(seed)", seed=seed)
    chance, kept = random.Random(seed), []
    for turn in range(60):
        if chance.random() < 0.6:
            kept.append(publish(arena, bytes(chance.choice([1, PAGE, 3 * PAGE]))))
        elif kept:
            kept.pop(chance.randrange(len(kept))).close()
            arena.holdings.tidy()
        if chance.random() < 0.3:
            other("kept.append(publish(arena, bytes(chance.choice([1, 8192]))))")
        if chance.random() < 0.2:
            other("[block.close() for block in kept[1::2]]; del kept[1::2]; arena.holdings.tidy()")
        if turn == 40:
            other.kill()
            arena.roster.reclaim_dead()
            other = process()
            other(JOIN, cluster=CLUSTER)
            other("import random; kept = []; chance = random.Random(seed)", seed=seed)
        arena.validate()
        for length in (PAGE, 7 * PAGE):
            kept_up, anew = arena._access.run(
                lambda table, length=length: (
                    arena.allocator._free_space.room(table).place(length),
                    Room(table.blocks.taken(), table.capacity, SPREAD).place(length),
                )
            )
            assert kept_up == anew
    other.kill()
    for block in kept:
        block.close()
    membership.leave(CLUSTER, "nanny", "tcp://here")


def test_the_free_space_is_not_computed_anew_for_a_few_changed_rows(
    process: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The changes may be made by this process or by another one."""
    computed = []

    def counted(*args: object) -> Room:
        computed.append(args)
        return Room(*args)

    monkeypatch.setattr(free_space, "Room", counted)
    arena = join(CLUSTER)
    other = process()
    other(JOIN, cluster=CLUSTER)
    for _ in range(20):
        publish(arena, bytes(MIB // 64)).close()
        other("publish(arena, bytes(8192)).close(); arena.holdings.tidy()")
        arena.holdings.tidy()
    assert len(computed) == 1
    other.kill()
    membership.leave(CLUSTER, "nanny", "tcp://here")
