"""Which addresses of this process lie in the arena, and which of their pages still hold what the block holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from other_processes import Process, publish, wait_until

from dask_shm_plugin import views
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.layout import Row
from dask_shm_plugin.segment import PAGE
from dask_shm_plugin.views import ATLAS, Atlas, Place, is_written, touched

MIB = 1 << 20


def address_of(view: memoryview) -> int:
    """Return where a view lies in this process."""
    return int(np.asarray(view).__array_interface__["data"][0])


class TestAtlas:
    """An address tells where in an arena its bytes lie."""

    @pytest.fixture
    def atlas(self) -> Atlas:
        """Enter two mappings that touch and one that stands alone."""
        one = Atlas()
        one.add(0x9000, Place(b"b", Row(3, 1), 0x2000, 0x1000))
        one.add(0x4000, Place(b"a", Row(1, 7), 0x5000, 0x2000))
        one.add(0x6000, Place(b"a", Row(2, 1), 0, 0x1000))
        return one

    @pytest.mark.parametrize(
        ("address", "length", "place"),
        [
            pytest.param(0x4000, 0x2000, (Row(1, 7), 0x5000), id="a whole mapping"),
            pytest.param(0x4000, 1, (Row(1, 7), 0x5000), id="its first byte"),
            pytest.param(0x5FFF, 1, (Row(1, 7), 0x6FFF), id="its last byte"),
            pytest.param(0x5123, 0x10, (Row(1, 7), 0x6123), id="a part"),
            pytest.param(0x6000, 1, (Row(2, 1), 0), id="the first byte of the next"),
            pytest.param(0x9FFF, 1, (Row(3, 1), 0x2FFF), id="the last byte of the last"),
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
        self, atlas: Atlas, address: int, length: int, place: tuple[Row, int] | None
    ) -> None:
        """The place counts from the beginning of the block, not of the mapping."""
        found = atlas.locate(address, length)
        assert (found and (found.row, found.offset)) == place
        assert found is None or found.length == length

    def test_what_is_removed_is_not_found(self, atlas: Atlas) -> None:
        """Its neighbours are."""
        atlas.remove(0x4000)
        assert atlas.locate(0x4000, 1) is None
        assert atlas.locate(0x6000, 1).row == Row(2, 1)
        assert len(atlas) == 2

    def test_an_address_may_be_mapped_again(self, atlas: Atlas) -> None:
        """The kernel uses addresses again, for other blocks."""
        atlas.remove(0x4000)
        atlas.add(0x4000, Place(b"c", Row(9, 9), 0, 0x1000))
        assert atlas.locate(0x4000, 1) == Place(b"c", Row(9, 9), 0, 1)
        assert atlas.locate(0x5000, 1) is None

    def test_nothing_is_found_in_an_empty_one(self, atlas: Atlas) -> None:
        """As it is at first, and in a forked child."""
        atlas.forget()
        assert len(atlas) == 0
        assert Atlas().locate(0x4000, 1) is atlas.locate(0x4000, 1) is None

    def test_a_view_is_found_where_it_lies_in_its_block(self, arena: Arena) -> None:
        """To the byte, also when it does not begin with a page; and it is gone from the atlas before it is unmapped."""
        with publish(arena, bytes(4 * PAGE)) as block:
            view = block.view(PAGE + 100, PAGE)
            address = address_of(view)
            assert ATLAS.locate(address, PAGE) == Place(arena.arena_id, block.row, PAGE + 100, PAGE)
            assert ATLAS.locate(address + 7, 5) == Place(arena.arena_id, block.row, PAGE + 107, 5)
            assert ATLAS.locate(address - 101, 200) is None
            assert ATLAS.locate(address_of(memoryview(bytearray(10))), 10) is None
            del view
            wait_until(lambda: ATLAS.locate(address, 1) is None, "the view is forgotten")

    def test_a_forked_child_finds_none_of_its_parents_views(self, joined: Callable[[], Process]) -> None:
        """Its parent may release them while the child still looks at them."""
        parent = joined()
        parent("""
            with arena.draft(4096) as draft:
                block = draft.seal()
            view = block.view(0, 4096)
            address = np.asarray(view).__array_interface__["data"][0]
            """)
        child = parent.fork()
        assert child("views.ATLAS.locate(address, 1)") is None
        assert parent("views.ATLAS.locate(address, 1)").row == parent("block.row")


class TestWritten:
    """The kernel tells which pages of a view are no longer the block's."""

    @pytest.fixture
    def view(self, arena: Arena) -> Iterator[memoryview]:
        """Map a block of eight pages, with half a page before and behind."""
        with publish(arena, bytes(range(256)) * 8 * 16) as block:
            one = block.view(PAGE // 2, 7 * PAGE)
        yield one
        # pytest keeps what it was given until everything has been checked.
        one.release()

    def test_an_untouched_view_is_not_written(self, view: memoryview) -> None:
        """No page of it exists in this process."""
        assert not is_written(address_of(view), 7 * PAGE)

    def test_a_view_that_was_read_is_not_written(self, view: memoryview) -> None:
        """The pages are the block's."""
        assert sum(view) > 0
        assert not is_written(address_of(view), 7 * PAGE)

    @pytest.mark.parametrize("is_read_first", [False, True])
    @pytest.mark.parametrize("page", [0, 3, 7])
    def test_a_part_is_written_if_any_page_under_it_is(self, view: memoryview, page: int, is_read_first: bool) -> None:
        """The parts right before and behind that page are not, the parts that touch it are."""
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

    def test_one_view_is_written_and_another_of_the_same_block_is_not(self, arena: Arena) -> None:
        """It is a matter of the mapping."""
        with publish(arena, bytes(PAGE)) as block:
            clean, dirty = block.view(0, PAGE), block.view(0, PAGE)
            dirty[0] = 1
            assert is_written(address_of(dirty), PAGE)
            assert not is_written(address_of(clean), PAGE)

    def test_what_a_parent_has_written_is_written_in_its_forked_child(self, joined: Callable[[], Process]) -> None:
        """And what the child writes is not written in the parent."""
        parent = joined()
        parent("""
            with arena.draft(3 * 4096) as draft:
                draft.write(0, memoryview(bytes(3 * 4096)))
                block = draft.seal()
            view = block.view(0, 3 * 4096)
            address = np.asarray(view).__array_interface__["data"][0]
            pages = lambda: [views.is_written(address + 4096 * page, 4096) for page in range(3)]
            view[0] = 1
            """)
        child = parent.fork()
        child("view[2 * 4096] = 1")
        assert child("pages()") == [True, False, True]
        assert parent("pages()") == [True, False, False]

    def test_private_memory_counts_as_written(self) -> None:
        """It is no file's."""
        memory = np.ones(4 * PAGE, np.uint8)
        assert is_written(memory.ctypes.data, memory.nbytes)

    def test_what_cannot_be_looked_up_counts_as_written(
        self, view: memoryview, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Copying is always right."""
        assert is_written(1 << 62, PAGE)

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            assert is_written(address_of(view), PAGE)


class TestTouched:
    """How much of a view this process has in its memory as the block's own pages."""

    @pytest.fixture
    def view(self, arena: Arena) -> Iterator[memoryview]:
        """Map a block of 128 pages."""
        with publish(arena, bytes(128 * PAGE)) as block:
            one = block.view(0, 128 * PAGE)
        yield one
        one.release()

    def test_an_untouched_view_weighs_nothing(self, view: memoryview) -> None:
        """A mapping alone is no memory."""
        assert touched(address_of(view), 128 * PAGE) == 0

    def test_what_was_read_counts(self, view: memoryview) -> None:
        """The kernel may map a few pages around it too."""
        np.frombuffer(view, np.uint8)[: 64 * PAGE].sum()
        assert 64 * PAGE <= touched(address_of(view), 128 * PAGE) <= 80 * PAGE
        np.frombuffer(view, np.uint8).sum()
        assert touched(address_of(view), 128 * PAGE) == 128 * PAGE

    def test_what_was_written_is_this_processs_own(self, view: memoryview) -> None:
        """It is private memory, and counted as such elsewhere."""
        array = np.frombuffer(view, np.uint8)
        array.sum()
        array[: 32 * PAGE] = 1
        assert touched(address_of(view), 128 * PAGE) == 96 * PAGE

    @pytest.mark.parametrize("part", [0.0, 0.25, 1.0])
    def test_a_large_view_is_estimated(self, part: float) -> None:
        """From pages all over it, within a few percent."""
        size = 48 * MIB
        arena = Arena.create(size)
        with publish(arena, bytes(size)) as block:
            array = np.frombuffer(block.view(0, size), np.uint8)

        def is_estimated() -> bool:
            # Whoever makes large pages of small ones takes the latter out of the page tables of all.
            array[: int(part * size)].sum()
            return touched(array.ctypes.data, size) == pytest.approx(part * size, abs=0.05 * size)

        wait_until(is_estimated, "what was read is counted")
        arena.close()

    def test_what_cannot_be_looked_up_counts_whole(self, view: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
        """Less would promise memory that is not there."""

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError

        monkeypatch.setattr(views, "open", refuse, raising=False)
        assert touched(address_of(view), 128 * PAGE) == 128 * PAGE

    def test_the_views_of_an_arena_are_listed(self, arena: Arena, view: memoryview) -> None:
        """Those of other arenas are not among them."""
        assert ATLAS.mappings(arena.arena_id) == [(address_of(view), 128 * PAGE)]
        assert ATLAS.mappings(bytes(16)) == []
