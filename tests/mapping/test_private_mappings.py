"""Mappings without views are reused, unless a view has written to them, and only a bounded number is kept."""

from __future__ import annotations

import gc
import random
import resource
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from other_processes import Process, publish, wait_until

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.block import Block
from dask_shm_plugin.exceptions import MappingRefused
from dask_shm_plugin.linux import pagemap, syscalls
from dask_shm_plugin.units import PAGE

MIB = 1 << 20


@pytest.fixture
def roomy() -> Iterator[Arena]:
    """Create an arena of 16 MiB that keeps at most 4 MiB of mappings."""
    arena = Arena.create(16 * MIB, warm=1000)
    arena.holdings.mappings._keep = 4 * MIB
    yield arena
    gc.collect()
    arena.close()
    wait_until(lambda: arena.has_left, "the process has left the arena")


def view_of(block: Block, length: int = MIB) -> np.ndarray:
    """Map the beginning of a block."""
    return np.frombuffer(block.view(0, length), np.uint8)


def address(view: np.ndarray) -> int:
    """Return the address of a view."""
    return int(view.ctypes.data)


def publish_view_and_drop(arena: Arena, value: int, write: int | None = None) -> int:
    """Publish a block full of one byte, read it, write one byte if asked, and drop it; return its address."""
    with publish(arena, bytes([value]) * MIB) as block:
        view = view_of(block)
        assert np.all(view == value)
        if write is not None:
            view[write] = 255
        at = address(view)
        del view
    arena.holdings.tidy()
    wait_until(lambda: arena.stats().used == 0, "the block is released")
    return at


def test_an_unwritten_mapping_is_reused_for_the_next_block_at_its_place(roomy: Arena) -> None:
    """The next view has the same address, and shows the bytes of the next block."""
    assert publish_view_and_drop(roomy, 1) == publish_view_and_drop(roomy, 2) == publish_view_and_drop(roomy, 3)


@pytest.mark.parametrize("where", [0, MIB - 1])
def test_a_written_mapping_is_not_kept(roomy: Arena, where: int) -> None:
    """The private copy of its page would show the old bytes in the next view."""
    publish_view_and_drop(roomy, 1, write=where)
    assert len(roomy.holdings.mappings) == 0
    publish_view_and_drop(roomy, 2)


def test_two_views_of_one_block_never_share_a_mapping(roomy: Arena) -> None:
    """A kept mapping is used for one view only."""
    publish_view_and_drop(roomy, 1)
    with publish(roomy, bytes([2]) * MIB) as block:
        first, second = view_of(block), view_of(block)
        assert address(first) != address(second)
        first[0] = 9
        assert second[0] == 2
        del first, second


def test_a_mapping_is_kept_while_its_pages_are_given_back(roomy: Arena) -> None:
    """The kernel removes such pages from the mapping, and maps the new ones at the next access."""
    publish_view_and_drop(roomy, 1)
    roomy.trimmer.trim_all()
    assert len(roomy.holdings.mappings) == 1
    publish_view_and_drop(roomy, 2)


def test_kept_mappings_are_bounded_and_the_oldest_is_unmapped_first(roomy: Arena) -> None:
    """The limit in bytes applies here; the limit on their number is not reached."""
    blocks = [publish(roomy, bytes([n]) * MIB) for n in range(6)]
    living = [view_of(block) for block in blocks]
    at = [address(view) for view in living]
    while living:
        del living[0]
        roomy.holdings.tidy()
    wait_until(lambda: len(roomy.holdings.mappings) == 4, "four mappings are kept")
    assert [address(view_of(block)) for block in blocks[2:]] == at[2:]
    for block in blocks:
        block.close()


def test_small_mappings_are_not_kept(roomy: Arena) -> None:
    """To check whether a small mapping was written would cost more than to map it again."""
    with publish(roomy, bytes(PAGE)) as block:
        view_of(block, PAGE)
        roomy.holdings.tidy()
        wait_until(lambda: len(roomy.holdings.mappings) == 0, "no mapping is kept")


def test_a_mapping_that_cannot_be_checked_for_lack_of_memory_is_unmapped(
    roomy: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the check raised an error instead, the reference to the block would never be released."""

    def no_memory(*args: int) -> bool:
        raise MemoryError

    monkeypatch.setattr(pagemap, "is_written", no_memory)
    publish_view_and_drop(roomy, 1)
    assert len(roomy.holdings.mappings) == 0


def test_kept_mappings_are_unmapped_before_a_view_is_refused(roomy: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view is refused only if the kernel refuses a mapping and none is kept."""
    publish_view_and_drop(roomy, 1)
    allowed = syscalls.map_private

    def refuse(*args: int) -> int:
        if len(roomy.holdings.mappings):
            raise OSError(12, "no mapping is left")
        return allowed(*args)

    monkeypatch.setattr(syscalls, "map_private", refuse)
    with publish(roomy, bytes([2]) * 2 * MIB) as block:
        view = view_of(block, 2 * MIB)
        assert np.all(view == 2)
        monkeypatch.setattr(syscalls, "map_private", lambda *args: (_ for _ in ()).throw(OSError(12, "none")))
        with pytest.raises(MappingRefused):
            view_of(block, 2 * MIB)
        del view


def test_a_child_that_writes_to_an_inherited_mapping_changes_nothing_for_its_parent(
    process: Callable[[], Process],
) -> None:
    """The written pages are the child's own, so the parent can keep and reuse the mapping."""
    parent = process()
    parent("arena = Arena.create(16 << 20, warm=1000); block = publish(arena, bytes([1]) * (1 << 20))")
    parent("view = np.frombuffer(block.view(0, 1 << 20), np.uint8); at = view.ctypes.data; total = view.sum()")
    child = parent.fork()
    child("view[:] = 9")
    parent("del view; block.close(); arena.holdings.tidy()")
    child.leave()
    wait_until(
        lambda: (
            parent("arena.holdings.references.release_ended_children(), arena.holdings.tidy(), arena.stats().used")[2]
            == 0
        ),
        "the block is released",
    )
    parent("block = publish(arena, bytes([2]) * (1 << 20)); view = np.frombuffer(block.view(0, 1 << 20), np.uint8)")
    assert parent("view.ctypes.data == at, bool(np.all(view == 2))") == (True, True)
    parent("del view; block.close(); gc.collect(); arena.close()")


def test_every_view_shows_its_own_block_under_random_use(roomy: Arena) -> None:
    """Sizes, writes and lifetimes are random, and each view is checked again before it is dropped."""
    dice, living = random.Random(7), []
    for number in range(400):
        size = dice.choice([MIB, MIB, 2 * MIB, 3 * MIB])
        with publish(roomy, bytes([number % 200]) * size) as block:
            living.append((view_of(block, size), number % 200))
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


def test_no_mapping_is_kept_if_the_address_space_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process may need the addresses for other purposes."""
    limit = resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(
        resource, "getrlimit", lambda which: (1 << 46, limit[1]) if which == resource.RLIMIT_AS else None
    )
    arena = Arena.create(16 * MIB, warm=1000)
    publish_view_and_drop(arena, 1)
    assert len(arena.holdings.mappings) == 0
    arena.close()
