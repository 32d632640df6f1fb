"""What fails in a shuffle fails as with stock Dask, and keeps nothing that was received."""

from __future__ import annotations

import asyncio
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from distributed.core import clean_exception, error_message
from distributed.shuffle._disk import DiskShardsBuffer
from distributed.shuffle._exceptions import P2PConsistencyError
from distributed.shuffle._limiter import ResourceLimiter

from dask_shm_plugin.seams import shuffle as seams
from dask_shm_plugin.shuffling import sending, shuffles
from dask_shm_plugin.shuffling.failures import forget_tables, forget_written
from dask_shm_plugin.shuffling.parcels import Parcel
from dask_shm_plugin.shuffling.sending import Sender


def test_an_error_of_a_workers_own_part_is_the_error() -> None:
    """A connection would have turned its wrapper into bytes."""
    _, error, _ = clean_exception(**seams.as_received(error_message(P2PConsistencyError("stale"))))
    assert type(error) is P2PConsistencyError
    assert str(error) == "stale"
    assert seams.as_received({"status": "OK"}) == {"status": "OK"}


def run_of(**more: Any) -> Any:
    """Return a run with the methods that a sender replaces."""
    buffer = SimpleNamespace(write=None, send=None, close=None)
    attributes = dict.fromkeys(("_shard_partition", "receive", "inputs_done", "id", "run_id"))
    return SimpleNamespace(**attributes, _comm_buffer=buffer, local_address="here", **more)


def test_a_run_that_has_ended_receives_nothing_of_its_own() -> None:
    """Nor does it ask for a new run."""

    def closed() -> None:
        raise RuntimeError("closed")

    run = run_of(raise_if_closed=closed)
    arena: Any = None
    Sender(run, SimpleNamespace(), arena, lambda: True)
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(run._comm_buffer.send("here", [(0, b"shard")]))


def test_parcels_that_a_failed_buffer_refuses_do_not_wait_to_be_sent() -> None:
    """Tasks that wait until fewer bytes are waiting would do so until the run is closed."""

    async def refuse(data: Any) -> None:
        raise RuntimeError("failed")

    async def use() -> None:
        nothing: Any = None
        run = run_of()
        run._comm_buffer.write = refuse
        sender = Sender(run, SimpleNamespace(), nothing, lambda: True)
        parcel = Parcel(nothing, memoryview(bytes(sending._MAX_WAITING_BYTES)), lambda content: content)
        with pytest.raises(RuntimeError, match="failed"):
            await run._comm_buffer.write({"there": (0, parcel)})
        assert sender._few_wait.is_set()

    asyncio.run(use())


def test_shards_are_dropped_when_they_are_in_a_file(tmp_path: Path) -> None:
    """Dask's task that has written them refers to them until it writes again: each worker would keep a block."""

    async def use() -> None:
        buffer = DiskShardsBuffer(str(tmp_path), lambda path: (path.read_bytes(), 1), ResourceLimiter(1 << 20))
        forget_written(buffer)
        array = np.arange(1000)
        content, alive = array.tobytes(), weakref.ref(array)
        await buffer.write({"0": [((0,), array)]})
        del array
        while not buffer.bytes_written:
            await asyncio.sleep(0.001)
        assert alive() is None
        await buffer.flush()
        assert content in buffer.read("0")
        await buffer.close()

    asyncio.run(use())


def test_tables_that_cannot_be_split_are_dropped() -> None:
    """The error is kept, but neither it nor the list refers to what was received."""

    def fail(data: list[Any]) -> None:
        received = data[0]
        raise ValueError(len(received))

    run = SimpleNamespace(_repartition_buffers=fail)
    forget_tables(run)
    data = [b"table"]
    with pytest.raises(ValueError, match="5") as failure:
        run._repartition_buffers(data)
    assert data == []
    assert failure.value.__traceback__ is not None
    trace: Any = failure.value.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    assert trace.tb_frame.f_locals == {}


def test_only_new_runs_use_the_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that began before the plugin was switched on is returned as it is."""
    runs, shared = {"old": object()}, []

    class Active:
        def share(self, run: Any, plugin: Any) -> None:
            shared.append(run)

    async def refresh(manager: Any, shuffle_id: str) -> Any:
        return runs.setdefault(shuffle_id, object())

    monkeypatch.setattr(shuffles, "_REFRESH", SimpleNamespace(old=refresh))
    monkeypatch.setattr(shuffles, "_ACTIVE", {"worker": Active()})
    manager = SimpleNamespace(_active_runs=runs, _plugin=SimpleNamespace(worker="worker"))
    for name in ("old", "new", "new"):
        assert asyncio.run(shuffles._refresh(manager, shuffle_id=name)) is runs[name]
    assert shared == [runs["new"]]
