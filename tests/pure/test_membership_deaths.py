"""Members may all be killed: what they leave is a few KiB with a name, which the next to come removes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from other_processes import JOIN, LEAVE, LOOK, Process, join, publish, wait_until

from dask_shm_plugin import membership
from dask_shm_plugin.rendezvous import exists, name_for


def leftovers(prefix: str) -> set[str]:
    """Return the names that this run has left."""
    return {f"/{path.name}" for path in Path("/dev/shm").glob(f"{prefix}*")}


class TestDeath:
    """SIGKILL, at any time."""

    def test_when_all_are_killed_a_few_kib_are_left(
        self, cluster: str, member: Callable[..., Process], prefix: str
    ) -> None:
        """A name without memory behind it: the kernel has freed the rest."""
        others = [member() for _ in range(3)]
        others[0]("block = publish(arena, bytes(1 << 20))")
        for other in others:
            other.kill()
        assert leftovers(prefix) == {name_for(cluster)}
        assert Path(f"/dev/shm{name_for(cluster)}").stat().st_size <= 16384
        assert membership.join(cluster, "client", "a") is None
        join(cluster)

    def test_the_next_of_the_same_cluster_begins_anew(self, cluster: str, member: Callable[..., Process]) -> None:
        """In place of the leftover."""
        other = member()
        before = other("arena.arena_id")
        other.kill()
        arena = join(cluster)
        assert arena.arena_id != before
        assert arena.stats().members == 1
        assert member(LOOK)("arena.arena_id") == arena.arena_id

    def test_the_next_of_another_cluster_removes_the_leftover(
        self, cluster: str, member: Callable[..., Process], prefix: str
    ) -> None:
        """And nothing that somebody attends."""
        elsewhere = f"{cluster}-elsewhere"
        dead, alive = member(), member(JOIN.replace("cluster,", "cluster + '-alive',"))
        dead.kill()
        join(elsewhere)
        assert leftovers(prefix) == {name_for(elsewhere), name_for(f"{cluster}-alive")}
        assert alive("arena.stats().members") == 1
        membership.leave(elsewhere, "nanny", "tcp://here")

    def test_others_join_through_whoever_lives(self, cluster: str, member: Callable[..., Process]) -> None:
        """The one that made the arena is not needed."""
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

    def test_a_death_in_the_middle_of_joining_stops_nobody(self, cluster: str, process: Callable[[], Process]) -> None:
        """In each function that joining calls: the process is killed there, and the next one joins."""
        calls = 0
        while True:
            other = process()
            other(
                """
                left = [calls]
                homes = [f"dask_shm_plugin.{name}" for name in ("membership", "rendezvous", "arena", "segment", "liveness")]

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
    """A forked child belongs to no arena, but it can join as itself."""

    def test_a_child_is_no_member(self, cluster: str, member: Callable[..., Process]) -> None:
        """Whatever it does, its parent stays one."""
        parent = member()
        child = parent.fork()
        assert child("membership.all_arenas(), membership.of_cluster(cluster)") == ([], None)
        child(LEAVE.replace("os.getpid()", "os.getppid()"))
        child.leave()
        assert exists(name_for(cluster))
        assert parent("arena.stats().members") == 1
        assert join(cluster).arena_id == parent("arena.arena_id")

    def test_a_child_can_join_as_itself(self, cluster: str, member: Callable[..., Process]) -> None:
        """It is another member of the same arena, and its end is its own."""
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
        """A thread of the parent was joining when it forked."""
        parent = process()
        parent("membership._lock.acquire()")
        child = parent.fork()
        child(JOIN, cluster=cluster)
        assert child("arena.stats().members") == 1
        child(LEAVE)

    def test_a_child_does_not_keep_the_rendezvous_locked_when_its_parent_is_killed(
        self, cluster: str, process: Callable[[], Process]
    ) -> None:
        """A thread of the parent was joining or leaving when it forked; others join, and the last one removes the name."""
        parent = process()
        parent("meeting = rendezvous.enter(name, create=True); meeting.attend()", name=name_for(cluster))
        child = parent.fork()
        parent.kill()
        join(cluster)
        membership.leave(cluster, "nanny", "tcp://here")
        assert not exists(name_for(cluster))
        assert child("1 + 1") == 2

    def test_the_rendezvous_is_let_go_of_though_others_have_inherited_it(
        self, cluster: str, process: Callable[[], Process]
    ) -> None:
        """A library may fork without telling Python, and the child closes nothing."""
        parent = process()
        parent("meeting = rendezvous.enter(name, create=True); meeting.attend()", name=name_for(cluster))
        parent("import ctypes; libc = ctypes.PyDLL(None); child = libc.fork() or libc.pause()")
        parent("meeting.close()")
        join(cluster)
        membership.leave(cluster, "nanny", "tcp://here")
        assert not exists(name_for(cluster))
        parent("os.kill(child, signal.SIGKILL)")

    def test_a_child_that_lives_on_does_not_keep_the_next_from_beginning_anew(
        self, cluster: str, member: Callable[..., Process]
    ) -> None:
        """Nobody can join through it; its views stay as they are."""
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
