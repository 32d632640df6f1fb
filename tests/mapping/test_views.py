"""A reader sees its own writes to a block, never those of another reader, and never the bytes of an earlier block."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from other_processes import Process, publish, wait_until, wait_until_empty

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import StaleBlock
from dask_shm_plugin.mapping.exporter import AtEnd, Exporter
from dask_shm_plugin.units import PAGE

MIB = 1 << 20


class TestIsolation:
    """A write is visible only in the view through which it was made."""

    def test_two_views_of_a_block_do_not_see_each_others_writes(self, arena: Arena) -> None:
        """A view that is made afterwards does not see them, either."""
        with publish(arena, b"sealed" * 1000) as block:
            first, second = block.view(0, 6000), block.view(0, 6000)
            first[:5] = b"first"
            second[3000:3006] = b"second"
            third = block.view(0, 6000)
            assert first[:5] == b"first"
            assert first[5:] == (b"sealed" * 1000)[5:]
            assert second[3000:3006] == b"second"
            assert second[:3000] == b"sealed" * 500
            assert third == b"sealed" * 1000

    def test_processes_do_not_see_each_others_writes(self, arena: Arena, joined: Callable[[], Process]) -> None:
        """A process that attaches the block later sees the sealed bytes."""
        with publish(arena, b"sealed" * 1000) as block:
            reader, later = joined(), joined()
            for other in (reader, later):
                other("block = arena.attach_block(descriptor)", descriptor=block.descriptor)
            reader("view = block.view(0, 6000); view[:6] = b'theirs'")
            view = block.view(0, 6000)
            view[6:12] = b"_ours_"
            assert reader("bytes(view[:12])") == b"theirssealed"
            assert bytes(view[:12]) == b"sealed_ours_"
            assert later("bytes(block.view(0, 12))") == b"sealedsealed"

    def test_a_new_view_does_not_show_the_writes_to_an_earlier_one(self, arena: Arena) -> None:
        """A mapping that was written to is never reused, even after its view is gone."""
        with publish(arena, bytes(PAGE)) as block:
            for _ in range(5):
                view = np.frombuffer(block.view(0, PAGE), np.uint8)
                assert not view.any()
                view[:] = 1
                del view

    def test_a_view_of_reused_space_shows_the_new_bytes(self, arena: Arena) -> None:
        """A page that was written is a private copy, and would show its old bytes if its mapping were reused."""
        for number in range(5):
            block = publish(arena, bytes([number]) * MIB)
            view = np.frombuffer(block.view(0, MIB), np.uint8)
            assert (view == number).all()
            view += 100
            assert (view == number + 100).all()
            del view
            block.close()
            wait_until_empty(arena)

    def test_a_view_of_reused_space_shows_the_new_bytes_to_a_process_that_wrote_there(
        self, arena: Arena, joined: Callable[[], Process]
    ) -> None:
        """One process publishes, and another one reads, writes to its view, and releases."""
        reader = joined()
        for number in range(5):
            block = publish(arena, bytes([number]) * MIB)
            reader("block = arena.attach_block(descriptor)", descriptor=block.descriptor)
            reader("view = np.frombuffer(block.view(0, 1 << 20), np.uint8)")
            block.close()
            assert reader("set(view.tolist())") == {number}
            reader("view += 100")
            assert reader("set(view.tolist())") == {number + 100}
            reader("del view; block.close()")
            wait_until_empty(arena)


THINGS: dict[str, Callable[[memoryview], Any]] = {
    "the view itself": lambda view: view,
    "a slice": lambda view: view[100:200],
    "a slice of a slice": lambda view: view[100:200][10:20],
    "another format": lambda view: view[:800].cast("d"),
    "an array": lambda view: np.frombuffer(view, np.float64),
    "a slice of an array": lambda view: np.frombuffer(view, np.float64)[5:7],
    "a reshaped and transposed array": lambda view: np.frombuffer(view, np.float64).reshape(2, -1).T[::-1],
    "a structured field": lambda view: np.frombuffer(view, np.dtype("i4,f4"))["f1"],
    "a memoryview of an array": lambda view: memoryview(np.frombuffer(view, np.float64)[3:]),
    "an array of an array": lambda view: np.asarray(np.frombuffer(view, np.uint8)).view(np.int16),
    "a pickle buffer": lambda view: pickle.PickleBuffer(np.frombuffer(view, np.uint8)),
    "an iterator": lambda view: iter(view),
    "a cycle": lambda view: [view, (cycle := []), cycle.append(cycle)],
}


class TestExporter:
    """A mapping is given back exactly when the last object over it is gone."""

    @pytest.mark.parametrize("thing", THINGS)
    def test_each_kind_of_object_over_the_mapping_keeps_it(self, thing: str) -> None:
        """A single object is enough, and its end gives the mapping back once."""
        memory, returned = np.zeros(1600, np.uint8), []
        exporter = Exporter(memory.ctypes.data, 1600, AtEnd(returned.append, 1))
        kept = THINGS[thing](exporter.bytes())
        del exporter
        gc.collect()
        assert returned == []
        del kept
        gc.collect()
        assert returned == [1]

    def test_the_mapping_is_kept_until_the_last_of_many_objects_is_gone(self) -> None:
        """The order in which the objects are dropped does not matter."""
        memory, returned = np.zeros(1600, np.uint8), []
        kept = Exporter(memory.ctypes.data, 1600, AtEnd(returned.append, 1)).bytes()
        things = [make(kept) for make in THINGS.values()]
        del kept
        while things:
            assert returned == []
            things.pop(len(things) // 2)
            gc.collect()
        assert returned == [1]

    def test_an_exporter_shows_the_memory_itself_as_flat_writeable_bytes(self) -> None:
        """No byte is copied."""
        memory = np.arange(10, dtype=np.uint8)
        view = Exporter(memory.ctypes.data, 10, None).bytes()
        assert (view.format, view.ndim, view.nbytes, view.readonly, view.contiguous) == ("B", 1, 10, False, True)
        view[3] = 77
        assert memory[3] == 77

    def test_a_forked_child_gives_nothing_back(self, process: Callable[[], Process]) -> None:
        """The parent still needs the mapping."""
        parent = process()
        parent("""
            memory, returned = np.zeros(100, np.uint8), []
            view = Exporter(memory.ctypes.data, 100, AtEnd(returned.append, 1)).bytes()
            """)
        child = parent.fork()
        for one, expected in ((child, []), (parent, [1])):
            one("del view; gc.collect()")
            assert one("returned") == expected

    def test_the_mapping_of_a_small_view_is_unmapped_with_it(self, arena: Arena) -> None:
        """The addresses of the mapping are free again."""

        def mappings() -> int:
            with open("/proc/self/maps") as file:
                return sum(f" {arena.segment.inode} " in line for line in file)

        with publish(arena, bytes(64 << 10)) as block:
            before = mappings()
            kept = [np.frombuffer(block.view(0, 64 << 10), np.uint8) for _ in range(10)]
            assert mappings() > before
            kept.clear()
            wait_until(lambda: mappings() == before, "all views are unmapped")


class TestViewsByDescriptor:
    """A view that is made from a descriptor is a reference to the block by itself."""

    def test_a_view_refers_to_the_block_as_long_as_any_slice_of_it_lives(
        self, arena: Arena, joined: Callable[[], Process]
    ) -> None:
        """When the last slice is gone, the block is released."""
        block = publish(arena, b"0123456789")
        other = joined()
        other("view = arena.view(d, 3, 4); part = view[1:]", d=block.descriptor)
        block.close()
        arena.holdings.tidy()
        other("del view; arena.holdings.tidy()")
        assert other("bytes(part)") == b"456"
        assert arena.stats().blocks == 1
        other("del part; arena.holdings.tidy()")
        assert arena.stats().blocks == 0

    def test_a_write_to_a_view_is_not_visible_in_another(self, arena: Arena) -> None:
        """A view that is made from a descriptor is copy-on-write like any other."""
        with publish(arena, b"0123") as block:
            view = arena.view(block.descriptor, 0, 4)
            view[:2] = b"ab"
            assert arena.view(block.descriptor, 0, 4) == b"0123"

    @pytest.mark.parametrize("how", ["view", "read"])
    @pytest.mark.parametrize(("offset", "length"), [(-1, 2), (0, 0), (0, 11), (10, 1)])
    def test_a_part_outside_the_block_is_refused_and_leaves_no_reference(
        self, arena: Arena, how: str, offset: int, length: int
    ) -> None:
        """Bytes of earlier blocks lie behind the end of the block."""
        with publish(arena, b"0123456789") as block, pytest.raises(ValueError, match="not in a block of 10"):
            getattr(arena, how)(block.descriptor, offset, length)
        arena.holdings.tidy()
        assert arena.stats().blocks == 0

    @pytest.mark.parametrize("how", ["view", "read"])
    def test_a_descriptor_of_a_released_block_or_another_arena_is_stale(self, arena: Arena, how: str) -> None:
        """Another block than the named one must never be mapped."""
        block = publish(arena, b"x")
        gone = block.descriptor
        block.close()
        arena.holdings.tidy()
        for descriptor in (gone, gone._replace(arena_id=bytes(16))):
            with pytest.raises(StaleBlock):
                getattr(arena, how)(descriptor, 0, 1)
