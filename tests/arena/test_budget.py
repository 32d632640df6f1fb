"""The workers of a node may use as much memory, shared values included, as their limits allow in total."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from other_processes import Process, publish, wait_until

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import LimitsReached

MIB = 1 << 20


@pytest.fixture
def roomy() -> Arena:
    """Create an arena of 64 MiB."""
    return Arena.create(64 * MIB, warm=1000)


def test_the_budget_is_unbounded_without_workers_or_with_an_unlimited_worker(roomy: Arena) -> None:
    """A client alone has no limit, and a worker without a limit may use all memory."""
    assert roomy.budget.use(1 << 40) == 0
    roomy.budget.set_limit("a", 1 << 30)
    assert roomy.budget.use(1 << 40) > 1
    roomy.budget.set_limit("b", None)
    assert roomy.budget.use(1 << 40) == 0
    roomy.budget.forget("b")
    assert roomy.budget.use(1 << 40) > 1
    roomy.budget.forget("a")
    assert roomy.budget.use(1 << 40) == 0
    roomy.close()


def test_use_is_the_private_memory_of_all_workers_plus_the_arena(roomy: Arena, process: Callable[[], Process]) -> None:
    """The private memory of each process counts once, and so does each shared block."""
    limit = 1 << 30
    roomy.budget.set_limit("here", limit)
    own = roomy.budget.measure()
    assert roomy.budget.use() == pytest.approx(own / limit, abs=0.01)
    other = process()
    other(
        "arena = Arena.attach(at, id); arena.budget.set_limit('there', 1 << 30)",
        at=roomy.segment.whereabouts,
        id=roomy.arena_id,
    )
    theirs = other("arena.budget.measure()")
    with publish(roomy, bytes(32 * MIB)) as block:
        descriptor = block.descriptor
        other("block = arena.attach_block(descriptor); view = block.view(0, 1 << 20)", descriptor=descriptor)
        expected = (roomy.budget.measure() + theirs + 32 * MIB) / (2 * limit)
        assert roomy.budget.use() == pytest.approx(expected, abs=0.01)
        assert other("arena.budget.use()") == pytest.approx(expected, abs=0.01)
        assert roomy.budget.use(33 * MIB) == pytest.approx(expected, abs=0.01)  # counts pages, free ones included
        assert roomy.budget.use(limit) == pytest.approx(expected + (limit - 32 * MIB) / (2 * limit), abs=0.01)
        other("del view; block.close()")
    other.kill()
    wait_until(
        lambda: roomy.roster.reclaim_dead() or len(roomy._access.table.members.memory_of_workers()) == 1,
        "the dead process is no worker any more",
    )
    roomy.close()


def test_nothing_is_published_beyond_the_limits(roomy: Arena) -> None:
    """Free pages are given back first, blocks stay valid, and publishing works again once the limits allow it."""
    data = memoryview(bytes(np.ones(32 * MIB, np.uint8)))
    kept, freed = publish(roomy, data[: 8 * MIB]), publish(roomy, data[: 8 * MIB])
    roomy.budget.set_limit("here", roomy.budget.measure() + 20 * MIB)
    with pytest.raises(LimitsReached, match="memory_limit"):
        publish(roomy, data[: 16 * MIB])
    freed.close()
    wait_until(lambda: roomy.stats().used == 8 * MIB, "the block is free")
    roomy.budget.set_limit("here", roomy.budget.measure() + 20 * MIB)
    with publish(roomy, data[: 11 * MIB]):  # its pages replace the free ones
        pass
    assert np.all(np.frombuffer(kept.view(0, 8 * MIB), np.uint8) == 1)
    roomy.budget.forget("here")
    publish(roomy, data).close()
    kept.close()
    roomy.close()


def test_near_the_limits_the_private_memory_is_read_anew(roomy: Arena) -> None:
    """A worker whose event loop is blocked does not update its figure in the table."""
    roomy.budget.set_limit("here", 2 * roomy.budget.measure())
    own = roomy.budget.measure()
    ballast = np.ones(own // 8)
    assert roomy.budget.use(int(0.4 * own)) == pytest.approx(0.7, abs=0.02)
    assert roomy.budget.use(int(0.8 * own)) == pytest.approx(1.4, abs=0.02)
    del ballast
    roomy.budget.forget("here")
    roomy.close()
