"""Outputs of a rechunk are put together in memory while their shards arrive, and given away once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
from distributed import Reschedule
from distributed.shuffle._disk import DiskShardsBuffer
from distributed.shuffle._exceptions import DataUnavailable
from distributed.shuffle._limiter import ResourceLimiter
from distributed.shuffle._memory import MemoryShardsBuffer
from distributed.shuffle._rechunk import ArrayRechunkRun, convert_chunk, split_axes

from dask_shm_plugin.shuffling import assembly
from dask_shm_plugin.shuffling.assembly import Assembly
from dask_shm_plugin.shuffling.kept import Allowance

OLD, NEW = ((3, 1), (2, 2, 2)), ((4,), (3, 3))
WHOLE = np.arange(24.0).reshape(4, 6)
SHARDS = {
    "0_0": [((0, 0), WHOLE[:3, :2]), ((0, 1), WHOLE[:3, 2:3]), ((1, 0), WHOLE[3:, :2]), ((1, 1), WHOLE[3:, 2:3])],
    "0_1": [((0, 0), WHOLE[:3, 3:4]), ((0, 1), WHOLE[:3, 4:]), ((1, 0), WHOLE[3:, 3:4]), ((1, 1), WHOLE[3:, 4:])],
}


class Rig:
    """A run of a rechunk with Dask's buffer, and the outputs that are put together in front of it."""

    def __init__(self, folder: Path | None, limit: int = 1000, new: Any = NEW) -> None:
        self.limiter = ResourceLimiter(limit)
        read = ArrayRechunkRun.read
        self.buffer: Any = (
            MemoryShardsBuffer(lambda shard: shard)
            if folder is None
            else DiskShardsBuffer(str(folder / "files"), lambda path: read(None, path), self.limiter)  # type: ignore[arg-type]
        )
        self.is_on, self.is_closed = True, False
        self.run = SimpleNamespace(
            _disk_buffer=self.buffer,
            _loop=SimpleNamespace(
                add_callback=lambda call, *args: self.calls.append(asyncio.ensure_future(call(*args)))
            ),
            split_axes=split_axes(OLD, new),
            new=new,
            raise_if_closed=self._raise_if_closed,
            _get_output_partition=lambda chunk, key: convert_chunk(self.buffer.read("_".join(map(str, chunk)))),
        )
        self.calls: list[Any] = []
        self.restarts = 0
        allowance = Allowance(self.limiter) if folder else None
        self.assembly = Assembly(self.run, allowance, lambda: self.is_on, self._restart if folder else None)

    def output(self, name: str) -> Any:
        """Return an output as a task would get it."""
        return self.run._get_output_partition(tuple(map(int, name.split("_"))), "key")

    def _restart(self) -> NoReturn:
        self.restarts += 1
        raise Reschedule

    def _raise_if_closed(self) -> None:
        if self.is_closed:
            raise RuntimeError("closed")


@pytest.fixture
def with_rig(tmp_path: Path) -> Callable[..., None]:
    """Return a function that runs a coroutine with a rig, and checks that the limiter ends empty."""

    def run(use: Callable[[Rig], Any], disk: bool = True, **arguments: Any) -> None:
        async def main() -> None:
            rig = Rig(tmp_path if disk else None, **arguments)
            await use(rig)
            await asyncio.gather(*rig.calls)
            await rig.buffer.close()
            assert rig.limiter.empty
            assert not rig.assembly._outputs

        asyncio.run(main())

    return run


@pytest.mark.parametrize("disk", [True, False])
def test_an_output_is_complete_when_its_last_shard_has_arrived(with_rig: Any, disk: bool) -> None:
    """In any order, from any number of messages. The task owns it, and nothing was written to files."""

    async def use(rig: Rig) -> None:
        for n in (2, 0, 3, 1):
            await rig.buffer.write({name: [shards[n]] for name, shards in SHARDS.items()})
        assert rig.limiter._acquired == (WHOLE.nbytes if disk else 0)
        await rig.buffer.flush()
        for name, part in (("0_0", WHOLE[:, :3]), ("0_1", WHOLE[:, 3:])):
            output = rig.output(name)
            np.testing.assert_array_equal(output, part)
            assert output.flags.owndata
            assert output.flags.writeable
        if disk:
            assert list(rig.buffer.directory.iterdir()) == []
            await asyncio.gather(*rig.calls)
            assert rig.limiter.empty

    with_rig(use, disk)


def test_an_output_that_is_needed_again_starts_the_shuffle_again(with_rig: Any) -> None:
    """The task that has got it may have changed it."""

    async def use(rig: Rig) -> None:
        await rig.buffer.write(SHARDS)
        await rig.buffer.flush()
        rig.output("0_0")[:] = 0
        with pytest.raises(Reschedule):
            rig.output("0_0")
        assert rig.restarts == 1
        np.testing.assert_array_equal(rig.output("0_1"), WHOLE[:, 3:])

    with_rig(use)


def test_without_files_an_output_is_there_once_as_with_dask(with_rig: Any) -> None:
    """Dask's buffer in memory drops what it has returned."""

    async def use(rig: Rig) -> None:
        await rig.buffer.write(SHARDS)
        await rig.buffer.flush()
        rig.output("0_0")
        with pytest.raises(DataUnavailable):
            rig.output("0_0")

    with_rig(use, disk=False)


def test_outputs_beyond_the_limit_are_made_from_files(with_rig: Any) -> None:
    """As a whole: none is in part in memory. They can be made again."""

    async def use(rig: Rig) -> None:
        for n in range(4):
            await rig.buffer.write({name: [shards[n]] for name, shards in SHARDS.items()})
        await rig.buffer.flush()
        assert [path.name for path in rig.buffer.directory.iterdir()] == ["0_1"]
        assert rig.limiter._acquired == WHOLE.nbytes // 2
        np.testing.assert_array_equal(rig.output("0_0"), WHOLE[:, :3])
        for _ in range(2):
            np.testing.assert_array_equal(rig.output("0_1"), WHOLE[:, 3:])

    with_rig(use, limit=WHOLE.nbytes)


@pytest.mark.parametrize("disk", [True, False])
def test_shards_that_do_not_fit_are_joined_as_dask_joins_them(with_rig: Any, disk: bool) -> None:
    """Of another type, or of another shape than the chunks tell."""

    async def use(rig: Rig) -> None:
        shards = list(SHARDS["0_0"])
        shards[1] = ((0, 1), shards[1][1].astype("f4"))
        await rig.buffer.write({"0_0": shards, "0_1": [((0, 0), WHOLE[:2, :2]), ((0, 1), WHOLE[:2, 2:])]})
        await rig.buffer.flush()
        np.testing.assert_array_equal(rig.output("0_0"), WHOLE[:, :3])
        np.testing.assert_array_equal(rig.output("0_1"), WHOLE[:2])
        if disk:
            np.testing.assert_array_equal(rig.output("0_0"), WHOLE[:, :3])
        else:  # an output without the shards that Dask's buffer has dropped would be wrong
            with pytest.raises(DataUnavailable):
                rig.output("0_0")

    with_rig(use, disk)


@pytest.mark.parametrize("disk", [True, False])
def test_arrays_of_objects_and_those_of_unknown_shape_go_dasks_way(with_rig: Any, disk: bool) -> None:
    """Dask pickles the one, and joins the other as they are."""

    async def objects(rig: Rig) -> None:
        await rig.buffer.write({"0_0": [(index, shard.astype(object)) for index, shard in SHARDS["0_0"]]})
        await rig.buffer.flush()
        assert rig.limiter.empty
        assert rig.output("0_0").dtype == object

    async def unknown(rig: Rig) -> None:
        rig.assembly._lengths = assembly._lengths([[[(0, 0, slice(0, None))]]], ((4,),))
        await rig.buffer.write(SHARDS)
        await rig.buffer.flush()
        assert rig.limiter.empty
        np.testing.assert_array_equal(rig.output("0_1"), WHOLE[:, 3:])

    with_rig(objects, disk)
    with_rig(unknown, disk)


def test_no_output_is_begun_while_it_is_switched_off(with_rig: Any) -> None:
    """One that was begun before is completed."""

    async def use(rig: Rig) -> None:
        await rig.buffer.write({"0_0": SHARDS["0_0"][:1]})
        rig.is_on = False
        await rig.buffer.write({"0_0": SHARDS["0_0"][1:], "0_1": SHARDS["0_1"]})
        await rig.buffer.flush()
        assert [path.name for path in rig.buffer.directory.iterdir()] == ["0_1"]
        for name, part in (("0_0", WHOLE[:, :3]), ("0_1", WHOLE[:, 3:])):
            np.testing.assert_array_equal(rig.output(name), part)

    with_rig(use)


def test_a_closed_or_failed_run_gives_no_output(with_rig: Any) -> None:
    """What failed elsewhere in the buffer is raised for each output, as by Dask."""

    async def use(rig: Rig) -> None:
        await rig.buffer.write(SHARDS)
        await rig.buffer.flush()
        rig.buffer._exception = OSError("for the test")
        with pytest.raises(OSError, match="for the test"):
            rig.output("0_0")
        rig.buffer._exception = None
        rig.is_closed = True
        with pytest.raises(RuntimeError, match="closed"):
            rig.output("0_0")

    with_rig(use)
