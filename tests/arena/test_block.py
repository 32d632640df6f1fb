"""A draft is written, then sealed; the block that it becomes is never written again."""

from __future__ import annotations

import copy
import gc
import os
import pickle

import pytest
from other_processes import Process, publish, wait_until_empty

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.block import Descriptor
from dask_shm_plugin.exceptions import ArenaBusy, MemoryExhausted, StaleBlock
from dask_shm_plugin.units import PAGE

KIB = 1024
MIB = 1024 * KIB


class TestDraft:
    """A draft is space that only this process writes."""

    def test_a_block_contains_the_bytes_that_were_written_to_its_draft(self, arena: Arena) -> None:
        """The draft may be written in pieces, in any order and at any offset."""
        data = os.urandom(3 * PAGE)
        with arena.draft(len(data)) as draft:
            draft.write(PAGE + 7, memoryview(data)[PAGE + 7 :])
            draft.write(0, memoryview(data)[: PAGE + 7])
            block = draft.seal()
        with block:
            assert block.view(0, len(data)) == data

    def test_a_draft_takes_whole_pages(self, arena: Arena) -> None:
        """Even an empty draft takes one page, and a draft may be written up to the end of its last page."""
        for size, pages in [(0, 1), (1, 1), (PAGE, 1), (PAGE + 1, 2)]:
            with arena.draft(size) as draft:
                assert arena.stats().used == pages * PAGE
                draft.write(pages * PAGE - 1, memoryview(b"x"))
                draft.write(pages * PAGE, memoryview(b""))

    @pytest.mark.parametrize("written", [[], [0], [5], [11], [7, 2], [2, 7]])
    def test_all_pages_of_a_block_exist_when_it_is_sealed(self, arena: Arena, written: list[int]) -> None:
        """Sealing makes the pages that were not written, so that a reader cannot get SIGBUS."""
        before = arena.stats().resident
        with arena.draft(12 * PAGE) as draft:
            for page in written:
                draft.write(page * PAGE + 9, memoryview(b"x"))
            block = draft.seal()
        with block:
            assert arena.stats().resident - before == 12 * PAGE
            for page in written:
                assert block.view(page * PAGE + 9, 1) == b"x"

    def test_a_draft_is_not_sealed_if_its_missing_pages_cannot_be_made(self, in_small_shm: Process) -> None:
        """A reader of a missing page would get SIGBUS if the machine had no memory left for it."""
        in_small_shm("""
            arena = Arena.create(8 << 20)
            draft = arena.draft(8 << 20)
            draft.write(0, memoryview(b"mine"))
            with open("/dev/shm/of somebody else", "wb") as file:
                file.write(bytes(44 << 20))
            """)
        with pytest.raises(MemoryExhausted, match=r"lower shm\.capacity"):
            in_small_shm("draft.seal()")
        in_small_shm("draft.__exit__(None, None, None); os.unlink('/dev/shm/of somebody else')")
        in_small_shm("block = arena.draft(8 << 20).seal()")
        assert in_small_shm("sum(block.view(0, 8 << 20)[::4096]) >= 0")

    @pytest.mark.parametrize(
        ("offset", "length"), [(0, 2 * PAGE + 1), (2 * PAGE, 1), (2 * PAGE - 1, 2), (-1, 1), (-PAGE, PAGE)]
    )
    def test_a_write_outside_the_draft_is_refused(self, arena: Arena, offset: int, length: int) -> None:
        """The blocks of other processes lie directly before and behind the draft."""
        with (
            publish(arena, b"b" * PAGE) as before,
            arena.draft(2 * PAGE) as draft,
            publish(arena, b"a" * PAGE) as after,
        ):
            with pytest.raises(ValueError, match="draft"):
                draft.write(offset, memoryview(b"x" * length))
            assert before.view(0, PAGE) == b"b" * PAGE
            assert after.view(0, PAGE) == b"a" * PAGE

    @pytest.mark.parametrize("length", [PAGE // 8 + 1, PAGE])
    def test_the_length_of_a_write_is_counted_in_bytes(self, arena: Arena, length: int) -> None:
        """A memoryview of doubles takes eight times as many bytes as its length says."""
        with arena.draft(PAGE) as draft, publish(arena, bytes(8 * PAGE)) as after:
            with pytest.raises(ValueError, match="draft"):
                draft.write(0, memoryview(b"x" * 8 * length).cast("d"))
            assert after.view(0, 8 * PAGE) == bytes(8 * PAGE)

    def test_a_draft_that_is_left_unsealed_gives_its_space_back(self, arena: Arena) -> None:
        """No other code would give the space back."""
        with arena.draft(MIB) as draft:
            draft.write(0, memoryview(b"x"))
        wait_until_empty(arena)

    def test_an_exception_gives_the_space_back_and_propagates(self, arena: Arena) -> None:
        """The exception may be one that ends the program, such as KeyboardInterrupt."""
        for kind in (KeyError, KeyboardInterrupt):
            with pytest.raises(kind), arena.draft(MIB):
                raise kind
            wait_until_empty(arena)

    def test_an_exception_after_sealing_does_not_release_the_block(self, arena: Arena) -> None:
        """A sealed draft is a block, and leaving its context gives nothing back."""
        blocks = []

        def seal_and_fail() -> None:
            with arena.draft(PAGE) as draft:
                blocks.append(draft.seal())
                raise KeyError

        with pytest.raises(KeyError):
            seal_and_fail()
        [block] = blocks
        assert arena.attach_block(block.descriptor).close() is None
        assert arena.stats().used == PAGE
        block.close()

    def test_a_closed_draft_cannot_be_written_or_sealed(self, arena: Arena) -> None:
        """Its space may belong to another draft by now, or be read as a block."""
        with arena.draft(PAGE) as abandoned:
            pass
        with arena.draft(PAGE) as sealed:
            block = sealed.seal()
            with pytest.raises(ValueError, match="sealed"):
                sealed.seal()
        for draft in (abandoned, sealed):
            with pytest.raises(ValueError, match="sealed or given up"):
                draft.write(0, memoryview(b"x"))
            with pytest.raises(ValueError, match="sealed or given up"):
                draft.seal()
        assert arena.stats().blocks == 1
        block.close()

    def test_a_draft_that_cannot_be_sealed_gives_its_space_back(
        self, arena: Arena, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The space is free again, and the caller gets the error, whatever the reason is."""

        def refuse(*_: object) -> None:
            raise ArenaBusy

        monkeypatch.setattr(arena.allocator, "seal", refuse)
        with pytest.raises(ArenaBusy), arena.draft(PAGE) as draft:
            draft.seal()
        wait_until_empty(arena)

    def test_a_draft_that_is_collected_open_warns_and_gives_its_space_back(self, arena: Arena) -> None:
        """Otherwise its space would be lost as long as this process lives."""
        with pytest.warns(ResourceWarning, match="Draft"):
            arena.draft(MIB)
        wait_until_empty(arena)

    def test_the_repr_of_a_draft_shows_its_state(self, arena: Arena) -> None:
        """It shows whether the draft is open, and its size."""
        with arena.draft(PAGE) as draft:
            assert f"{PAGE} bytes" in repr(draft)
            assert "closed" not in repr(draft)
        assert "closed" in repr(draft)


class TestBlock:
    """A Block object is one reference of this process to a block."""

    def test_the_size_of_a_block_is_that_of_its_pages(self, arena: Arena) -> None:
        """The size is a multiple of the page size."""
        with publish(arena, b"x") as block:
            assert block.size == PAGE
            assert f"{PAGE} bytes" in repr(block)

    def test_the_descriptor_of_a_block_is_plain_data(self, arena: Arena) -> None:
        """A descriptor can be pickled, compares equal afterwards, and keeps no reference to the block."""
        with publish(arena, b"x") as block:
            descriptor = pickle.loads(pickle.dumps(block.descriptor))
            assert descriptor == block.descriptor == Descriptor(arena.arena_id, block.row)
            with arena.attach_block(descriptor) as again:
                assert again.descriptor == descriptor
        wait_until_empty(arena)

    @pytest.mark.parametrize(("offset", "length"), [(0, 1), (1, PAGE), (PAGE - 1, 2), (PAGE, PAGE), (5, 2 * PAGE - 5)])
    def test_a_part_of_a_block_is_viewed_as_flat_writeable_bytes(self, arena: Arena, offset: int, length: int) -> None:
        """The view shows exactly the requested part, even if it does not begin at a page."""
        data = os.urandom(2 * PAGE)
        with publish(arena, data) as block:
            view = block.view(offset, length)
            assert view == data[offset : offset + length]
            assert (view.format, view.ndim, view.readonly, view.nbytes) == ("B", 1, False, length)

    @pytest.mark.parametrize(
        ("offset", "length"), [(0, 0), (0, -1), (-1, 1), (-1, 3), (0, PAGE + 1), (PAGE, 1), (PAGE - 1, 2), (1 << 70, 1)]
    )
    def test_a_part_outside_the_block_cannot_be_viewed(self, arena: Arena, offset: int, length: int) -> None:
        """The blocks of other processes lie beside this one."""
        with publish(arena, b"x") as block, pytest.raises(ValueError, match="not in a block"):
            block.view(offset, length)
        wait_until_empty(arena)

    def test_a_view_outlives_the_block_object(self, arena: Arena) -> None:
        """Each view has a reference of its own."""
        with publish(arena, b"kept") as block:
            view = block.view(0, 4)
        arena.holdings.tidy()
        assert view == b"kept"
        assert arena.stats().blocks == 1
        del view
        wait_until_empty(arena)

    def test_closing_drops_one_reference_of_several(self, arena: Arena) -> None:
        """A second close of the same object drops no further reference."""
        block = publish(arena, b"x")
        other = arena.attach_block(block.descriptor)
        for _ in range(3):
            block.close()
            arena.holdings.tidy()
        assert arena.stats().blocks == 1
        assert other.view(0, 1) == b"x"
        other.close()
        wait_until_empty(arena)

    def test_a_closed_block_without_another_reference_cannot_be_viewed(self, arena: Arena) -> None:
        """Its place may contain another block by now."""
        block = publish(arena, b"old")
        block.close()
        wait_until_empty(arena)
        with publish(arena, b"new") as new:
            assert new.row.index == block.row.index
            with pytest.raises(StaleBlock):
                block.view(0, 3)

    def test_a_block_that_is_collected_open_warns_and_is_closed(self, arena: Arena) -> None:
        """A forgotten reference must not hold the space for ever."""
        with pytest.warns(ResourceWarning, match=r"Block 0 generation 1.*not closed"):
            publish(arena, b"x")
        wait_until_empty(arena)

    def test_a_closed_block_does_not_warn(self, arena: Arena, recwarn: pytest.WarningsRecorder) -> None:
        """A block that was closed, or left as a context manager, emits no ResourceWarning."""
        publish(arena, b"x").close()
        with publish(arena, b"x") as block:
            pass
        del block
        gc.collect()
        assert [str(warning.message) for warning in recwarn] == []


class TestOwnersAreNotCopied:
    """Objects that own a resource can be neither copied nor sent."""

    @pytest.mark.parametrize("copying", [pickle.dumps, copy.copy, copy.deepcopy])
    def test_copying_an_owner_raises_an_error_that_names_its_plain_counterpart(
        self, arena: Arena, copying: object
    ) -> None:
        """Draft, Block, Arena and Segment can be neither pickled nor copied; the error says what to send instead."""
        with arena.draft(PAGE) as draft, publish(arena, b"x") as block:
            for owner, twin in [
                (draft, "descriptor"),
                (block, "descriptor"),
                (arena, "Whereabouts"),
                (arena.segment, "Whereabouts"),
            ]:
                with pytest.raises(TypeError, match=f"cannot be pickled.*{twin}"):
                    copying(owner)
