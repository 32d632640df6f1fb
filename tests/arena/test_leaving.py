"""Memory that was not used recently goes back to the system, and a member leaves once it has no reference left."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from other_processes import Process, publish, wait_until, wait_until_empty

from dask_shm_plugin.arena import housekeeping, trimming
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import ArenaFull, ArenaUnavailable, SharedMemoryError
from dask_shm_plugin.linux import limits
from dask_shm_plugin.units import PAGE

KIB = 1024
MIB = 1024 * KIB


class TestTrimming:
    """Freed memory is given back, except for as much as was in use recently."""

    @pytest.fixture
    def make(self) -> Iterator[Callable[..., Arena]]:
        """Return a function that creates an arena with a given ``warm`` time in seconds."""
        made = []

        def make(warm: float, capacity: int = 16 * MIB) -> Arena:
            made.append(Arena.create(capacity, warm))
            return made[-1]

        yield make
        for arena in made:
            arena.close()

    def test_with_a_warm_time_of_zero_no_free_page_stays(self, make: Callable[..., Arena]) -> None:
        """The arena then has as few pages as a new one."""
        arena = make(0)
        before = arena.stats().resident
        publish(arena, bytes(8 * MIB)).close()
        wait_until_empty(arena)
        arena.trimmer.trim()
        # The housekeeping thread may be trimming, too.
        wait_until(lambda: (arena.stats().resident, arena.stats().blocks) == (before, 0), "no free page stays")

    def test_the_housekeeping_thread_trims(self, make: Callable[..., Arena]) -> None:
        """Freed memory is given back without a call from other code."""
        arena = make(0)
        before = arena.stats().resident
        publish(arena, bytes(8 * MIB)).close()
        wait_until(lambda: arena.stats().resident == before, "freed memory is given back")

    def test_recently_used_memory_stays_resident(self, make: Callable[..., Arena]) -> None:
        """Resident pages can be written again several times faster than new ones."""
        arena = make(1000)
        before = arena.stats().resident
        for size in (8 * MIB, 4 * MIB):
            publish(arena, bytes(size)).close()
            wait_until_empty(arena)
            arena.trimmer.trim()
            assert arena.stats().resident - before == 8 * MIB

    @pytest.mark.parametrize("others", [0, 8])
    def test_memory_that_was_not_used_for_a_while_is_given_back(
        self, make: Callable[..., Arena], process: Callable[[], Process], others: int
    ) -> None:
        """As much as is used again and again stays; the members' rows of claims do not count as free memory."""
        arena = make(0.2, 64 * MIB)
        for _ in range(others):
            process()("arena = Arena.attach(at, id, warm=0.2)", at=arena.segment.whereabouts, id=arena.arena_id)
        before = arena.stats().resident
        publish(arena, bytes(32 * MIB)).close()

        def use_less() -> bool:
            publish(arena, bytes(2 * MIB)).close()
            wait_until_empty(arena)
            arena.trimmer.trim()
            return 2 * MIB <= arena.stats().resident - before <= 10 * MIB

        wait_until(use_less, "as much is kept as is used again and again, and 8 MiB")
        wait_until(lambda: arena.stats().resident == before, "an idle arena keeps nothing")

    def test_a_few_pages_more_than_were_used_recently_stay(self, make: Callable[..., Arena]) -> None:
        """When pages are given back, each process must look again for those that are left."""
        arena = make(1, 64 * MIB)
        publish(arena, bytes(8 * MIB)).close()

        def use_less() -> bool:
            publish(arena, bytes(4 * MIB)).close()
            wait_until_empty(arena)
            return arena._access.table.most_needed(time.monotonic(), arena.trimmer.warm) == 4 * MIB

        wait_until(use_less, "8 MiB were used some time ago")
        trims, resident = arena._access.table.trims, arena.stats().resident
        arena.trimmer.trim()
        assert (arena._access.table.trims, arena.stats().resident) == (trims, resident)

    def test_new_pages_replace_free_ones(self, make: Callable[..., Arena]) -> None:
        """There are never many more pages than were in use at the same time."""
        arena = make(1000, 64 * MIB)
        before = arena.stats().resident
        low, high = publish(arena, bytes(16 * MIB)), publish(arena, bytes(16 * MIB))
        low.close()
        wait_until(lambda: arena.stats().used == 16 * MIB, "the gap is free")
        with publish(arena, bytes(32 * MIB)):  # does not fit in the gap
            assert arena.stats().resident - before == 48 * MIB
        high.close()

    @pytest.mark.parametrize(("grown", "kept"), [(24, 16), (48, 8)])
    def test_free_pages_go_as_the_private_memory_of_workers_grows(
        self, make: Callable[..., Arena], monkeypatch: pytest.MonkeyPatch, grown: int, kept: int
    ) -> None:
        """The node has hardly more memory than it needed at the high-water mark; nobody waits for the look of each second."""
        monkeypatch.setattr(housekeeping, "_INTERVAL_S", 1000)
        arena = make(1000, 64 * MIB)
        arena.budget.set_limit("worker", 1 << 40)
        before = arena.stats().resident
        publish(arena, bytes(32 * MIB)).close()
        wait_until_empty(arena)
        arena.trimmer.trim()
        assert arena.stats().resident - before == 32 * MIB
        private = np.ones(grown * MIB, np.uint8)
        arena.budget.measure()
        wait_until(lambda: abs(arena.stats().resident - before - kept * MIB) <= MIB, "free pages went")
        del private

    def test_new_pages_replace_free_ones_when_private_memory_has_grown(self, make: Callable[..., Arena]) -> None:
        """A process that makes pages looks for itself."""
        arena = make(1000, 64 * MIB)
        arena.budget.set_limit("worker", 1 << 40)
        before = arena.stats().resident
        low, high = publish(arena, bytes(16 * MIB)), publish(arena, bytes(16 * MIB))
        low.close()
        wait_until(lambda: arena.stats().used == 16 * MIB, "the gap is free")
        private = np.ones(15 * MIB, np.uint8)
        arena.budget.measure()
        with publish(arena, bytes(20 * MIB)):  # does not fit in the gap
            assert (arena.stats().resident - before) / MIB <= 16 + 20 + 8
        del private
        high.close()

    def test_no_free_page_stays_if_the_machine_is_short_of_memory(
        self, make: Callable[..., Arena], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Memory that is needed now goes before memory that may be used again."""
        arena = make(1000)
        before = arena.stats().resident
        publish(arena, bytes(8 * MIB)).close()
        wait_until_empty(arena)
        monkeypatch.setattr(limits, "head_room", lambda: -1)
        wait_until(lambda: arena.stats().resident == before, "no free page is kept")

    def test_trimming_does_not_touch_blocks(self, make: Callable[..., Arena]) -> None:
        """Gaps between blocks are given back, up to the last byte before the next block."""
        arena = make(0)
        before = arena.stats().resident
        blocks = [publish(arena, bytes([number]) * MIB) for number in range(9)]
        kept, dropped = blocks[::2], blocks[1::2]
        for block in dropped:
            block.close()
        wait_until(lambda: arena.stats().used == 5 * MIB, "every other block is free")
        arena.trimmer.trim()
        # The housekeeping thread may be trimming, too.
        wait_until(lambda: arena.stats().resident - before == 5 * MIB, "the gaps are given back")
        for number, block in enumerate(kept):
            assert block.view(0, MIB) == bytes([2 * number]) * MIB
            block.close()

    def test_trimmed_space_is_reused(self, make: Callable[..., Arena]) -> None:
        """Its pages are gone, and its offsets are free."""
        arena = make(0)
        for number in range(3):
            with publish(arena, bytes([number]) * 16 * MIB) as block:
                assert block.view(5 * MIB, 3) == bytes([number]) * 3
            wait_until_empty(arena)
            arena.trimmer.trim()

    def test_a_draft_gets_space_whose_pages_are_being_given_back(
        self, make: Callable[..., Arena], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A draft of the whole capacity of an empty arena waits until the pages are given back."""
        monkeypatch.setattr(trimming, "_TRIM_TIME_S", 20)
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
            # The draft may wait for this call to return, but this call must not wait for the draft.
            thread.join(0.05)
            real(offset, length)

        monkeypatch.setattr(arena.segment, "give_back", give_back)
        publish(arena, bytes(16 * MIB)).close()
        arena.holdings.tidy()
        arena.trimmer.trim()
        wait_until(lambda: threads, "some pages were given back")
        for thread in threads:
            thread.join()
        assert set(outcomes) == {"there was room"}

    def test_a_draft_waits_until_another_member_has_trimmed(
        self, make: Callable[..., Arena], process: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It waits as it would for another thread of its own process."""
        monkeypatch.setattr(trimming, "_TRIM_TIME_S", 20)
        arena, other = make(0), process()
        other("arena = Arena.attach(at, id)", at=arena.segment.whereabouts, id=arena.arena_id)
        other("hold = [arena.allocator.take_if_free(Extent(0, 16 << 20))]")
        other("threading.Timer(0.05, lambda: (hold.clear(), arena.allocator.abandon())).start()")
        with arena.draft(16 * MIB):
            pass

    def test_a_draft_does_not_wait_long_for_a_member_that_trims(
        self, make: Callable[..., Arena], process: Callable[[], Process]
    ) -> None:
        """The other member may be stopped; then the draft is refused after a moment, and the value is sent instead."""
        arena, other = make(0), process()
        other("arena = Arena.attach(at, id)", at=arena.segment.whereabouts, id=arena.arena_id)
        other("hold = [arena.allocator.take_if_free(Extent(0, 16 << 20))]")
        with pytest.raises(ArenaFull):
            arena.draft(16 * MIB)
        other("hold.clear(); arena.allocator.abandon()")


class TestClosing:
    """A process remains a member until it refers to no block any more."""

    def test_a_member_without_references_leaves_at_once(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """Other members see that it is gone, its descriptor is closed, and a second close is harmless."""
        other = joined()
        member, open_before = other("arena.member"), other("len(os.listdir('/proc/self/fd'))")
        other("arena.close()")
        assert not arena.roster.is_live(member)
        assert arena.stats().members == 1
        assert other("arena.has_left, arena.segment.fd") == (True, -1)
        assert other("len(os.listdir('/proc/self/fd'))") == open_before - 1
        assert "left" in other("arena.close() or repr(arena)")

    def test_the_housekeeping_thread_ends_with_the_membership(self) -> None:
        """No part of the arena stays in the process."""
        before = set(threading.enumerate())
        arena = Arena.create(MIB)
        [thread] = [one for one in set(threading.enumerate()) - before if one.name == "dask-shm-tidy"]
        arena.close()
        thread.join(10)
        assert not thread.is_alive()

    def test_the_memory_is_freed_with_the_last_member(self, process: Callable[[], Process]) -> None:
        """The segment has no name, so no process has to remove it."""
        other = process()
        other("arena = Arena.create(1 << 20); home = os.readlink(f'/proc/self/fd/{arena.segment.fd}')")
        assert other("home in open('/proc/self/maps').read()")
        other("arena.close(); del arena; gc.collect()")
        wait_until(lambda: other("home not in open('/proc/self/maps').read()"), "the table is unmapped")
        assert other(
            "home not in [os.readlink(entry.path) for entry in os.scandir('/proc/self/fd') if entry.is_file()]"
        )

    def test_operations_are_refused_after_closing(self, arena: Arena) -> None:
        """They are refused both while the process is leaving and after it has left."""
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
    def test_a_member_that_has_left_affects_no_other_member(
        self, arena: Arena, joined: Callable[[], Process], what: str
    ) -> None:
        """The housekeeping thread may still run, but without a descriptor it cannot tell which members are alive."""
        other, third = joined(), joined()
        other("arena.close()")
        with contextlib.suppress(SharedMemoryError, OSError):
            other(f"arena.{what}()")
        assert arena.roster.is_live(third("arena.member"))
        assert arena.stats().members == 2

    def test_a_view_of_a_closed_block_is_refused_because_the_process_has_left(self, arena: Arena) -> None:
        """The error must not say that the segment is too short, although the process has none any more."""
        block = publish(arena, b"x")
        block.close()
        arena.close()
        wait_until(lambda: arena.has_left, "the housekeeping thread has given the block back")
        with pytest.raises(ArenaUnavailable, match="has left"):
            block.view(0, 1)

    @pytest.mark.parametrize("made", ["view", "view[5:9]", "np.frombuffer(view, np.uint8)[7:]", "memoryview(view)"])
    def test_views_stay_valid_after_closing_and_the_member_leaves_with_the_last(
        self, arena: Arena, joined: Callable[[], Process], made: str
    ) -> None:
        """As long as a view lives, the space of its block is not reused."""
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

    def test_an_open_block_keeps_the_membership(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """Its descriptor may be on the way to another process."""
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

    def test_an_open_draft_can_still_be_written_after_closing(
        self, arena: Arena, joined: Callable[[], Process]
    ) -> None:
        """A thread that copies into a draft must not find its descriptor closed, or in use for another file."""
        other = joined()
        other("draft = arena.draft(4096); arena.close(); draft.write(0, memoryview(b'late')); block = draft.seal()")
        assert other("bytes(block.view(0, 4))") == b"late"
        other("block.close()")
        wait_until(lambda: arena.stats().members == 1, "the member has left")
        wait_until_empty(arena)

    def test_a_busy_table_delays_leaving(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """Closing does not raise, and the housekeeping thread tries again."""
        other, third = joined(), joined()
        third("enter(arena._mutex)")
        other("arena.close()")
        assert not other("arena.has_left")
        third("leave(arena._mutex)")
        wait_until(lambda: other("arena.has_left"), "the member has left")
        assert arena.stats().members == 2

    def test_a_block_that_another_member_holds_stays(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """A block does not belong to the member that made it."""
        other = joined()
        block = arena.attach_block(other("(block := publish(arena, b'theirs')).descriptor"))
        other("block.close(); arena.close()")
        assert other("arena.has_left") or wait_until(lambda: other("arena.has_left"), "the member has left")
        assert block.view(0, 6) == b"theirs"
        block.close()


def test_a_view_keeps_only_its_own_block(arena: Arena) -> None:
    """A hundred other blocks come and go, and the bytes of the view do not change."""
    with publish(arena, os.urandom(PAGE)) as block:
        view = np.frombuffer(block.view(0, PAGE), np.uint8)
    before = view.copy()
    for _ in range(100):
        publish(arena, bytes(64 * KIB)).close()
    wait_until(lambda: arena.stats().used == PAGE, "the other blocks are released")
    np.testing.assert_array_equal(view, before)
