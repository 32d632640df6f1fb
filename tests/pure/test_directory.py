"""What members list for each other: complete or not there, of a living owner, and gone at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from conftest import MIB
from other_processes import JOIN, LEAVE, Process, join, wait_until

from dask_shm_plugin import layout, markbook, membership
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.exceptions import MemoryExhausted
from dask_shm_plugin.layout import PLACE_BYTES, directory_offset
from dask_shm_plugin.markbook import PLACES
from dask_shm_plugin.memberbook import Member

CLUSTER = "tcp://directory"


@pytest.fixture
def arena() -> Iterator[Arena]:
    """An arena of this process."""
    arena = Arena.create(4 * MIB)
    yield arena
    arena.close()


def find(arena: Arena, name: bytes) -> bytes | None:
    """Look into this process's own directory."""
    return arena.directory.find(arena.member, name)


def place_of(arena: Arena, name: bytes) -> int:
    """Return where this process has listed a name."""
    return next(place for place, listed in arena.directory._names.items() if listed == name)


def test_what_is_listed_is_found_until_it_is_crossed_out(arena: Arena) -> None:
    """Under its own name only, and with what was listed last."""
    assert find(arena, b"x") is None
    assert arena.directory.is_empty(arena.member)
    assert arena.directory.enter(b"x", b"one")
    assert not arena.directory.is_empty(arena.member)
    assert find(arena, b"x") == b"one"
    assert arena.directory.enter(b"x", b"two")
    assert find(arena, b"x") == b"two"
    assert find(arena, b"y") is None
    arena.directory.cross_out(b"x")
    arena.directory.cross_out(b"x")
    assert find(arena, b"x") is None
    assert arena.directory.is_empty(arena.member)


def test_what_does_not_fit_is_not_listed(arena: Arena) -> None:
    """The largest that does is found whole."""
    largest = bytes(range(256)) * 8
    largest = largest[: PLACE_BYTES - 24]
    assert arena.directory.enter(b"x", largest)
    assert find(arena, b"x") == largest
    assert not arena.directory.enter(b"y", largest + b"!")
    assert find(arena, b"y") is None


def test_where_there_are_more_than_places_each_is_right_or_missing(arena: Arena) -> None:
    """The older ones go; whatever was taken back stays away, whoever has its place now."""
    names = [f"value-{n}".encode() for n in range(3 * PLACES)]
    for name in names:
        assert arena.directory.enter(name, name * 3)
    found = {name: find(arena, name) for name in names}
    assert all(data in (None, name * 3) for name, data in found.items())
    assert PLACES * 3 // 4 < sum(data is not None for data in found.values()) <= PLACES
    assert found[names[-1]] is not None
    for name in names[::2]:
        arena.directory.cross_out(name)
    assert all(find(arena, name) is None for name in names[::2])
    assert [find(arena, name) for name in names[1::2]] == [found[name] for name in names[1::2]]


def test_a_listing_that_was_damaged_or_is_half_written_is_not_found(arena: Arena) -> None:
    """Whichever of its bytes is another."""
    assert arena.directory.enter(b"x", b"some data")
    start = directory_offset(arena.member.slot, place_of(arena, b"x"))
    length = 24 + len(b"some data")
    for at in range(length):
        (before,) = arena.segment.read(start + at, 1)
        arena.segment.write(start + at, memoryview(bytes([before ^ 0x10])))
        assert find(arena, b"x") is None, at
        arena.segment.write(start + at, memoryview(bytes([before])))
    assert find(arena, b"x") == b"some data"


def test_what_is_not_listed_costs_no_system_call_however_much_is(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of small values may come from a worker that has hundreds of large ones."""
    for n in range(3 * PLACES):
        arena.directory.enter(f"large-{n}".encode(), b"data")
    reads: list[int] = []
    monkeypatch.setattr(arena.segment, "read", lambda *where: reads.append(1) or memoryview(bytes(PLACE_BYTES)))
    assert all(find(arena, f"small-{n}".encode()) is None for n in range(2000))
    assert len(reads) < 5


@pytest.mark.parametrize("scribble", [0x00, 0x01, 0x5A, 0xFF])
def test_what_is_scribbled_over_the_marks_brings_nothing_back(arena: Arena, scribble: int) -> None:
    """A listing that was taken back stands where it stood, whole."""
    assert arena.directory.enter(b"x", b"data")
    arena.directory.cross_out(b"x")
    start, length = layout.MARKS_AT * 8, markbook.WORDS * 8
    arena.segment.write(start, memoryview(bytes([scribble]) * length))
    assert find(arena, b"x") is None


def test_what_was_listed_in_memory_that_was_cut_short_is_let_go(process: Callable[[], Process]) -> None:
    """To touch it would be the end of the process."""
    one = process()
    one("arena = Arena.create(1 << 20)")
    assert one("arena.directory.enter(b'x', b'data') and arena.directory.enter(b'y', b'data')")
    one("import os")
    one("os.ftruncate(arena.segment.fd, 0)")
    one("arena.directory.cross_out(b'x')")
    one("arena.directory.close()")
    assert one("repr(arena.directory)").endswith("0 listings>")
    one("arena.close()")


def test_a_listing_is_of_one_incarnation(arena: Arena) -> None:
    """Who takes over its slot is somebody else."""
    assert arena.directory.enter(b"x", b"data")
    slot, incarnation = arena.member
    assert arena.directory.find(Member(slot, incarnation + 1), b"x") is None
    assert arena.directory.find(Member(slot + 1, incarnation), b"x") is None


def test_where_no_page_can_be_made_nothing_is_listed(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is what stood there before found any more."""

    def full(offset: int, data: memoryview) -> None:
        raise MemoryExhausted("full")

    assert arena.directory.enter(b"x", b"old")
    monkeypatch.setattr(arena.segment, "write", full)
    assert not arena.directory.enter(b"x", b"new")
    assert find(arena, b"x") is None


def test_who_has_left_lists_nothing(process: Callable[[], Process]) -> None:
    """What it has listed is gone when it leaves."""
    arena = join(CLUSTER)
    other = process()
    other(JOIN, cluster=CLUSTER)
    other("arena.directory.enter(b'x', b'data')")
    member = other("arena.member")
    assert arena.directory.find(member, b"x") == b"data"
    other(LEAVE)
    assert arena.directory.find(member, b"x") is None
    membership.leave(CLUSTER, "nanny", "tcp://here")
    assert not arena.directory.enter(b"y", b"data")
    assert arena.directory.find(member, b"x") is None


@pytest.mark.parametrize("with_child", [False, True])
def test_what_the_dead_have_listed_is_not_found(process: Callable[[], Process], *, with_child: bool) -> None:
    """In the moment of its death, before anybody has taken anything back, and even while a forked child lives."""
    arena = join(CLUSTER)
    other = process()
    other(JOIN, cluster=CLUSTER)
    other("arena.directory.enter(b'x', b'data')")
    child = other.fork() if with_child else None
    member = other("arena.member")
    assert arena.directory.find(member, b"x") == b"data"
    other.kill()
    assert arena.directory.find(member, b"x") is None
    if child is not None:
        child.kill()
    wait_until(lambda: arena.stats().members == 1, "the dead is reclaimed")
    membership.leave(CLUSTER, "nanny", "tcp://here")


def test_a_slot_begins_with_an_empty_directory(process: Callable[[], Process]) -> None:
    """Whatever its last owner has left there."""
    arena = join(CLUSTER)
    first, second = process(), process()
    first(JOIN, cluster=CLUSTER)
    first("arena.directory.enter(b'x', b'data')")
    member = first("arena.member")
    first.kill()
    arena.roster.reclaim_dead()
    second(JOIN, cluster=CLUSTER)
    again = second("arena.member")
    assert again.slot == member.slot
    assert arena._access.table.is_live(again)
    assert arena.directory.find(again, b"x") is None
    assert not any(arena._access.table.marks.tag(again.slot, place) for place in range(PLACES))
    second.kill()
    membership.leave(CLUSTER, "nanny", "tcp://here")


def test_workers_are_found_by_their_address(arena: Arena) -> None:
    """As they come and go; a nanny at the same address is none."""
    roster = arena.roster
    assert roster.workers_at("tcp://a") == []
    roster.add_role("nanny", "tcp://a")
    assert roster.workers_at("tcp://a") == []
    roster.add_role("worker", "tcp://a")
    assert roster.workers_at("tcp://a") == [arena.member]
    assert roster.workers_at("tcp://b") == []
    roster.remove_role("worker", "tcp://a")
    assert roster.workers_at("tcp://a") == []
