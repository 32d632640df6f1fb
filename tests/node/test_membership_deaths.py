"""If all members are killed, only a rendezvous of a few KiB is left, which the next process removes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from other_processes import JOIN, LEAVE, LOOK, Process, join, publish, wait_until

from dask_shm_plugin.node import membership
from dask_shm_plugin.node.rendezvous import exists, name_for


def leftovers(prefix: str) -> set[str]:
    """Return the names in ``/dev/shm`` that this test run has left."""
    return {f"/{path.name}" for path in Path("/dev/shm").glob(f"{prefix}*")}


class TestDeath:
    """Members are killed with SIGKILL at any time."""

    def test_killing_all_members_leaves_only_the_rendezvous(
        self, cluster: str, member: Callable[..., Process], prefix: str
    ) -> None:
        """The segment has no name, so the kernel frees its memory with the last process."""
        others = [member() for _ in range(3)]
        others[0]("block = publish(arena, bytes(1 << 20))")
        for other in others:
            other.kill()
        assert leftovers(prefix) == {name_for(cluster)}
        assert Path(f"/dev/shm{name_for(cluster)}").stat().st_size <= 16384
        assert membership.join(cluster, "client", "a") is None
        join(cluster)

    def test_the_next_process_of_the_same_cluster_replaces_the_leftover(
        self, cluster: str, member: Callable[..., Process]
    ) -> None:
        """A rendezvous that no live process attends is filled anew."""
        other = member()
        before = other("arena.arena_id")
        other.kill()
        arena = join(cluster)
        assert arena.arena_id != before
        assert arena.stats().members == 1
        assert member(LOOK)("arena.arena_id") == arena.arena_id

    def test_the_next_process_of_another_cluster_removes_the_leftover(
        self, cluster: str, member: Callable[..., Process], prefix: str
    ) -> None:
        """A rendezvous that a live process attends is not removed."""
        elsewhere = f"{cluster}-elsewhere"
        dead, alive = member(), member(JOIN.replace("cluster,", "cluster + '-alive',"))
        dead.kill()
        join(elsewhere)
        assert leftovers(prefix) == {name_for(elsewhere), name_for(f"{cluster}-alive")}
        assert alive("arena.stats().members") == 1
        membership.leave(elsewhere, "nanny", "tcp://here")

    def test_a_process_joins_through_any_live_member(self, cluster: str, member: Callable[..., Process]) -> None:
        """The process that created the arena is not needed."""
        maker, second = member(), member()
        descriptor = second("(block := publish(arena, b'kept')).descriptor")
        maker.kill()
        arena = join(cluster)
        assert arena.arena_id == second("arena.arena_id")
        second.kill()
        third = member(LOOK)
        assert third("arena.arena_id") == arena.arena_id
        arena.roster.reclaim_dead()
        assert arena.stats()[3:] == (0, 2)
        assert descriptor.arena_id == arena.arena_id

    def test_a_death_while_joining_does_not_prevent_the_next_join(
        self, cluster: str, process: Callable[[], Process]
    ) -> None:
        """The process is killed in each function that joining calls, in turn, and another process joins afterwards."""
        calls = 0
        while True:
            other = process()
            other(
                """
                left = [calls]
                homes = [f"dask_shm_plugin.{name}" for name in ("node.membership", "node.rendezvous", "arena.arena", "linux.segment", "linux.locks")]

                def watch(frame, event, _):
                    if event == "call" and frame.f_globals.get("__name__") in homes:
                        left[0] -= 1
                        if left[0] < 0:
                            os.kill(os.getpid(), signal.SIGKILL)
                """,
                calls=calls,
            )
            other.begin(f"sys.setprofile(watch); {JOIN}; sys.setprofile(None)", cluster=cluster)
            is_killed = other.is_killed()
            other.kill()
            arena = join(cluster)
            arena.validate()
            assert arena.stats()[3:] == (0, 1)
            membership.leave(cluster, "nanny", "tcp://here")
            assert not exists(name_for(cluster))
            if not is_killed:
                break
            calls += 1
        assert calls > 10


class TestFork:
    """A forked child belongs to no arena, but it can join as a member of its own."""

    def test_a_child_is_not_a_member(self, cluster: str, member: Callable[..., Process]) -> None:
        """No action of the child ends the membership of its parent."""
        parent = member()
        child = parent.fork()
        assert child("membership.all_arenas(), membership.of_cluster(cluster)") == ([], None)
        child(LEAVE.replace("os.getpid()", "os.getppid()"))
        child.leave()
        assert exists(name_for(cluster))
        assert parent("arena.stats().members") == 1
        assert join(cluster).arena_id == parent("arena.arena_id")

    def test_a_child_can_join_as_a_member_of_its_own(self, cluster: str, member: Callable[..., Process]) -> None:
        """The child is another member of the same arena, and its end does not affect its parent."""
        parent = member()
        child = parent.fork()
        child(JOIN)
        assert child("arena.arena_id") == parent("arena.arena_id")
        assert child("arena.member") != parent("arena.member")
        assert parent("arena.stats().members") == 2
        with publish(join(cluster), b"x") as block:
            for one in (parent, child):
                one("block = arena.attach_block(found)", found=block.descriptor)
            child.leave()
            assert parent("bytes(block.view(0, 1))") == b"x"
        parent("block.close()")
        wait_until(lambda: membership.of_cluster(cluster).stats().members == 2, "the child has left")

    def test_a_child_does_not_wait_for_a_lock_that_its_parent_held(
        self, cluster: str, process: Callable[[], Process]
    ) -> None:
        """Another thread of the parent may be joining at the moment of the fork."""
        parent = process()
        parent("membership._lock.acquire()")
        child = parent.fork()
        child(JOIN, cluster=cluster)
        assert child("arena.stats().members") == 1
        child(LEAVE)

    def test_a_child_does_not_keep_the_rendezvous_locked_when_its_parent_is_killed(
        self, cluster: str, process: Callable[[], Process]
    ) -> None:
        """A thread of the parent may be joining or leaving at the fork; others must be able to join and leave."""
        parent = process()
        parent("meeting = rendezvous.enter(name, create=True); meeting.attend()", name=name_for(cluster))
        child = parent.fork()
        parent.kill()
        join(cluster)
        membership.leave(cluster, "nanny", "tcp://here")
        assert not exists(name_for(cluster))
        assert child("1 + 1") == 2

    def test_closing_a_rendezvous_unlocks_it_even_if_a_child_has_inherited_it(
        self, cluster: str, process: Callable[[], Process]
    ) -> None:
        """A library may fork without Python's hooks, and such a child closes no descriptor."""
        parent = process()
        parent("meeting = rendezvous.enter(name, create=True); meeting.attend()", name=name_for(cluster))
        parent("import ctypes; libc = ctypes.PyDLL(None); child = libc.fork() or libc.pause()")
        parent("meeting.close()")
        join(cluster)
        membership.leave(cluster, "nanny", "tcp://here")
        assert not exists(name_for(cluster))
        parent("os.kill(child, signal.SIGKILL)")

    def test_a_child_that_lives_on_does_not_prevent_a_new_arena(
        self, cluster: str, member: Callable[..., Process]
    ) -> None:
        """No process can join through the child, and its views do not change."""
        parent = member()
        parent("with publish(arena, b'parents') as block: view = block.view(0, 7)")
        before = parent("arena.arena_id")
        child = parent.fork()
        parent.kill()
        assert membership.join(cluster, "client", "a") is None
        arena = join(cluster)
        assert arena.arena_id != before
        publish(arena, b"\xff" * 4096).close()
        assert child("bytes(view)") == b"parents"
        child.kill()
