"""Many threads, and finalizers that run at any moment, neither deadlock nor leave a reference behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from other_processes import Process, wait_until, wait_until_empty

from dask_shm_plugin.arena.arena import Arena

WORK = """
    import random

    def work(seed):
        chance = random.Random(seed)
        for turn in range(120):
            data = bytes([seed * 20 + turn % 20]) * 4096 * chance.randint(1, 4)
            try:
                with arena.draft(len(data)) as draft:
                    draft.write(0, memoryview(data))
                    if chance.random() < 0.2:
                        continue
                    block = draft.seal()
                try:
                    with arena.attach_block(block.descriptor) as again:
                        views_of_it = [block.view(0, len(data)), np.frombuffer(again.view(1, len(data) - 1), np.uint8)]
                    wrong.extend(turn for view in views_of_it if set(bytes(view)) != {data[0]})
                    views_of_it[0][0] = 255
                finally:
                    if chance.random() < 0.8:
                        block.close()
            except (ArenaFull, ArenaBusy):
                gc.collect()  # it may be full of cycles
                continue
            published.append(turn)
            # Only the garbage collector finds a cycle: whoever makes an object next, maybe inside of a lock, drops these.
            cycle = [views_of_it, block]
            cycle.append(cycle)
            if chance.random() < 0.1:
                gc.collect()

    warnings.simplefilter("ignore", ResourceWarning)
    wrong, published = [], []
    before = gc.get_threshold()
    gc.set_threshold(3, 3, 3)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.set_threshold(*before)
    del thread, threads
    gc.collect()
    """


@pytest.mark.parametrize("members", [1, 2])
def test_finalizers_under_the_garbage_collector_neither_deadlock_nor_leak(
    arena: Arena, joined: Callable[[], Process], members: int
) -> None:
    """Six threads per process publish, attach, map, write and drop, and each reads only its own bytes."""
    others = [joined() for _ in range(members)]
    for other in others:
        other.begin(WORK)
    for other in others:
        other.end()
    assert all(other("wrong") == [] for other in others)
    # If processors are scarce, one process may find the arena full of the other's garbage nearly all the time.
    assert sum(other("len(published)") for other in others) > 100
    wait_until_empty(arena)
    for other in others:
        assert other("len(ATLAS)") == 0
        assert other("arena.close() or arena.has_left")
    arena.validate()
    assert arena.stats().members == 1


def test_a_block_that_many_threads_close_is_released_once(arena: Arena, joined: Callable[[], Process]) -> None:
    """Closing is idempotent, whichever thread is first, and other references to the block stay."""
    other = joined()
    other("""
        import sys
        kept = publish(arena, b"kept")
        sys.setswitchinterval(1e-6)
        for _ in range(100):
            block = arena.attach_block(kept.descriptor)
            gate = threading.Barrier(4)
            threads = [threading.Thread(target=lambda: (gate.wait(), block.close())) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        arena.holdings.tidy()
        """)
    assert arena.stats().blocks == 1
    assert other("bytes(kept.view(0, 4))") == b"kept"
    other("kept.close()")
    wait_until_empty(arena)


def test_a_block_is_claimed_until_the_last_thread_has_released_it(arena: Arena, joined: Callable[[], Process]) -> None:
    """All threads of a process share its claim, so only the last release removes it."""
    other = joined()
    other("""
        kept = publish(arena, b"kept")
        wrong = []

        def work():
            for _ in range(200):
                with arena.attach_block(kept.descriptor) as block:
                    wrong.extend([1] if bytes(block.view(0, 4)) != b"kept" else [])

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        """)
    assert other("wrong") == []
    assert arena.stats().blocks == 1
    other("kept.close()")
    wait_until_empty(arena)


@pytest.mark.parametrize(
    "what", ["arena.draft(1)", "arena.attach_block(kept.descriptor)", "arena.holdings.tidy()", "arena.trimmer.trim()"]
)
def test_a_finalizer_may_run_while_any_lock_is_held(joined: Callable[[], Process], what: str) -> None:
    """Views and blocks are dropped at each call that the package makes, and this neither deadlocks nor leaks."""
    other = joined()
    other("kept = publish(arena, b'kept')")
    other(f"""
        warnings.simplefilter("ignore", ResourceWarning)
        stock = [[arena.attach_block(kept.descriptor), kept.view(0, 4)] for _ in range(200)]

        def watch(frame, event, _):
            if stock and frame.f_globals.get("__name__", "").startswith("dask_shm_plugin."):
                stock.pop().clear()

        sys.setprofile(watch)
        result = {what}
        sys.setprofile(None)
        """)
    assert other("len(stock)") < 200
    other(
        "stock.clear(); getattr(result, 'close', lambda: None)(); getattr(result, '__exit__', print)(None, None, None)"
    )
    other("result = None; kept.close(); gc.collect()")
    wait_until(lambda: other("arena.holdings.tidy() or arena.stats().used == 0"), "the arena is empty")
