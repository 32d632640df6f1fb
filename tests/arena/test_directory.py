"""A listing of a member's value is complete or absent, is found only while the member lives, and can be withdrawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from arena_fixtures import MIB
from other_processes import JOIN, LEAVE, Process, join, wait_until

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import MemoryExhausted
from dask_shm_plugin.node import membership
from dask_shm_plugin.table import layout, tags
from dask_shm_plugin.table.layout import PLACE_BYTES, directory_offset
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.table.tags import PLACES

CLUSTER = "tcp://directory"


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Create an arena for this process."""
    arena = Arena.create(4 * MIB)
    yield arena
    arena.close()


def find(arena: Arena, name: bytes) -> bytes | None:
    """Look up a name in this process's own directory."""
    return arena.directory.find(arena.member, name)


def place_of(arena: Arena, name: bytes) -> int:
    """Return the place at which this process has listed a name."""
    return next(place for place, listed in arena.directory._names.items() if listed == name)


def test_a_listing_is_found_until_it_is_removed(arena: Arena) -> None:
    """A name has at most one listing, the one that was added last."""
    assert find(arena, b"x") is None
    assert arena.directory.is_empty(arena.member)
    assert arena.directory.add(b"x", b"one")
    assert not arena.directory.is_empty(arena.member)
    assert find(arena, b"x") == b"one"
    assert arena.directory.add(b"x", b"two")
    assert find(arena, b"x") == b"two"
    assert find(arena, b"y") is None
    arena.directory.remove(b"x")
    arena.directory.remove(b"x")
    assert find(arena, b"x") is None
    assert arena.directory.is_empty(arena.member)


def test_data_too_long_for_a_place_is_not_listed(arena: Arena) -> None:
    """The longest data that fits is found in full."""
    largest = bytes(range(256)) * 8
    largest = largest[: PLACE_BYTES - 24]
    assert arena.directory.add(b"x", largest)
    assert find(arena, b"x") == largest
    assert not arena.directory.add(b"y", largest + b"!")
    assert find(arena, b"y") is None


def test_with_more_names_than_places_each_listing_is_right_or_missing(arena: Arena) -> None:
    """An older listing makes room for a newer one, and a removed name is not found even if its place is reused."""
    names = [f"value-{n}".encode() for n in range(3 * PLACES)]
    for name in names:
        assert arena.directory.add(name, name * 3)
    found = {name: find(arena, name) for name in names}
    assert all(data in (None, name * 3) for name, data in found.items())
    assert PLACES * 3 // 4 < sum(data is not None for data in found.values()) <= PLACES
    assert found[names[-1]] is not None
    for name in names[::2]:
        arena.directory.remove(name)
    assert all(find(arena, name) is None for name in names[::2])
    assert [find(arena, name) for name in names[1::2]] == [found[name] for name in names[1::2]]


def test_a_damaged_or_incomplete_listing_is_not_found(arena: Arena) -> None:
    """A change of any byte is detected by the checksum."""
    assert arena.directory.add(b"x", b"some data")
    start = directory_offset(arena.member.slot, place_of(arena, b"x"))
    length = 24 + len(b"some data")
    for at in range(length):
        (before,) = arena.segment.read(start + at, 1)
        arena.segment.write(start + at, memoryview(bytes([before ^ 0x10])))
        assert find(arena, b"x") is None, at
        arena.segment.write(start + at, memoryview(bytes([before])))
    assert find(arena, b"x") == b"some data"


def test_a_name_that_is_not_listed_costs_no_system_call(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker with hundreds of large values may be asked for thousands of small ones."""
    for n in range(3 * PLACES):
        arena.directory.add(f"large-{n}".encode(), b"data")
    reads: list[int] = []
    monkeypatch.setattr(arena.segment, "read", lambda *where: reads.append(1) or memoryview(bytes(PLACE_BYTES)))
    assert all(find(arena, f"small-{n}".encode()) is None for n in range(2000))
    assert len(reads) < 5


@pytest.mark.parametrize("scribble", [0x00, 0x01, 0x5A, 0xFF])
def test_stray_writes_over_the_tags_bring_no_removed_listing_back(arena: Arena, scribble: int) -> None:
    """A removed listing is still complete in its place, and only its tag is cleared."""
    assert arena.directory.add(b"x", b"data")
    arena.directory.remove(b"x")
    start, length = layout.MARKS_AT * 8, tags.WORDS * 8
    arena.segment.write(start, memoryview(bytes([scribble]) * length))
    assert find(arena, b"x") is None


def test_listings_in_a_truncated_segment_are_forgotten(process: Callable[[], Process]) -> None:
    """A store behind the end of the segment would end the process with SIGBUS."""
    one = process()
    one("arena = Arena.create(1 << 20)")
    assert one("arena.directory.add(b'x', b'data') and arena.directory.add(b'y', b'data')")
    one("import os")
    one("os.ftruncate(arena.segment.fd, 0)")
    one("arena.directory.remove(b'x')")
    one("arena.directory.close()")
    assert one("repr(arena.directory)").endswith("0 listings>")
    one("arena.close()")


def test_a_listing_belongs_to_one_incarnation(arena: Arena) -> None:
    """The next member in the same slot is another process."""
    assert arena.directory.add(b"x", b"data")
    slot, incarnation = arena.member
    assert arena.directory.find(Member(slot, incarnation + 1), b"x") is None
    assert arena.directory.find(Member(slot + 1, incarnation), b"x") is None


def test_a_listing_is_refused_if_its_page_cannot_be_made(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """The earlier listing of that name is not found any more, either."""

    def full(offset: int, data: memoryview) -> None:
        raise MemoryExhausted("full")

    assert arena.directory.add(b"x", b"old")
    monkeypatch.setattr(arena.segment, "write", full)
    assert not arena.directory.add(b"x", b"new")
    assert find(arena, b"x") is None


def test_a_member_that_has_left_lists_nothing(process: Callable[[], Process]) -> None:
    """Its listings are withdrawn when it leaves, and it can neither add nor find any afterwards."""
    arena = join(CLUSTER)
    other = process()
    other(JOIN, cluster=CLUSTER)
    other("arena.directory.add(b'x', b'data')")
    member = other("arena.member")
    assert arena.directory.find(member, b"x") == b"data"
    other(LEAVE)
    assert arena.directory.find(member, b"x") is None
    membership.leave(CLUSTER, "nanny", "tcp://here")
    assert not arena.directory.add(b"y", b"data")
    assert arena.directory.find(member, b"x") is None


@pytest.mark.parametrize("with_child", [False, True])
def test_listings_of_a_dead_member_are_not_found(process: Callable[[], Process], *, with_child: bool) -> None:
    """They are hidden from the moment of its death, before any reclaim, and even while a forked child of it lives."""
    arena = join(CLUSTER)
    other = process()
    other(JOIN, cluster=CLUSTER)
    other("arena.directory.add(b'x', b'data')")
    child = other.fork() if with_child else None
    member = other("arena.member")
    assert arena.directory.find(member, b"x") == b"data"
    other.kill()
    assert arena.directory.find(member, b"x") is None
    if child is not None:
        child.kill()
    wait_until(lambda: arena.stats().members == 1, "the dead member is reclaimed")
    membership.leave(CLUSTER, "nanny", "tcp://here")


def test_a_slot_begins_with_an_empty_directory(process: Callable[[], Process]) -> None:
    """The next member of a slot must not inherit the listings of the last one."""
    arena = join(CLUSTER)
    first, second = process(), process()
    first(JOIN, cluster=CLUSTER)
    first("arena.directory.add(b'x', b'data')")
    member = first("arena.member")
    first.kill()
    arena.roster.reclaim_dead()
    second(JOIN, cluster=CLUSTER)
    again = second("arena.member")
    assert again.slot == member.slot
    assert arena._access.table.members.is_live(again)
    assert arena.directory.find(again, b"x") is None
    assert not any(arena._access.table.marks.tag(again.slot, place) for place in range(PLACES))
    second.kill()
    membership.leave(CLUSTER, "nanny", "tcp://here")


def test_workers_are_found_by_their_address(arena: Arena) -> None:
    """The answer follows each change of the roles, and a nanny at the same address is not a worker."""
    roster = arena.roster
    assert roster.workers_at("tcp://a") == []
    roster.add_role("nanny", "tcp://a")
    assert roster.workers_at("tcp://a") == []
    roster.add_role("worker", "tcp://a")
    assert roster.workers_at("tcp://a") == [arena.member]
    assert roster.workers_at("tcp://b") == []
    roster.remove_role("worker", "tcp://a")
    assert roster.workers_at("tcp://a") == []
