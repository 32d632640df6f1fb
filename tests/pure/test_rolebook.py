"""Who plays which role at which address: it helps members to find each other, and promises no more than that."""

from __future__ import annotations

import pytest

from dask_shm_plugin.memberbook import Member
from dask_shm_plugin.rolebook import ENTRIES, Role
from dask_shm_plugin.table import Table


def test_a_member_may_play_several(table: Table, alice: Member, bob: Member) -> None:
    """In a LocalCluster nannies and the client are one process."""
    table.add_role(alice, "nanny", "tcp://a:1")
    table.add_role(alice, "client", "tcp://a:2")
    table.add_role(bob, "worker", "tcp://ü:3")
    roles = {Role(alice, "nanny", "tcp://a:1"), Role(alice, "client", "tcp://a:2"), Role(bob, "worker", "tcp://ü:3")}
    assert set(table.roles()) == roles
    assert len(table.roles()) == 3


def test_one_is_removed_at_a_time(table: Table, alice: Member, bob: Member) -> None:
    """A role that was added twice is played until it was removed twice, and by this member alone."""
    for member in (alice, alice, bob):
        table.add_role(member, "nanny", "tcp://a:1")
    table.remove_role(alice, "nanny", "tcp://a:1")
    assert sorted(table.roles()) == [Role(alice, "nanny", "tcp://a:1"), Role(bob, "nanny", "tcp://a:1")]
    table.remove_role(alice, "nanny", "tcp://a:1")
    table.remove_role(alice, "nanny", "tcp://a:1")
    assert table.roles() == [Role(bob, "nanny", "tcp://a:1")]


@pytest.mark.parametrize(("kind", "address"), [("worker", "tcp://a:1"), ("nanny", "tcp://a:11")])
def test_only_that_very_role_is_removed(table: Table, alice: Member, kind: str, address: str) -> None:
    """Kind and address must both be the same."""
    table.add_role(alice, "nanny", "tcp://a:1")
    table.remove_role(alice, kind, address)
    assert table.roles() == [Role(alice, "nanny", "tcp://a:1")]


def test_they_go_with_the_member(table: Table, alice: Member, bob: Member) -> None:
    """Also for the next in its slot."""
    table.add_role(alice, "nanny", "tcp://a:1")
    table.add_role(bob, "worker", "tcp://b:1")
    table.reclaim(alice)
    assert table.roles() == [Role(bob, "worker", "tcp://b:1")]
    table.join(alice.slot, 1, 1)
    assert table.roles() == [Role(bob, "worker", "tcp://b:1")]


def test_the_entries_of_those_who_left_are_used_again(table: Table) -> None:
    """Members come and go for as long as the arena lives."""
    for number in range(ENTRIES + 1):
        member = table.join(0, 1, 1)
        table.add_role(member, "worker", f"tcp://a:{number}")
        assert table.roles() == [Role(member, "worker", f"tcp://a:{number}")]
        table.reclaim(member)


def test_an_entry_too_many_is_left_out(table: Table, alice: Member) -> None:
    """It would only have helped others to find this member; a freed entry is used again."""
    for number in range(ENTRIES + 1):
        table.add_role(alice, "worker", f"tcp://a:{number}")
    assert {role.address for role in table.roles()} == {f"tcp://a:{number}" for number in range(ENTRIES)}
    table.remove_role(alice, "worker", "tcp://a:17")
    table.add_role(alice, "worker", "tcp://new")
    assert "tcp://new" in {role.address for role in table.roles()}


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 223, 224, 225, 1000])
def test_an_address_is_entered_whole_or_not_at_all(table: Table, alice: Member, length: int) -> None:
    """Half an address would be a wrong one; either way it can be removed."""
    address = "x" * length
    table.add_role(alice, "worker", address)
    assert {role.address for role in table.roles()} == ({address} if length <= 224 else set())
    table.remove_role(alice, "worker", address)
    assert table.roles() == []


def test_a_shorter_address_leaves_nothing_of_a_longer_one(table: Table, alice: Member) -> None:
    """Entries are used again as they are."""
    table.add_role(alice, "worker", "tcp://long.example.com:8786")
    table.remove_role(alice, "worker", "tcp://long.example.com:8786")
    table.add_role(alice, "nanny", "tcp://a")
    assert table.roles() == [Role(alice, "nanny", "tcp://a")]
