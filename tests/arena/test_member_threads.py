"""Threads use an arena at once, with garbage collections all the time, without a deadlock or a lost claim."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from other_processes import Process, join, reservations, wait_until, wait_until_empty

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.node import membership
from dask_shm_plugin.node.rendezvous import exists, name_for

pytestmark = pytest.mark.slow

#: Runs functions in threads, with a garbage collection at nearly every allocation, and one more thread that only
#: collects.
AT_ONCE = """
    warnings.simplefilter("ignore", ResourceWarning)
    failed, over = [], threading.Event()

    def guarded(work, number):
        try:
            work(number)
        except BaseException as error:
            failed.append(repr(error))

    def collect():
        while not over.is_set():
            gc.collect()

    gc.collect()
    gc.freeze()
    before = gc.get_threshold()
    gc.set_threshold(1, 2, 2)
    threads = [threading.Thread(target=guarded, args=(work, number)) for number, work in enumerate(works)]
    collector = threading.Thread(target=collect)
    for thread in [collector, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    collector.join()
    gc.set_threshold(*before)
    gc.unfreeze()
    gc.collect()
    """

PUBLISH = """
    import random
    kept, wrong = {}, []

    def work(number):
        chance = random.Random(number)
        for turn in range(60):
            data = bytes([number * 40 + turn % 40]) * 4096
            try:
                block = publish(arena, data)
                view = block.view(0, 4096)
                for key, (descriptor, content, *_) in chance.sample(list(kept.items()), min(3, len(kept))):
                    try:
                        with arena.attach_block(descriptor) as again:
                            wrong.extend([key] if again.view(0, 4096) != content else [])
                    except StaleBlock:
                        wrong.extend([key] if key in kept else [])
                if chance.random() < 0.4:
                    kept[number, turn] = block.descriptor, data, block, view
                if chance.random() < 0.3 and kept:
                    # Whoever makes an object next, maybe inside of a lock, drops what is in the cycle.
                    cycle = [kept.pop(chance.choice(list(kept)), None)]
                    cycle.append(cycle)
            except (ArenaFull, ArenaBusy, KeyError):
                continue

    works = [work] * 6
    """


def test_the_table_has_exactly_the_claims_that_threads_keep(arena: Arena, joined: Callable[[], Process]) -> None:
    """The threads publish, attach each other's blocks, map and drop, and blocks that are kept do not change."""
    other = joined()
    other(PUBLISH)
    other(AT_ONCE)
    assert other("failed, wrong") == ([], [])
    assert other("len(kept)") > 5
    other("rows = {descriptor.row for descriptor, *_ in kept.values()}")
    wait_until(
        lambda: other(
            "arena.holdings.tidy() or set(arena._access.table._claims.of(arena.member, arena._access.table.blocks.in_use)) == rows"
        ),
        "the table has the claims on kept blocks and no other",
    )
    arena.validate()
    assert (
        other("[key for key, (_, data, block, view) in kept.items() if not data == view == block.view(0, 4096)]") == []
    )
    other("kept.clear(); gc.collect()")
    wait_until_empty(arena)
    assert other("len(arena.holdings), len(ATLAS)") == (0, 0)


JOIN_AND_LEAVE = """
    def come_and_go(number):
        for turn in range(25):
            arena = membership.join(cluster, "worker", f"tcp://{number}", capacity=lambda: 1 << 20, warm=1 << 20)
            try:
                with publish(arena, bytes([turn]) * 4096) as block:
                    assert block.view(0, 4096) == bytes([turn]) * 4096
            except (ArenaFull, ArenaBusy):
                pass
            membership.leave(cluster, "worker", f"tcp://{number}")

    def fork(number):
        for turn in range(10):
            if not os.fork():
                os._exit(0)

    works = [come_and_go] * 4 + [fork] * forks
    """


@pytest.mark.parametrize("forks", [0, 2])
def test_threads_that_join_publish_leave_and_fork_leave_nothing(
    cluster: str, process: Callable[[], Process], forks: int
) -> None:
    """No thread waits for a lock for ever, and the last role to leave removes the name of the rendezvous."""
    other = process()
    before = other("len(os.listdir('/proc/self/fd'))")
    other(JOIN_AND_LEAVE, cluster=cluster, forks=forks)
    other(AT_ONCE)
    assert other("failed") == []
    wait_until(lambda: other("gc.collect() or not membership._lingering"), "no view keeps an arena that was left")
    wait_until(lambda: other("len(os.listdir('/proc/self/fd'))") <= before, "all descriptors are closed")
    assert not exists(name_for(cluster))
    join(cluster)
    membership.leave(cluster, "nanny", "tcp://here")
    assert other("membership.all_arenas()") == []


def test_a_process_that_is_killed_while_its_threads_join_and_leave_leaves_nothing(
    cluster: str, process: Callable[[], Process]
) -> None:
    """The other member reclaims everything, whatever each thread was doing at that moment."""
    arena = join(cluster)
    for _ in range(3):
        other = process()
        other(JOIN_AND_LEAVE, cluster=cluster, forks=1)
        begun = reservations(arena)
        other.begin(AT_ONCE)
        wait_until(lambda begun=begun: reservations(arena) > begun + 10, "the threads are working")
        other.kill()
        wait_until(lambda: arena.stats()[3:] == (0, 1), "nothing of the killed process is left")
        arena.validate()
