"""A role ends when its owner is garbage-collected, even if no code has ended the role."""

from __future__ import annotations

from other_processes import wait_until

from dask_shm_plugin.node import membership
from dask_shm_plugin.node.rendezvous import exists, name_for


class Owner:
    """The object that will end a role."""


def test_a_role_ends_with_its_owner(cluster: str) -> None:
    """The housekeeping thread ends such a role, and the process leaves the arena with its last role."""
    first, second = Owner(), Owner()
    arena = membership.join(cluster, "nanny", "here", capacity=lambda: 1 << 20, owner=first)
    assert arena is not None
    assert membership.join(cluster, "worker", "here", owner=second) is arena
    del first
    wait_until(lambda: [role.kind for role in arena.roster.roles()] == ["worker"], "the first role ends")
    assert membership.of_cluster(cluster) is arena
    del second
    wait_until(lambda: arena.has_left, "the process leaves")
    assert not exists(name_for(cluster))


def test_the_owner_ends_its_own_role_among_equal_ones(cluster: str) -> None:
    """A plugin that replaces another one has the same role at the same address."""
    first, second = Owner(), Owner()
    arena = membership.join(cluster, "worker", "here", capacity=lambda: 1 << 20, owner=first)
    assert membership.join(cluster, "worker", "here", owner=second) is arena
    membership.leave(cluster, "worker", "here", owner=second)
    del second
    assert membership.of_cluster(cluster) is arena
    membership.leave(cluster, "worker", "here", owner=first)
    assert membership.of_cluster(cluster) is None
