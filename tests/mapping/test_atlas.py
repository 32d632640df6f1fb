"""The atlas knows which addresses lie in an arena, and the page table which pages are still the block's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from other_processes import Process, publish, wait_until

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.linux import pagemap
from dask_shm_plugin.linux.pagemap import is_written, touched
from dask_shm_plugin.mapping.atlas import ATLAS, Atlas, Place
from dask_shm_plugin.table.layout import BlockId
from dask_shm_plugin.units import PAGE

MIB = 1 << 20


def address_of(view: memoryview) -> int:
    """Return the address of a view in this process."""
    return int(np.asarray(view).__array_interface__["data"][0])


class TestAtlas:
    """The atlas finds the place in an arena for an address."""

    @pytest.fixture
    def atlas(self) -> Atlas:
        """Enter two adjacent mappings and a separate one."""
        one = Atlas()
        one.add(0x9000, Place(b"b", BlockId(3, 1), 0x2000, 0x1000))
        one.add(0x4000, Place(b"a", BlockId(1, 7), 0x5000, 0x2000))
        one.add(0x6000, Place(b"a", BlockId(2, 1), 0, 0x1000))
        return one

    @pytest.mark.parametrize(
        ("address", "length", "place"),
        [
            pytest.param(0x4000, 0x2000, (BlockId(1, 7), 0x5000), id="a whole mapping"),
            pytest.param(0x4000, 1, (BlockId(1, 7), 0x5000), id="its first byte"),
            pytest.param(0x5FFF, 1, (BlockId(1, 7), 0x6FFF), id="its last byte"),
            pytest.param(0x5123, 0x10, (BlockId(1, 7), 0x6123), id="a part"),
            pytest.param(0x6000, 1, (BlockId(2, 1), 0), id="the first byte of the next"),
            pytest.param(0x9FFF, 1, (BlockId(3, 1), 0x2FFF), id="the last byte of the last"),
            pytest.param(0x3FFF, 1, None, id="before all"),
            pytest.param(0x3FFF, 2, None, id="from before into one"),
            pytest.param(0x5FFF, 2, None, id="from one into the next"),
            pytest.param(0x4000, 0x3000, None, id="two whole ones"),
            pytest.param(0x7000, 1, None, id="behind one"),
            pytest.param(0x8FFF, 1, None, id="between two"),
            pytest.param(0xA000, 1, None, id="behind all"),
            pytest.param(0x9000, 0x1001, None, id="one byte too long"),
            pytest.param(0x4000, 0, None, id="nothing"),
            pytest.param(0, 1 << 47, None, id="everything"),
        ],
    )
    def test_bytes_are_found_if_they_lie_in_one_mapping(
        self, atlas: Atlas, address: int, length: int, place: tuple[BlockId, int] | None
    ) -> None:
        """The offset counts from the beginning of the block, not of the mapping."""
        found = atlas.locate(address, length)
        assert (found and (found.row, found.offset)) == place
        assert found is None or found.length == length

    def test_a_removed_mapping_is_not_found(self, atlas: Atlas) -> None:
        """Its neighbours are still found."""
        atlas.remove(0x4000)
        assert atlas.locate(0x4000, 1) is None
        assert atlas.locate(0x6000, 1).row == BlockId(2, 1)
        assert len(atlas) == 2

    def test_an_address_may_be_mapped_again(self, atlas: Atlas) -> None:
        """The kernel reuses addresses for mappings of other blocks."""
        atlas.remove(0x4000)
        atlas.add(0x4000, Place(b"c", BlockId(9, 9), 0, 0x1000))
        assert atlas.locate(0x4000, 1) == Place(b"c", BlockId(9, 9), 0, 1)
        assert atlas.locate(0x5000, 1) is None

    def test_an_empty_atlas_finds_nothing(self, atlas: Atlas) -> None:
        """The atlas is empty at first, and in a forked child."""
        atlas.forget()
        assert len(atlas) == 0
        assert Atlas().locate(0x4000, 1) is atlas.locate(0x4000, 1) is None

    def test_a_view_is_found_at_its_place_in_the_block(self, arena: Arena) -> None:
        """The place is exact to the byte, and the view is removed from the atlas before it is unmapped."""
        with publish(arena, bytes(4 * PAGE)) as block:
            view = block.view(PAGE + 100, PAGE)
            address = address_of(view)
            assert ATLAS.locate(address, PAGE) == Place(arena.arena_id, block.row, PAGE + 100, PAGE)
            assert ATLAS.locate(address + 7, 5) == Place(arena.arena_id, block.row, PAGE + 107, 5)
            assert ATLAS.locate(address - 101, 200) is None
            assert ATLAS.locate(address_of(memoryview(bytearray(10))), 10) is None
            del view
            wait_until(lambda: ATLAS.locate(address, 1) is None, "the view is removed from the atlas")

    def test_a_forked_child_finds_none_of_its_parents_views(self, joined: Callable[[], Process]) -> None:
        """The parent may release its blocks while the child still reads them."""
        parent = joined()
        parent("""
            with arena.draft(4096) as draft:
                block = draft.seal()
            view = block.view(0, 4096)
            address = np.asarray(view).__array_interface__["data"][0]
            """)
        child = parent.fork()
        assert child("ATLAS.locate(address, 1)") is None
        assert parent("ATLAS.locate(address, 1)").row == parent("block.row")


class TestWritten:
    """The kernel tells which pages of a view are private copies."""

    @pytest.fixture
    def view(self, arena: Arena) -> Iterator[memoryview]:
        """Map a part of a block that begins and ends in the middle of a page."""
        with publish(arena, bytes(range(256)) * 8 * 16) as block:
            one = block.view(PAGE // 2, 7 * PAGE)
        yield one
        # pytest keeps fixture values until all checks are done.
        one.release()

    def test_an_untouched_view_is_not_written(self, view: memoryview) -> None:
        """No page of the view exists in this process."""
        assert not is_written(address_of(view), 7 * PAGE)

    def test_a_view_that_was_read_is_not_written(self, view: memoryview) -> None:
        """Its pages are still those of the block."""
        assert sum(view) > 0
        assert not is_written(address_of(view), 7 * PAGE)

    @pytest.mark.parametrize("is_read_first", [False, True])
    @pytest.mark.parametrize("page", [0, 3, 7])
    def test_a_part_is_written_if_any_page_under_it_is(self, view: memoryview, page: int, is_read_first: bool) -> None:
        """Parts directly before and behind that page are not written, and parts that overlap it are."""
        if is_read_first:
            assert sum(view) > 0
        start = address_of(view)
        first = max(start, start // PAGE * PAGE + page * PAGE)
        last = min(start + 7 * PAGE, start // PAGE * PAGE + (page + 1) * PAGE)
        offset = (first + last) // 2 - start
        view[offset] = view[offset]
        assert is_written(start, 7 * PAGE)
        assert is_written(first, 1)
        assert is_written(last - 1, 1)
        if page > 0:
            assert not is_written(start, first - start)
            assert is_written(start, first - start + 1)
        if page < 7:
            assert not is_written(last, start + 7 * PAGE - last)
            assert is_written(last - 1, 2)

    def test_a_write_to_one_view_does_not_count_for_another_of_the_same_block(self, arena: Arena) -> None:
        """Private copies belong to one mapping."""
        with publish(arena, bytes(PAGE)) as block:
            clean, dirty = block.view(0, PAGE), block.view(0, PAGE)
            dirty[0] = 1
            assert is_written(address_of(dirty), PAGE)
            assert not is_written(address_of(clean), PAGE)

    def test_pages_that_a_parent_has_written_count_as_written_in_its_forked_child(
        self, joined: Callable[[], Process]
    ) -> None:
        """Pages that the child writes do not count as written in the parent."""
        parent = joined()
        parent("""
            with arena.draft(3 * 4096) as draft:
                draft.write(0, memoryview(bytes(3 * 4096)))
                block = draft.seal()
            view = block.view(0, 3 * 4096)
            address = np.asarray(view).__array_interface__["data"][0]
            pages = lambda: [pagemap.is_written(address + 4096 * page, 4096) for page in range(3)]
            view[0] = 1
            """)
        child = parent.fork()
        child("view[2 * 4096] = 1")
        assert child("pages()") == [True, False, True]
        assert parent("pages()") == [True, False, False]

    def test_private_memory_counts_as_written(self) -> None:
        """Private memory does not come from a file."""
        memory = np.ones(4 * PAGE, np.uint8)
        assert is_written(memory.ctypes.data, memory.nbytes)

    def test_an_unreadable_page_table_counts_as_written(
        self, view: memoryview, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A value that counts as written is copied, which is always correct."""
        assert is_written(1 << 62, PAGE)

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            assert is_written(address_of(view), PAGE)


class TestTouched:
    """The number of bytes of a view that are in this process's page table as the block's own pages."""

    @pytest.fixture
    def view(self, arena: Arena) -> Iterator[memoryview]:
        """Map a block of 128 pages."""
        with publish(arena, bytes(128 * PAGE)) as block:
            one = block.view(0, 128 * PAGE)
        yield one
        one.release()

    def test_an_untouched_view_counts_as_zero_bytes(self, view: memoryview) -> None:
        """A mapping alone takes no memory."""
        assert touched(address_of(view), 128 * PAGE) == 0

    def test_pages_that_were_read_count(self, view: memoryview) -> None:
        """The kernel may map a few more pages around them."""
        np.frombuffer(view, np.uint8)[: 64 * PAGE].sum()
        assert 64 * PAGE <= touched(address_of(view), 128 * PAGE) <= 80 * PAGE
        np.frombuffer(view, np.uint8).sum()
        assert touched(address_of(view), 128 * PAGE) == 128 * PAGE

    def test_pages_that_were_written_do_not_count(self, view: memoryview) -> None:
        """They are private memory, which is counted elsewhere."""
        array = np.frombuffer(view, np.uint8)
        array.sum()
        array[: 32 * PAGE] = 1
        assert touched(address_of(view), 128 * PAGE) == 96 * PAGE

    @pytest.mark.parametrize("part", [0.0, 0.25, 1.0])
    def test_the_touched_bytes_of_a_large_view_are_estimated(self, part: float) -> None:
        """A sample of pages all over the view gives the result to within a few percent."""
        size = 48 * MIB
        arena = Arena.create(size)
        with publish(arena, bytes(size)) as block:
            array = np.frombuffer(block.view(0, size), np.uint8)

        def is_estimated() -> bool:
            # A thread that replaces small pages by a large one removes the small ones from all page tables.
            array[: int(part * size)].sum()
            return touched(array.ctypes.data, size) == pytest.approx(part * size, abs=0.05 * size)

        wait_until(is_estimated, "the pages that were read are counted")
        arena.close()

    def test_an_unreadable_page_table_counts_the_whole_view(
        self, view: memoryview, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A smaller result would promise memory that is not there."""

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError

        monkeypatch.setattr(pagemap, "open", refuse, raising=False)
        assert touched(address_of(view), 128 * PAGE) == 128 * PAGE
