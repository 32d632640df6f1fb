"""What is freed goes back to the operating system when it was not used of late, and a member leaves when nothing refers to it."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from other_processes import Process, publish, wait_until, wait_until_empty

from dask_shm_plugin import limits
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.exceptions import ArenaFull, ArenaUnavailable, SharedMemoryError
from dask_shm_plugin.segment import PAGE

KIB = 1024
MIB = 1024 * KIB


class TestTrimming:
    """Freed memory is given back, but for what was in use of late."""

    @pytest.fixture
    def make(self) -> Iterator[Callable[..., Arena]]:
        """Make an arena that keeps freed memory for so many seconds."""
        made = []

        def make(warm: float, capacity: int = 16 * MIB) -> Arena:
            made.append(Arena.create(capacity, warm))
            return made[-1]

        yield make
        for arena in made:
            arena.close()

    def test_nothing_stays_where_nothing_is_to_stay_warm(self, make: Callable[..., Arena]) -> None:
        """The arena is as small as it was at first."""
        arena = make(0)
        before = arena.stats().resident
        publish(arena, bytes(8 * MIB)).close()
        wait_until_empty(arena)
        arena.trimmer.trim()
        # The tidying thread may be at it, too.
        wait_until(lambda: (arena.stats().resident, arena.stats().blocks) == (before, 0), "nothing stays")

    def test_the_tidying_thread_trims_unasked(self, make: Callable[..., Arena]) -> None:
        """Nobody has to come by."""
        arena = make(0)
        before = arena.stats().resident
        publish(arena, bytes(8 * MIB)).close()
        wait_until(lambda: arena.stats().resident == before, "freed memory is given back")

    def test_what_was_in_use_of_late_stays(self, make: Callable[..., Arena]) -> None:
        """It is written again several times faster than fresh pages."""
        arena = make(1000)
        before = arena.stats().resident
        for size in (8 * MIB, 4 * MIB):
            publish(arena, bytes(size)).close()
            wait_until_empty(arena)
            arena.trimmer.trim()
            assert arena.stats().resident - before == 8 * MIB

    @pytest.mark.parametrize("others", [0, 8])
    def test_what_was_not_used_for_a_while_goes(
        self, make: Callable[..., Arena], process: Callable[[], Process], others: int
    ) -> None:
        """The rest stays, as long as it is used; the members' rows in the table are no freed memory."""
        arena = make(0.2)
        for _ in range(others):
            process()("arena = Arena.attach(at, id, warm=0.2)", at=arena.segment.whereabouts, id=arena.arena_id)
        before = arena.stats().resident
        publish(arena, bytes(8 * MIB)).close()

        def use_less() -> bool:
            publish(arena, bytes(2 * MIB)).close()
            wait_until_empty(arena)
            arena.trimmer.trim()
            return arena.stats().resident - before == 2 * MIB

        wait_until(use_less, "so much is kept as is used again and again")
        wait_until(lambda: arena.stats().resident == before, "an idle arena keeps nothing")

    def test_new_pages_take_the_place_of_free_ones(self, make: Callable[..., Arena]) -> None:
        """There are never many more than were in use at the same time."""
        arena = make(1000, 64 * MIB)
        before = arena.stats().resident
        low, high = publish(arena, bytes(16 * MIB)), publish(arena, bytes(16 * MIB))
        low.close()
        wait_until(lambda: arena.stats().used == 16 * MIB, "the gap is free")
        with publish(arena, bytes(32 * MIB)):  # does not fit in there
            assert arena.stats().resident - before == 48 * MIB
        high.close()

    def test_where_the_machine_runs_short_nothing_stays(
        self, make: Callable[..., Arena], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever needs memory now goes before whoever may need it again."""
        arena = make(1000)
        before = arena.stats().resident
        publish(arena, bytes(8 * MIB)).close()
        wait_until_empty(arena)
        monkeypatch.setattr(limits, "head_room", lambda: -1)
        wait_until(lambda: arena.stats().resident == before, "nothing is kept")

    def test_what_is_in_use_is_not_touched(self, make: Callable[..., Arena]) -> None:
        """Holes between blocks are given back, up to the last byte before the next block."""
        arena = make(0)
        before = arena.stats().resident
        blocks = [publish(arena, bytes([number]) * MIB) for number in range(9)]
        kept, dropped = blocks[::2], blocks[1::2]
        for block in dropped:
            block.close()
        wait_until(lambda: arena.stats().used == 5 * MIB, "every other block is free")
        arena.trimmer.trim()
        assert arena.stats().resident - before == 5 * MIB
        for number, block in enumerate(kept):
            assert block.view(0, MIB) == bytes([2 * number]) * MIB
            block.close()

    def test_space_that_was_trimmed_is_used_again(self, make: Callable[..., Arena]) -> None:
        """It is empty, not gone."""
        arena = make(0)
        for number in range(3):
            with publish(arena, bytes([number]) * 16 * MIB) as block:
                assert block.view(5 * MIB, 3) == bytes([number]) * 3
            wait_until_empty(arena)
            arena.trimmer.trim()

    def test_trimming_keeps_nobody_from_free_space(
        self, make: Callable[..., Arena], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever wants all of it while its pages go back gets it; nothing else is in the arena."""
        arena, outcomes = make(0), []

        def draft() -> None:
            try:
                with arena.draft(16 * MIB):
                    outcomes.append("there was room")
            except SharedMemoryError as error:
                outcomes.append(error)

        threads = []

        def give_back(offset: int, length: int, real: Callable[[int, int], None] = arena.segment.give_back) -> None:
            thread = threading.Thread(target=draft)
            thread.start()
            threads.append(thread)
            # It may wait for the end of this, but not the other way round.
            thread.join(0.05)
            real(offset, length)

        monkeypatch.setattr(arena.segment, "give_back", give_back)
        publish(arena, bytes(16 * MIB)).close()
        arena.holdings.tidy()
        arena.trimmer.trim()
        wait_until(lambda: threads, "something was given back")
        for thread in threads:
            thread.join()
        assert set(outcomes) == {"there was room"}

    def test_the_trimming_of_another_member_keeps_nobody_from_free_space(
        self, make: Callable[..., Arena], process: Callable[[], Process]
    ) -> None:
        """The others wait for it, as they would for one of their own threads."""
        arena, other = make(0), process()
        other("arena = Arena.attach(at, id)", at=arena.segment.whereabouts, id=arena.arena_id)
        other("hold = [arena.take_if_free(table.Extent(0, 16 << 20))]")
        other("threading.Timer(0.05, lambda: (hold.clear(), arena.abandon())).start()")
        with arena.draft(16 * MIB):
            pass

    def test_nobody_waits_for_long(self, make: Callable[..., Arena], process: Callable[[], Process]) -> None:
        """A member that was stopped while it trimmed costs a moment, then values go the usual way."""
        arena, other = make(0), process()
        other("arena = Arena.attach(at, id)", at=arena.segment.whereabouts, id=arena.arena_id)
        other("hold = [arena.take_if_free(table.Extent(0, 16 << 20))]")
        with pytest.raises(ArenaFull):
            arena.draft(16 * MIB)
        other("hold.clear(); arena.abandon()")


class TestClosing:
    """A process is a member until nothing of it refers to a block."""

    def test_it_leaves_at_once_when_nothing_refers_to_a_block(
        self, arena: Arena, joined: Callable[[], Process]
    ) -> None:
        """The others see it go; its descriptor is closed; closing again is harmless."""
        other = joined()
        member, open_before = other("arena.member"), other("len(os.listdir('/proc/self/fd'))")
        other("arena.close()")
        assert not arena.roster.is_live(member)
        assert arena.stats().members == 1
        assert other("arena.has_left, arena.segment.fd") == (True, -1)
        assert other("len(os.listdir('/proc/self/fd'))") == open_before - 1
        assert "left" in other("arena.close() or repr(arena)")

    def test_its_thread_ends(self) -> None:
        """Nothing of the arena is left in the process."""
        before = set(threading.enumerate())
        arena = Arena.create(MIB)
        [thread] = set(threading.enumerate()) - before
        arena.close()
        thread.join(10)
        assert not thread.is_alive()

    def test_memory_is_gone_with_the_last_member(self, process: Callable[[], Process]) -> None:
        """Nobody can open it any more, and nobody has to remove it."""
        other = process()
        other("arena = Arena.create(1 << 20); home = os.readlink(f'/proc/self/fd/{arena.segment.fd}')")
        assert other("home in open('/proc/self/maps').read()")
        other("arena.close(); del arena; gc.collect()")
        wait_until(lambda: other("home not in open('/proc/self/maps').read()"), "the table is unmapped")
        assert other(
            "home not in [os.readlink(entry.path) for entry in os.scandir('/proc/self/fd') if entry.is_file()]"
        )

    def test_nothing_new_is_begun_after_closing(self, arena: Arena) -> None:
        """Neither when it has left, nor while it is leaving."""
        view = publish(arena, b"kept").view(0, 4)
        for _ in range(2):
            arena.close()
            with pytest.raises(ArenaUnavailable):
                arena.draft(1)
            view = None
            gc.collect()
            wait_until(lambda: arena.has_left, "the member has left")
        assert view is None
        for refused in (arena.stats, arena.validate):
            with pytest.raises(SharedMemoryError):
                refused()

    @pytest.mark.parametrize(
        "what", ["holdings.tidy", "trimmer.trim", "roster.reclaim_dead", "finish_leaving", "roster.roles", "close"]
    )
    def test_whoever_has_left_touches_nobody(self, arena: Arena, joined: Callable[[], Process], what: str) -> None:
        """The tidying thread may still be at it; its descriptor is closed, and says nothing of who lives."""
        other, third = joined(), joined()
        other("arena.close()")
        with contextlib.suppress(SharedMemoryError, OSError):
            other(f"arena.{what}()")
        assert arena.roster.is_live(third("arena.member"))
        assert arena.stats().members == 2

    def test_a_closed_block_says_that_the_process_has_left(self, arena: Arena) -> None:
        """And not that its memory is short, for it has none any more."""
        block = publish(arena, b"x")
        block.close()
        arena.close()
        wait_until(lambda: arena.has_left, "the tidying thread has given the block back")
        with pytest.raises(ArenaUnavailable, match="has left"):
            block.view(0, 1)

    @pytest.mark.parametrize("made", ["view", "view[5:9]", "np.frombuffer(view, np.uint8)[7:]", "memoryview(view)"])
    def test_views_stay_valid_and_the_member_leaves_when_they_go(
        self, arena: Arena, joined: Callable[[], Process], made: str
    ) -> None:
        """Until then its place is not used again."""
        other = joined()
        other("""
            with publish(arena, b"abcdefghijkl") as block:
                view = block.view(0, 12)
            """)
        member = other("arena.member")
        other(f"kept = {made}; view = None; before = bytes(kept); arena.close()")
        other("arena.close(); gc.collect(); arena.holdings.tidy()")
        assert arena.roster.is_live(member)
        assert not arena.roster.reclaim_dead()
        with pytest.raises(SharedMemoryError):
            arena.draft(MIB)
        with publish(arena, bytes(MIB - PAGE)):
            assert other("bytes(kept) == before")
        other("kept = None")
        wait_until(lambda: not arena.roster.is_live(member), "the member has left")
        wait_until_empty(arena)

    def test_an_open_block_keeps_the_member(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """Somebody was promised that it stays."""
        other = joined()
        descriptor = other("(block := publish(arena, b'promised')).descriptor")
        member = other("arena.member")
        other("arena.close()")
        with arena.attach_block(descriptor) as block:
            assert block.view(0, 8) == b"promised"
        assert arena.roster.is_live(member)
        other("block.close()")
        wait_until(lambda: not arena.roster.is_live(member), "the member has left")
        wait_until_empty(arena)

    def test_an_open_draft_can_still_be_written(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """A thread that copies must not find its descriptor closed, or used for something else."""
        other = joined()
        other("draft = arena.draft(4096); arena.close(); draft.write(0, memoryview(b'late')); block = draft.seal()")
        assert other("bytes(block.view(0, 4))") == b"late"
        other("block.close()")
        wait_until(lambda: arena.stats().members == 1, "the member has left")
        wait_until_empty(arena)

    def test_a_busy_table_delays_leaving(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """The tidying thread tries again; closing does not raise."""
        other, third = joined(), joined()
        third("enter(arena._mutex)")
        other("arena.close()")
        assert not other("arena.has_left")
        third("leave(arena._mutex)")
        wait_until(lambda: other("arena.has_left"), "the member has left")
        assert arena.stats().members == 2

    def test_what_others_hold_stays(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """A block does not belong to the member that made it."""
        other = joined()
        block = arena.attach_block(other("(block := publish(arena, b'theirs')).descriptor"))
        other("block.close(); arena.close()")
        assert other("arena.has_left") or wait_until(lambda: other("arena.has_left"), "the member has left")
        assert block.view(0, 6) == b"theirs"
        block.close()


def test_a_view_keeps_nothing_but_its_own_block(arena: Arena) -> None:
    """A hundred others come and go beside it."""
    with publish(arena, os.urandom(PAGE)) as block:
        view = np.frombuffer(block.view(0, PAGE), np.uint8)
    before = view.copy()
    for _ in range(100):
        publish(arena, bytes(64 * KIB)).close()
    wait_until(lambda: arena.stats().used == PAGE, "the others are gone")
    np.testing.assert_array_equal(view, before)
