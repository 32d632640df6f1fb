"""The table lists the roles of the members and their addresses; this only helps members to find each other."""

from __future__ import annotations

import pytest

from dask_shm_plugin.table.members import Member
from dask_shm_plugin.table.roles import ENTRIES, RoleEntry
from dask_shm_plugin.table.table import Table


def test_a_member_may_have_several_roles(table: Table, alice: Member, bob: Member) -> None:
    """In a LocalCluster, the nannies and the client are one process."""
    table.add_role(alice, "nanny", "tcp://a:1")
    table.add_role(alice, "client", "tcp://a:2")
    table.add_role(bob, "worker", "tcp://ü:3")
    roles = {
        RoleEntry(alice, "nanny", "tcp://a:1"),
        RoleEntry(alice, "client", "tcp://a:2"),
        RoleEntry(bob, "worker", "tcp://ü:3"),
    }
    assert set(table.roles()) == roles
    assert len(table.roles()) == 3


def test_a_role_that_was_added_twice_is_removed_twice(table: Table, alice: Member, bob: Member) -> None:
    """A removal clears one entry of this member, and none of another member."""
    for member in (alice, alice, bob):
        table.add_role(member, "nanny", "tcp://a:1")
    table.remove_role(alice, "nanny", "tcp://a:1")
    assert sorted(table.roles()) == [RoleEntry(alice, "nanny", "tcp://a:1"), RoleEntry(bob, "nanny", "tcp://a:1")]
    table.remove_role(alice, "nanny", "tcp://a:1")
    table.remove_role(alice, "nanny", "tcp://a:1")
    assert table.roles() == [RoleEntry(bob, "nanny", "tcp://a:1")]


@pytest.mark.parametrize(("kind", "address"), [("worker", "tcp://a:1"), ("nanny", "tcp://a:11")])
def test_only_the_role_of_the_same_kind_and_address_is_removed(
    table: Table, alice: Member, kind: str, address: str
) -> None:
    """A process may have several roles at one address, and one role at several addresses."""
    table.add_role(alice, "nanny", "tcp://a:1")
    table.remove_role(alice, kind, address)
    assert table.roles() == [RoleEntry(alice, "nanny", "tcp://a:1")]


def test_the_roles_of_a_member_end_with_its_membership(table: Table, alice: Member, bob: Member) -> None:
    """The next member in the same slot does not inherit them."""
    table.add_role(alice, "nanny", "tcp://a:1")
    table.add_role(bob, "worker", "tcp://b:1")
    table.reclaim(alice)
    assert table.roles() == [RoleEntry(bob, "worker", "tcp://b:1")]
    table.join(alice.slot, 1, 1)
    assert table.roles() == [RoleEntry(bob, "worker", "tcp://b:1")]


def test_the_entries_of_reclaimed_members_are_reused(table: Table) -> None:
    """Members come and go as long as the arena lives."""
    for number in range(ENTRIES + 1):
        member = table.join(0, 1, 1)
        table.add_role(member, "worker", f"tcp://a:{number}")
        assert table.roles() == [RoleEntry(member, "worker", f"tcp://a:{number}")]
        table.reclaim(member)


def test_a_role_for_which_no_entry_is_free_is_left_out(table: Table, alice: Member) -> None:
    """It would only help other members to find this one; a removed role makes room for another."""
    for number in range(ENTRIES + 1):
        table.add_role(alice, "worker", f"tcp://a:{number}")
    assert {role.address for role in table.roles()} == {f"tcp://a:{number}" for number in range(ENTRIES)}
    table.remove_role(alice, "worker", "tcp://a:17")
    table.add_role(alice, "worker", "tcp://new")
    assert "tcp://new" in {role.address for role in table.roles()}


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 223, 224, 225, 1000])
def test_an_address_that_is_too_long_is_left_out(table: Table, alice: Member, length: int) -> None:
    """A truncated address would be a wrong one; removing the role is harmless either way."""
    address = "x" * length
    table.add_role(alice, "worker", address)
    assert {role.address for role in table.roles()} == ({address} if length <= 224 else set())
    table.remove_role(alice, "worker", address)
    assert table.roles() == []


def test_a_shorter_address_in_a_reused_entry_is_read_correctly(table: Table, alice: Member) -> None:
    """A reused entry still contains the bytes of the longer address."""
    table.add_role(alice, "worker", "tcp://long.example.com:8786")
    table.remove_role(alice, "worker", "tcp://long.example.com:8786")
    table.add_role(alice, "nanny", "tcp://a")
    assert table.roles() == [RoleEntry(alice, "nanny", "tcp://a")]


def test_the_fingerprint_changes_when_another_role_takes_an_entry(table: Table, alice: Member) -> None:
    """A worker may be restarted in the same process at another address."""
    table.add_role(alice, "worker", "tcp://a:1")
    before = table.fingerprint_of_roles()
    assert table.fingerprint_of_roles() == before
    table.remove_role(alice, "worker", "tcp://a:1")
    assert table.fingerprint_of_roles() != before
    table.add_role(alice, "worker", "tcp://a:2")
    assert table.fingerprint_of_roles() != before
