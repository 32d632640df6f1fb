"""What a process has computed of the free space is used as long as it is true."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from conftest import MIB
from other_processes import JOIN, Process, join, publish

from dask_shm_plugin import freespace, membership
from dask_shm_plugin.layout import SPREAD
from dask_shm_plugin.placement import Room
from dask_shm_plugin.segment import PAGE

CLUSTER = "tcp://freespace"


@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_many_never_overlap(process: Callable[[], Process], seed: int) -> None:
    """Two processes reserve and release in turn, and one of them dies and is reclaimed."""
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
                    arena._free_space.room(table).place(length),
                    Room(table.blocks.taken(), table.capacity, SPREAD).place(length),
                )
            )
            assert kept_up == anew
    other.kill()
    for block in kept:
        block.close()
    membership.leave(CLUSTER, "nanny", "tcp://here")


def test_it_is_not_computed_anew_for_a_few_changes(
    process: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor for a few of others'."""
    computed = []

    def counted(*args: object) -> Room:
        computed.append(args)
        return Room(*args)

    monkeypatch.setattr(freespace, "Room", counted)
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
