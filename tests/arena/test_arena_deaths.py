"""A member may be killed at any moment: its space becomes free, and the blocks of other members stay as they are."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count

import numpy as np
import pytest
from other_processes import Process, publish, reservations, wait_until, wait_until_empty

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import ArenaUnavailable, StaleBlock
from dask_shm_plugin.units import PAGE

KIB = 1024
MIB = 1024 * KIB


class TestTwoProcesses:
    """Two processes share blocks."""

    def test_a_block_that_one_process_publishes_is_read_by_another(
        self, arena: Arena, joined: Callable[[], Process]
    ) -> None:
        """Descriptors work in both directions, and from a process that did not publish the block."""
        other, third = joined(), joined()
        with publish(arena, b"from here") as block:
            other("block = arena.attach_block(descriptor)", descriptor=block.descriptor)
        third("block = arena.attach_block(descriptor)", descriptor=other("block.descriptor"))
        other("block.close()")
        assert third("bytes(block.view(0, 9))") == b"from here"
        with arena.attach_block(third("(mine := publish(arena, b'from there')).descriptor")) as block:
            third("block.close(); mine.close()")
            assert block.view(0, 10) == b"from there"
        wait_until_empty(arena)

    def test_a_block_is_free_when_the_last_process_releases_it(
        self, arena: Arena, joined: Callable[[], Process]
    ) -> None:
        """The last release frees the block, whichever process published it."""
        others = [joined() for _ in range(3)]
        block = publish(arena, bytes(MIB))
        for other in others:
            other("block = arena.attach_block(descriptor)", descriptor=block.descriptor)
        block.close()
        for other in others:
            arena.holdings.tidy()
            assert arena.stats().used == MIB
            other("block.close()")
        wait_until_empty(arena)

    def test_blocks_that_are_published_at_the_same_time_do_not_overlap(
        self, arena: Arena, joined: Callable[[], Process]
    ) -> None:
        """Each process reads back the bytes that it wrote, hundreds of times."""
        others = [joined() for _ in range(4)]
        for number, other in enumerate(others):
            other.begin(f"""
                wrong = full = 0
                for turn in range(150):
                    data = bytes([{number * 50} + turn % 50]) * 4096 * (1 + turn % 40)
                    try:
                        with publish(arena, data) as block:
                            wrong += block.view(0, len(data)) != data
                    except (ArenaFull, ArenaBusy):
                        full += 1
                """)
        for other in others:
            other.end()
        assert [other("wrong") for other in others] == [0, 0, 0, 0]
        assert all(other("full") < 150 for other in others)
        wait_until_empty(arena)


class TestDeath:
    """A member is killed with SIGKILL, and another member cleans up."""

    def test_reclaiming_a_dead_member_frees_everything_that_it_held(
        self, arena: Arena, joined: Callable[[], Process]
    ) -> None:
        """A reclaim frees its drafts, its blocks, its claims on other members' blocks, its roles and its slot."""
        other = joined()
        block = publish(arena, b"x")
        other(
            "kept = [arena.draft(1000), publish(arena, bytes(10000)), arena.attach_block(found)]",
            found=block.descriptor,
        )
        other("view = kept[1].view(0, 10000); arena.roster.add_role('worker', 'tcp://a')")
        member = other("arena.member")
        assert not arena.roster.reclaim_dead()
        assert arena.stats().blocks == 3
        other.kill()
        assert arena.roster.reclaim_dead() or not arena.roster.is_live(member)
        assert not arena.roster.is_live(member)
        assert arena.stats()[:2] == (MIB, PAGE)
        assert arena.roster.roles() == []
        block.close()
        wait_until_empty(arena)

    def test_the_housekeeping_thread_reclaims_a_dead_member(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """The housekeeping thread looks for dead members without a call from other code."""
        other = joined()
        other("kept = publish(arena, bytes(1 << 20))")
        other.kill()
        wait_until(lambda: arena.stats().members == 1, "the dead process is no member any more")
        assert arena.stats().used == 0

    def test_a_draft_reclaims_the_space_of_dead_members(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """A draft that finds no room reclaims dead members itself; it does not wait for the housekeeping thread."""
        for _ in range(5):
            other = joined()
            other("kept = [arena.draft(1 << 19), publish(arena, bytes(1 << 19))]")
            other.kill()
            with arena.draft(MIB):
                pass
            wait_until_empty(arena)

    def test_a_draft_reclaims_dead_members_even_if_tidying_has_freed_something(
        self, arena: Arena, joined: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The references that tidying has released may not be enough for the draft."""
        other = joined()
        other("kept = publish(arena, bytes(1 << 20))")
        other.kill()
        monkeypatch.setattr(arena.holdings, "tidy", lambda tidy=arena.holdings.tidy: tidy() or True)
        with arena.draft(MIB):
            pass

    def test_a_death_does_not_change_the_views_of_other_members(
        self, arena: Arena, joined: Callable[[], Process]
    ) -> None:
        """Neither views of the dead member's blocks change, nor views of blocks beside them."""
        other, third = joined(), joined()
        descriptors = other("kept = [publish(arena, bytes([n]) * 65536) for n in range(16)]") or other(
            "[block.descriptor for block in kept]"
        )
        blocks = [arena.attach_block(descriptor) for descriptor in descriptors[::2]]
        mine = [np.frombuffer(block.view(0, 65536), np.uint8) for block in blocks]
        third(
            "theirs = [np.frombuffer(arena.attach_block(d).view(0, 65536), np.uint8) for d in found]",
            found=descriptors[::4],
        )
        other.kill()
        arena.roster.reclaim_dead()
        assert arena.stats().used == MIB // 2
        for _ in range(8):
            publish(arena, b"\xff" * 65536).close()
        assert [set(view.tolist()) for view in mine] == [{n} for n in range(0, 16, 2)]
        assert third("[set(view.tolist()) for view in theirs]") == [{n} for n in range(0, 16, 4)]
        with pytest.raises(StaleBlock):
            arena.attach_block(descriptors[1])
        for block in blocks:
            block.close()

    def test_a_member_that_dies_while_it_holds_the_mutex_locks_no_member_out(
        self, arena: Arena, joined: Callable[[], Process]
    ) -> None:
        """The kernel drops the mutex with its process, even while a forked child of it lives."""
        other = joined()
        other("enter(arena._mutex)")
        child = other.fork()
        other.kill()
        with publish(arena, b"x"):
            arena.validate()
        assert child("1 + 1") == 2

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "action",
        [
            "publish(arena, b'x')",
            "draft.seal()",
            "draft.__exit__(None, None, None)",
            "block.close(); arena.holdings.tidy()",
            "again = arena.attach_block(found)",
            "arena.roster.add_role('worker', 'tcp://a')",
            "block.close(); draft.seal().close(); arena.close()",
        ],
    )
    def test_a_member_that_is_killed_between_two_stores_leaves_nothing(
        self, arena: Arena, process: Callable[[], Process], action: str
    ) -> None:
        """The process is killed before each store of the action, in any of its threads, and nothing of it may stay."""
        for store in count():
            with publish(arena, b"x") as block:
                other = process()
                other("threading.settrace(lambda *event: watch(*event)); watch = lambda *_: None")
                other(
                    "arena = Arena.attach(at, arena_id, warm=1 << 20)",
                    at=arena.segment.whereabouts,
                    arena_id=arena.arena_id,
                )
                other("block, draft = publish(arena, b'x'), arena.draft(1)")
                other("watch = watcher(lambda: os.kill(os.getpid(), signal.SIGKILL), store)", store=store)
                other.begin(f"sys.settrace(watch); {action}; sys.settrace(None)", found=block.descriptor)
                is_killed = other.is_killed()
                other.kill()
                wait_until(
                    lambda: arena.roster.reclaim_dead() or arena.stats().members == 1,
                    "the dead process is no member any more",
                )
                arena.validate()
            wait_until_empty(arena)
            if not is_killed:
                break
        assert store > 0

    @pytest.mark.parametrize("seed", range(3))
    def test_members_that_are_killed_at_any_moment_leave_nothing(
        self, arena: Arena, joined: Callable[[], Process], seed: int
    ) -> None:
        """The victims draft, seal, attach, map and drop; after each death only the block of this process is left."""
        chance = random.Random(seed)
        with publish(arena, b"stays") as stays:
            for _ in range(10):
                victims = [joined() for _ in range(2)]
                for victim in victims:
                    victim.begin(
                        """
                        import itertools
                        for turn in itertools.count():
                            try:
                                with arena.draft(4096 * (1 + turn % 9)) as draft, arena.attach_block(found) as again:
                                    if turn % 4:
                                        draft.write(0, memoryview(b"x"))
                                        block = draft.seal()
                                        view = block.view(0, 1)
                                        block.close()
                            except (ArenaFull, ArenaBusy):
                                pass
                        """,
                        found=stays.descriptor,
                    )
                begun, turns = reservations(arena), chance.randrange(1, 100)
                wait_until(
                    lambda begun=begun, turns=turns: reservations(arena) >= begun + turns, "the victims have worked"
                )
                for victim in victims:
                    victim.kill()
                wait_until(
                    lambda: arena.roster.reclaim_dead() or arena.stats().members == 1,
                    "the dead processes are no members any more",
                )
                arena.validate()
                # The housekeeping thread may be about to reclaim the dead members.
                wait_until(
                    lambda: arena.stats()[1:2] + arena.stats()[3:] == (PAGE, 1, 1), "only the block that stays is left"
                )
            assert stays.view(0, 5) == b"stays"


class TestFork:
    """A forked child has the views of its parent, and no other part of its membership."""

    @pytest.fixture
    def parent(self, joined: Callable[[], Process]) -> Process:
        """Start a member with a block, a view and a draft."""
        one = joined()
        one("block = publish(arena, b'parents'); view = block.view(0, 7); draft = arena.draft(100)")
        return one

    def test_a_child_releases_nothing_of_its_parent(self, arena: Arena, parent: Process) -> None:
        """The child releases nothing when it drops or closes inherited objects, nor when it ends."""
        child = parent.fork()
        child("""
            block.close()
            draft.__exit__(None, None, None)
            view = block = None
            gc.collect()
            arena.holdings.tidy()
            arena.close()
            """)
        child.leave()
        arena.roster.reclaim_dead()
        assert arena.stats()[3:] == (2, 2)
        assert arena.roster.is_live(parent("arena.member"))
        assert parent("bytes(view)") == b"parents"
        parent("draft.write(0, memoryview(b'x')); sealed = draft.seal()")

    def test_a_child_does_not_warn_of_its_parents_open_blocks(self, parent: Process) -> None:
        """Only the process that opened a block or draft must close it, so the child emits no ResourceWarning."""
        child = parent.fork()
        child("""
            import warnings
            caught = warnings.catch_warnings(record=True)
            seen = caught.__enter__()
            warnings.simplefilter("always")
            del block, draft
            gc.collect()
            """)
        assert child("[str(warning.message) for warning in seen]") == []

    @pytest.mark.parametrize(
        "action",
        ["arena.draft(1)", "arena.attach_block(block.descriptor)", "block.view(0, 1)", "arena.stats()", "draft.seal()"],
    )
    def test_a_child_is_not_a_member_of_its_parents_arena(self, parent: Process, action: str) -> None:
        """Each operation on the inherited arena is refused in the child, and the number of members does not change."""
        child = parent.fork()
        with pytest.raises(ArenaUnavailable, match="forked"):
            child(action)
        assert parent("arena.stats().members") == 2

    def test_the_views_of_a_child_outlive_its_parent(self, arena: Arena, parent: Process) -> None:
        """The claims of a dead parent stay as long as its child lives, and are reclaimed when the child has ended."""
        child = parent.fork()
        member = parent("arena.member")
        parent.kill()
        arena.roster.reclaim_dead()
        assert arena.roster.is_live(member)
        for _ in range(5):
            publish(arena, b"\xff" * (MIB // 2)).close()
        assert child("bytes(view)") == b"parents"
        child.kill()
        wait_until(
            lambda: arena.roster.reclaim_dead() or not arena.roster.is_live(member),
            "the dead process is no member any more",
        )
        wait_until_empty(arena)

    def test_a_slot_is_not_reused_while_a_child_of_its_last_member_lives(
        self, arena: Arena, parent: Process, joined: Callable[[], Process]
    ) -> None:
        """The child keeps the lock on the slot, which stands for the dead parent."""
        child = parent.fork()
        before = parent("arena.member")
        parent.kill()
        after = joined()("arena.member")
        assert after.slot not in (before.slot, arena.member.slot)
        assert child("bytes(view)") == b"parents"

    def test_a_child_can_join_as_a_member_of_its_own(self, arena: Arena, parent: Process) -> None:
        """The child then has references of its own, which the death of its parent does not affect."""
        child = parent.fork()
        child("own = Arena.attach(arena.segment.whereabouts, arena.arena_id, warm=1 << 20)")
        child("mine = own.attach_block(block.descriptor)")
        parent.kill()
        assert child("bytes(mine.view(0, 7))") == b"parents"
        assert {member.slot for member in (arena.member, child("arena.member"), child("own.member"))} == {0, 1, 2}
        child("mine.close(); publish(own, b'x').close()")
        child.kill()
        wait_until(lambda: arena.stats().members == 1, "parent and child are no members any more")
        wait_until_empty(arena)
