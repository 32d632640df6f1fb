"""Received shards stay in memory as far as Dask's limit allows, and are read together with those in Dask's files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dask.context import thread_state
from distributed import Reschedule
from distributed.shuffle._disk import DiskShardsBuffer
from distributed.shuffle._exceptions import DataUnavailable
from distributed.shuffle._limiter import ResourceLimiter

from dask_shm_plugin.shuffling import kept, restarts
from dask_shm_plugin.shuffling.kept import Allowance, KeptShards
from dask_shm_plugin.shuffling.restarts import Restart


class Rig:
    """A run with Dask's buffer for files, and what is kept in front of it."""

    def __init__(self, folder: Path, limit: int = 4000) -> None:
        def read(path: Path) -> tuple[list[bytes], int]:
            data = path.read_bytes()
            return [data], len(data)

        self.limiter = ResourceLimiter(limit)
        self.buffer: Any = DiskShardsBuffer(str(folder / "files"), read, self.limiter)
        self.is_on = True
        self.readers: list[tuple[Any, str]] = []
        self.run = SimpleNamespace(
            _disk_buffer=self.buffer,
            deserialize=lambda shard: shard,
            _loop=None,
            id="shuffle",
            raise_if_closed=self._raise_if_closed,
        )
        self.allowance = Allowance(self.limiter)
        self.closed: list[KeptShards] = []
        self.restarted: set[str] = set()
        self.kept = KeptShards(
            self.run,
            self.allowance,
            lambda: self.is_on,
            lambda key, kept, name: self.readers.append((key, name)),
            self.closed.append,
            Restart(self.run, self.restarted.add),
        )

    def _raise_if_closed(self) -> None:
        if self.closed:
            raise RuntimeError("closed")

    def in_files(self) -> list[str]:
        return sorted(path.name for path in self.buffer.directory.iterdir())


@pytest.fixture
def with_rig(tmp_path: Path) -> Callable[..., None]:
    """Return a function that runs a coroutine with a rig, and checks that the limiter ends empty."""

    def run(use: Callable[[Rig], Any], **arguments: Any) -> None:
        async def main() -> None:
            rig = Rig(tmp_path, **arguments)
            await use(rig)
            await rig.buffer.close()
            assert rig.limiter.empty
            assert rig.kept in rig.closed
            assert not rig.kept._shards

        asyncio.run(main())

    return run


def test_shards_are_kept_up_to_three_quarters_of_the_limit_and_written_beyond(with_rig: Any) -> None:
    """The limiter counts what is kept; each output has all its shards, wherever they were."""

    async def use(rig: Rig) -> None:
        for n in range(5):
            await rig.buffer.write({"a": bytes([n]) * 700, "b": bytes([100 + n]) * 100})
        assert rig.limiter._acquired > 2000
        await rig.buffer.flush()
        assert 2000 < rig.limiter._acquired <= 3000
        assert "a" in rig.in_files()
        for name, size in (("a", 3500), ("b", 500)):
            read = b"".join(rig.buffer.read(name))
            assert len(read) == size
            assert len(set(read)) == 5

    with_rig(use)


def test_a_limit_that_is_full_does_not_stop_the_shuffle(with_rig: Any) -> None:
    """Much more than the limit passes through, because kept shards never take all of it."""

    async def use(rig: Rig) -> None:
        for _ in range(50):
            await asyncio.wait_for(rig.buffer.write({"a": b"x" * 1000}), 20)
        await rig.buffer.flush()
        assert len(b"".join(rig.buffer.read("a"))) == 50_000

    with_rig(use)


def test_an_output_may_be_read_again_until_its_task_is_done(with_rig: Any) -> None:
    """A task that fails is run again. The reader is noted with its key."""

    async def use(rig: Rig) -> None:
        await rig.buffer.write({"a": b"1", "b": b"2"})
        await rig.buffer.flush()
        thread_state.key = "task"
        try:
            assert rig.buffer.read("a") == rig.buffer.read("a") == [b"1"]
        finally:
            del thread_state.key
        assert rig.readers == [("task", "a")] * 2
        before = rig.limiter._acquired
        await rig.kept.drop("a")
        assert rig.limiter._acquired < before
        await rig.kept.drop("a")
        assert rig.buffer.read("b") == [b"2"]

    with_rig(use)


def test_a_dropped_output_starts_the_shuffle_again_once_and_is_never_empty(
    with_rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask takes an output without shards for an empty one, so this must not look like one."""
    asked = []
    monkeypatch.setattr(restarts, "sync", lambda loop, call, run: asked.append(run))

    async def use(rig: Rig) -> None:
        await rig.buffer.write({"a": b"1"})
        await rig.buffer.flush()
        await rig.kept.drop("a")
        with pytest.raises(Reschedule):
            rig.buffer.read("a")
        assert asked == [rig.run]
        assert rig.restarted == {"shuffle"}
        with pytest.raises(RuntimeError, match="dropped"):
            rig.buffer.read("a")
        thread_state.key = "another task"
        try:
            with pytest.raises(Reschedule):
                rig.buffer.read("a")
        finally:
            del thread_state.key

    with_rig(use)


def test_an_output_that_is_dropped_while_it_is_read_is_complete(with_rig: Any) -> None:
    """A task's thread reads while the event loop drops: it gets all shards, or the shuffle starts again."""

    class DroppedWhenAsked(set[str]):
        def __contains__(self, name: object) -> bool:
            was_there = super().__contains__(name)
            rig.kept._shards.pop("a", None)
            return was_there

    async def use(used: Rig) -> None:
        nonlocal rig
        rig = used
        await rig.buffer.write({"a": b"1"})
        await rig.buffer.flush()
        rig.kept._dropped = DroppedWhenAsked()
        shards = rig.kept._shards["a"]
        assert rig.buffer.read("a") == [b"1"]
        rig.kept._shards["a"] = shards

    rig: Any = None
    with_rig(use)


def test_an_output_without_shards_is_unavailable_as_with_dask(with_rig: Any) -> None:
    """So is any output before all shards are there, and after the end."""

    async def use(rig: Rig) -> None:
        await rig.buffer.write({"a": b"1"})
        with pytest.raises(RuntimeError, match="before done"):
            rig.buffer.read("a")
        await rig.buffer.flush()
        with pytest.raises(DataUnavailable):
            rig.buffer.read("b")
        with pytest.raises(RuntimeError, match="closed"):
            await rig.buffer.write({"a": b"1"})
        await rig.buffer.close()
        with pytest.raises(RuntimeError, match="closed"):
            rig.buffer.read("a")

    with_rig(use)


def test_nothing_is_kept_while_it_is_switched_off(with_rig: Any) -> None:
    """What was kept before is still read."""

    async def use(rig: Rig) -> None:
        await rig.buffer.write({"a": b"1"})
        rig.is_on = False
        await rig.buffer.write({"a": b"2"})
        await rig.buffer.flush()
        assert rig.in_files() == ["a"]
        assert sorted(rig.buffer.read("a")) == [b"1", b"2"]

    with_rig(use)


def test_a_quarter_of_the_limit_is_left_beside_shards_of_an_earlier_plugin() -> None:
    """After ``unregister`` and a new registration, runs of the first one may keep shards."""
    limiter = ResourceLimiter(4000)
    first, second = Allowance(limiter), Allowance(limiter)
    first.take(2500)
    assert second.has(500)
    assert not second.has(501)


def test_an_array_is_copied_out_of_a_message_once() -> None:
    """An array that is part of a larger memory is copied; one with its own memory, or of objects, is not."""
    whole, objects = np.arange(10.0), np.array([[], {}], object)[:1]
    part, own, other = kept.in_private([(0, whole[2:4]), (1, whole), (2, objects)])
    assert part[1].base is None
    np.testing.assert_array_equal(part[1], [2, 3])
    assert own[1] is whole
    assert other[1] is objects
