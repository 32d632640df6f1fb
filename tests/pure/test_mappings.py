"""Mappings without views are used again, and nobody can tell: what was written to is not, and what is kept is bounded."""

from __future__ import annotations

import gc
import random
import resource
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from other_processes import Process, publish, wait_until

from dask_shm_plugin import syscalls, views
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.block import Block
from dask_shm_plugin.exceptions import MappingRefused
from dask_shm_plugin.segment import PAGE

MIB = 1 << 20


@pytest.fixture
def roomy() -> Iterator[Arena]:
    """An arena of 16 MiB, of which 4 MiB of mappings are kept."""
    arena = Arena.create(16 * MIB, warm=1000)
    arena.holdings._mappings._keep = 4 * MIB
    yield arena
    gc.collect()
    arena.close()
    wait_until(lambda: arena.has_left, "the arena is left")


def look(block: Block, length: int = MIB) -> np.ndarray:
    """Map the beginning of a block."""
    return np.frombuffer(block.view(0, length), np.uint8)


def address(view: np.ndarray) -> int:
    """Return where a view is mapped."""
    return int(view.ctypes.data)


def shown_and_dropped(arena: Arena, value: int, write: int | None = None) -> int:
    """Publish a block full of one byte, look at all of it, perhaps write into it, and let it go; return where it was."""
    with publish(arena, bytes([value]) * MIB) as block:
        view = look(block)
        assert np.all(view == value)
        if write is not None:
            view[write] = 255
        at = address(view)
        del view
    arena.holdings.tidy()
    wait_until(lambda: arena.stats().used == 0, "the block is gone")
    return at


def test_a_mapping_that_nobody_wrote_to_shows_the_next_block_at_its_place(roomy: Arena) -> None:
    """At the same addresses, and with the bytes of now."""
    assert shown_and_dropped(roomy, 1) == shown_and_dropped(roomy, 2) == shown_and_dropped(roomy, 3)


@pytest.mark.parametrize("where", [0, MIB - 1])
def test_a_mapping_that_somebody_wrote_to_is_not_kept(roomy: Arena, where: int) -> None:
    """Its page would go on to show what was written there."""
    shown_and_dropped(roomy, 1, write=where)
    assert len(roomy.holdings._mappings) == 0
    shown_and_dropped(roomy, 2)


def test_two_views_of_one_block_never_share_a_mapping(roomy: Arena) -> None:
    """A kept one goes to one view only."""
    shown_and_dropped(roomy, 1)
    with publish(roomy, bytes([2]) * MIB) as block:
        first, second = look(block), look(block)
        assert address(first) != address(second)
        first[0] = 9
        assert second[0] == 2
        del first, second


def test_pages_that_were_given_back_meanwhile_are_mapped_anew(roomy: Arena) -> None:
    """The mapping is kept, and the system fills it again."""
    shown_and_dropped(roomy, 1)
    roomy.trimmer.trim_all()
    assert len(roomy.holdings._mappings) == 1
    shown_and_dropped(roomy, 2)


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(roomy: Arena) -> None:
    """In bytes, and in number."""
    blocks = [publish(roomy, bytes([n]) * MIB) for n in range(6)]
    living = [look(block) for block in blocks]
    at = [address(view) for view in living]
    while living:
        del living[0]
        roomy.holdings.tidy()
    wait_until(lambda: len(roomy.holdings._mappings) == 4, "four are kept")
    assert [address(look(block)) for block in blocks[2:]] == at[2:]
    for block in blocks:
        block.close()


def test_small_ones_are_not_kept(roomy: Arena) -> None:
    """To look whether they were written would cost more than to map them."""
    with publish(roomy, bytes(PAGE)) as block:
        look(block, PAGE)
        roomy.holdings.tidy()
        wait_until(lambda: len(roomy.holdings._mappings) == 0, "nothing is kept")


def test_without_memory_to_look_whether_it_was_written_it_is_unmapped(
    roomy: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference whose mapping could not be looked at would stay for good."""

    def no_memory(*args: int) -> bool:
        raise MemoryError

    monkeypatch.setattr(views, "is_written", no_memory)
    shown_and_dropped(roomy, 1)
    assert len(roomy.holdings._mappings) == 0


def test_where_no_mapping_is_left_those_that_are_kept_go(roomy: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where none is kept is a view refused."""
    shown_and_dropped(roomy, 1)
    allowed = syscalls.map_private

    def refuse(*args: int) -> int:
        if len(roomy.holdings._mappings):
            raise OSError(12, "no mapping is left")
        return allowed(*args)

    monkeypatch.setattr(syscalls, "map_private", refuse)
    with publish(roomy, bytes([2]) * 2 * MIB) as block:
        view = look(block, 2 * MIB)
        assert np.all(view == 2)
        monkeypatch.setattr(syscalls, "map_private", lambda *args: (_ for _ in ()).throw(OSError(12, "none")))
        with pytest.raises(MappingRefused):
            look(block, 2 * MIB)
        del view


def test_a_child_that_writes_to_what_it_has_inherited_changes_nothing_for_its_parent(
    process: Callable[[], Process],
) -> None:
    """The mapping is the parent's to keep, and its pages are its own."""
    parent = process()
    parent("arena = Arena.create(16 << 20, warm=1000); block = publish(arena, bytes([1]) * (1 << 20))")
    parent("view = np.frombuffer(block.view(0, 1 << 20), np.uint8); at = view.ctypes.data; total = view.sum()")
    child = parent.fork()
    child("view[:] = 9")
    parent("del view; block.close(); arena.holdings.tidy()")
    child.leave()
    wait_until(
        lambda: parent("arena.holdings.unpin(), arena.holdings.tidy(), arena.stats().used")[2] == 0, "the block is gone"
    )
    parent("block = publish(arena, bytes([2]) * (1 << 20)); view = np.frombuffer(block.view(0, 1 << 20), np.uint8)")
    assert parent("view.ctypes.data == at, bool(np.all(view == 2))") == (True, True)
    parent("del view; block.close(); gc.collect(); arena.close()")


def test_whatever_comes_and_goes_every_view_shows_its_own_block(roomy: Arena) -> None:
    """Random sizes, writes and lifetimes; each view is looked at again before it goes."""
    dice, living = random.Random(7), []
    for number in range(400):
        size = dice.choice([MIB, MIB, 2 * MIB, 3 * MIB])
        with publish(roomy, bytes([number % 200]) * size) as block:
            living.append((look(block, size), number % 200))
        if dice.random() < 0.3:
            view, value = dice.choice(living)
            view[dice.randrange(len(view))] = value + 1
            view[view == value + 1] = value
        while len(living) > 4:
            view, value = living.pop(dice.randrange(len(living)))
            assert np.all(view == value)
            del view
        roomy.holdings.tidy()
    living.clear()


def test_where_address_space_is_limited_none_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process may need it for other things."""
    limit = resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(
        resource, "getrlimit", lambda which: (1 << 46, limit[1]) if which == resource.RLIMIT_AS else None
    )
    arena = Arena.create(16 * MIB, warm=1000)
    shown_and_dropped(arena, 1)
    assert len(arena.holdings._mappings) == 0
    arena.close()
