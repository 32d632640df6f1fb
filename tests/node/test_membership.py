"""A process joins an arena with its first role and leaves with its last; members of a cluster share one arena."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from other_processes import JOIN, LEAVE, LOOK, Process, join, publish, wait_until

from dask_shm_plugin.exceptions import ArenaBusy
from dask_shm_plugin.node import membership
from dask_shm_plugin.node.rendezvous import exists, name_for

MIB = 1 << 20


class TestOneProcess:
    """A process is one member, however many roles it has."""

    def test_the_first_role_creates_the_arena(self, cluster: str) -> None:
        """The arena has the given capacity and the given ``warm`` time."""
        arena = membership.join(cluster, "nanny", "tcp://a", capacity=lambda: 3 * MIB, warm=MIB)
        assert arena.stats().capacity == 3 * MIB
        assert arena.trimmer.warm == MIB
        assert exists(name_for(cluster))

    def test_a_role_without_a_capacity_creates_no_arena(self, cluster: str) -> None:
        """If there is no arena yet, it gets None, and no rendezvous is made."""
        assert membership.join(cluster, "client", "tcp://a") is None
        assert not exists(name_for(cluster))
        assert membership.all_arenas() == []

    def test_several_roles_are_one_member(self, cluster: str) -> None:
        """All roles get the same arena, and other members see all of them."""
        arenas = {id(join(cluster, kind, address)) for kind in ("nanny", "worker", "client") for address in "ab"}
        assert len(arenas) == 1
        arena = membership.of_cluster(cluster)
        assert arena.stats().members == 1
        roles = {(role.member, role.kind, role.address) for role in arena.roster.roles()}
        assert roles == {(arena.member, kind, address) for kind in ("nanny", "worker", "client") for address in "ab"}

    def test_threads_that_join_at_the_same_time_are_one_member(self, cluster: str) -> None:
        """Several workers of one process may start at the same time."""
        gate, arenas = threading.Barrier(8), []

        def work(number: int) -> None:
            gate.wait()
            arenas.append(join(cluster, "worker", f"tcp://{number}"))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(arena) for arena in arenas}) == 1
        assert len(arenas[0].roster.roles()) == 8

    def test_the_process_leaves_with_its_last_role(self, cluster: str) -> None:
        """Until then the process stays a member; afterwards neither the arena nor its name is left."""
        arena = join(cluster, "nanny", "a")
        join(cluster, "client", "a")
        membership.leave(cluster, "nanny", "a")
        assert [role.kind for role in arena.roster.roles()] == ["client"]
        assert membership.of_cluster(cluster) is arena
        assert not arena.has_left
        membership.leave(cluster, "client", "a")
        assert arena.has_left
        assert membership.of_cluster(cluster) is None
        assert not exists(name_for(cluster))

    def test_a_role_that_was_joined_twice_is_left_twice(self, cluster: str) -> None:
        """A role that registers twice has two entries, so one leave does not end the membership."""
        arena = join(cluster)
        assert join(cluster) is arena
        membership.leave(cluster, "nanny", "tcp://here")
        assert not arena.has_left
        membership.leave(cluster, "nanny", "tcp://here")
        assert arena.has_left

    def test_leaving_without_having_joined_is_harmless(self, cluster: str) -> None:
        """The call may name another cluster, role or address, or be made a second time."""
        membership.leave(cluster, "nanny", "tcp://here")
        arena = join(cluster)
        membership.leave("another", "nanny", "tcp://here")
        membership.leave(cluster, "worker", "tcp://here")
        membership.leave(cluster, "nanny", "tcp://there")
        assert not arena.has_left
        for _ in range(2):
            membership.leave(cluster, "nanny", "tcp://here")
        assert arena.has_left

    def test_an_arena_is_found_by_its_id_and_by_its_cluster(self, cluster: str) -> None:
        """A process may be a member of several clusters."""
        assert membership.of_cluster(cluster) is membership.find(bytes(16)) is None
        first, second = join(cluster), join(f"{cluster}-second")
        assert first.arena_id != second.arena_id
        assert membership.find(first.arena_id) is membership.of_cluster(cluster) is first
        assert membership.find(second.arena_id) is membership.of_cluster(f"{cluster}-second") is second
        assert set(membership.all_arenas()) == {first, second}
        membership.leave(f"{cluster}-second", "nanny", "tcp://here")
        assert membership.find(second.arena_id) is None
        assert membership.all_arenas() == [first]

    def test_views_outlive_the_membership(self, cluster: str) -> None:
        """The name is removed at once, the memory is freed with the last view."""
        arena = join(cluster)
        with publish(arena, b"kept") as block:
            view = block.view(0, 4)
        membership.leave(cluster, "nanny", "tcp://here")
        assert not exists(name_for(cluster))
        assert membership.all_arenas() == []
        assert view == b"kept"
        del view
        wait_until(lambda: arena.has_left, "the process has left")


class TestSeveralProcesses:
    """All members of a cluster on a node share one arena."""

    def test_the_second_process_joins_the_arena_of_the_first(
        self, cluster: str, member: Callable[..., Process]
    ) -> None:
        """Its own capacity is not used, and a process that may not create an arena joins as well."""
        arena = join(cluster)
        other = member(JOIN.replace("1 << 20", "1 / 0"))
        third = member(LOOK)
        assert other("arena.arena_id") == third("arena.arena_id") == arena.arena_id
        assert arena.stats().members == 3
        assert {role.kind for role in arena.roster.roles()} == {"nanny", "worker"}
        with publish(arena, b"shared") as block:
            other("block = membership.find(d.arena_id).attach_block(d)", d=block.descriptor)
            assert other("bytes(block.view(0, 6))") == b"shared"
        other("block.close()")

    def test_processes_that_arrive_first_at_the_same_time_share_one_arena(
        self, cluster: str, process: Callable[[], Process]
    ) -> None:
        """Eight processes start at once, and each of them would create the arena."""
        others = [process() for _ in range(8)]
        for _ in range(3):
            for other in others:
                other.begin(JOIN, cluster=cluster)
            for other in others:
                other.end()
            assert len({other("arena.arena_id") for other in others}) == 1
            assert len({other("arena.member") for other in others}) == 8
            for other in others:
                other.begin(LEAVE)
            for other in others:
                other.end()
            assert not exists(name_for(cluster))

    def test_joining_and_leaving_at_the_same_time_never_fails(
        self, cluster: str, process: Callable[[], Process]
    ) -> None:
        """A process that joins while the last member leaves either joins that arena or creates a new one."""
        others = [process() for _ in range(4)]
        for other in others:
            other.begin(f"for _ in range(25):\n    {JOIN}\n    arena.validate()\n    {LEAVE}", cluster=cluster)
        for other in others:
            other.end()
        assert not exists(name_for(cluster))

    def test_the_last_process_removes_the_name(self, cluster: str, member: Callable[..., Process]) -> None:
        """The creator does not remove it, so that the other members can still be found."""
        first, second = member(), member()
        first(LEAVE)
        assert exists(name_for(cluster))
        third = member(LOOK)
        assert third("arena.arena_id") == second("arena.arena_id")
        second(LEAVE)
        assert exists(name_for(cluster))
        third(LEAVE)
        assert not exists(name_for(cluster))

    def test_a_process_that_exits_leaves(self, cluster: str, member: Callable[..., Process]) -> None:
        """An exit function leaves all arenas, so no role has to be ended before."""
        arena = join(cluster)
        other, alone = member(), member(JOIN.replace("cluster,", "cluster + '-alone',"))
        assert exists(name_for(f"{cluster}-alone"))
        other.leave()
        alone.leave()
        assert arena.stats().members == 1
        assert not exists(name_for(f"{cluster}-alone"))

    def test_an_arena_that_all_members_have_left_is_not_found_again(self, cluster: str) -> None:
        """The next process creates a new arena."""
        first = join(cluster).arena_id
        membership.leave(cluster, "nanny", "tcp://here")
        assert membership.join(cluster, "client", "tcp://here") is None
        assert join(cluster).arena_id != first

    def test_a_process_that_rejoins_while_its_views_live_is_still_one_member(
        self, cluster: str, member: Callable[..., Process]
    ) -> None:
        """A process must have one descriptor of the segment: closing a second one would drop the locks of the first."""
        arena = join(cluster)
        other = member()
        other("view = publish(arena, b'kept').view(0, 4); home = os.readlink(f'/proc/self/fd/{arena.segment.fd}')")
        other(LEAVE)
        other(JOIN)
        assert other("arena.arena_id") == arena.arena_id
        other("links = [f'/proc/self/fd/{number}' for number in range(100)]")
        other("homes = [os.readlink(link) for link in links if os.path.lexists(link)]")
        assert other("homes.count(home)") == 1
        assert arena.stats().members == 2

    def test_a_process_that_rejoins_while_its_views_live_keeps_its_mutex(
        self, cluster: str, member: Callable[..., Process]
    ) -> None:
        """A late release of its first membership must not unlock the table that it has locked in its second."""
        arena = join(cluster)
        other = member()
        other("first, view = arena, publish(arena, b'kept').view(0, 4)")
        other(LEAVE)
        other(JOIN)
        other("enter(arena._mutex)")
        with pytest.raises(ArenaBusy):
            arena.draft(1)
        other("view = None; gc.collect(); first.holdings.tidy()")
        with pytest.raises(ArenaBusy):
            arena.draft(1)
        other("leave(arena._mutex)")
