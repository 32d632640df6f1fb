"""List every private name of ``distributed.shuffle`` that shuffles through the arena rely on, and bundle their use.

When one has changed, shuffles and rechunks go Dask's way, and one warning says so; all else is shared as before.
Written against distributed 2026.8.0.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

from distributed.core import clean_exception, error_message
from distributed.protocol.serialize import Serialize
from distributed.shuffle._arrow import serialize_table
from distributed.shuffle._buffer import ShardsBuffer
from distributed.shuffle._comms import CommShardsBuffer
from distributed.shuffle._core import ShuffleRun
from distributed.shuffle._disk import DiskShardsBuffer
from distributed.shuffle._exceptions import DataUnavailable, P2PConsistencyError
from distributed.shuffle._limiter import ResourceLimiter
from distributed.shuffle._memory import MemoryShardsBuffer
from distributed.shuffle._rechunk import ArrayRechunkRun
from distributed.shuffle._scheduler_plugin import ShuffleSchedulerPlugin
from distributed.shuffle._shuffle import DataFrameShuffleRun, split_by_worker
from distributed.shuffle._worker_plugin import ShuffleWorkerPlugin
from distributed.shuffle._worker_plugin import _ShuffleRunManager as ShuffleRunManager
from distributed.utils_comm import retry

from dask_shm_plugin.seams.checks import Seam, moved, names, takes

__all__ = [
    "RECEIVING",
    "ArrayRechunkRun",
    "DataFrameShuffleRun",
    "DataUnavailable",
    "DiskShardsBuffer",
    "P2PConsistencyError",
    "ShuffleRunManager",
    "as_received",
    "ask_for_restart",
    "error_in",
    "send_blob",
    "serialize_table",
    "split_by_worker",
    "why_not",
]

RECEIVING = frozenset(
    function.__code__ for function in (ShuffleRun.receive, ArrayRechunkRun._receive, DataFrameShuffleRun._receive)
)
"""The code of the coroutines that have received shards; none of them waits for anything after an error."""

SEAMS = (
    Seam(
        "_ShuffleRunManager._refresh, ._plugin",
        "makes each run of a shuffle on a worker, so that the new run can be changed before it is used",
        lambda: (
            names(ShuffleRunManager._refresh, "create_run_on_worker", "_active_runs", "_plugin")
            and names(ShuffleRunManager.get_or_create, "_refresh")
            and names(ShuffleRunManager.get_with_run_id, "_refresh")
        ),
    ),
    Seam(
        "ShuffleRun._comm_buffer.write, .send, .close, ShuffleRun.inputs_done",
        "sends the shards of several input partitions to one worker; nothing is sent after its end, or after the inputs",
        lambda: (
            names(ShuffleRun.__init__, "_comm_buffer", "_disk_buffer", "send", "local_address", "_loop")
            and names(CommShardsBuffer._process, "send", "status", "clean_exception")
            and takes(ShuffleRun.send, "address", "shards")
            and names(ShuffleRun._write_to_comm, "_comm_buffer", "write")
            and names(ShuffleRun.close, "_comm_buffer", "close")
            and names(ShuffleRun.inputs_done, "transferred", "_flush_comm")
        ),
    ),
    Seam(
        "ShuffleRun.receive, ._exception, ._send, .RETRY_COUNT, .RETRY_DELAY_MIN, .RETRY_DELAY_MAX",
        "a message of bytes is a pickle of shards, and becomes them where it is received; it is sent as often as Dask does",
        lambda: (
            names(ShuffleRun.fail, "_exception")
            and names(ShuffleRun.receive, "bytes", "pickle", "loads", "P2PConsistencyError", "error_message")
            and names(ShuffleRun._send, "shuffle_receive", "to_serialize")
            and names(ShuffleRun.send, "RETRY_COUNT", "RETRY_DELAY_MIN", "RETRY_DELAY_MAX", "retry", "_send")
        ),
    ),
    Seam(
        "ShuffleWorkerPlugin.shuffle_receive",
        "receives a worker's own part, without a connection",
        lambda: (
            takes(ShuffleWorkerPlugin.shuffle_receive, "shuffle_id", "run_id", "data")
            and names(ShuffleWorkerPlugin.shuffle_receive, "P2PConsistencyError", "error_message")
            and names(error_message, "to_serialize")
        ),
    ),
    Seam(
        "ArrayRechunkRun._shard_partition, ._get_output_partition, .split_axes, .new, .worker_for",
        "splits a chunk of an array, and joins shards; they are copied to the arena, and from there to their outputs",
        lambda: (
            takes(ArrayRechunkRun._shard_partition, "data", "partition_id")
            and names(ArrayRechunkRun._shard_partition, "split_axes", "worker_for", "product", "p2p-shards")
            and names(ArrayRechunkRun._receive, "received", "_write_to_disk")
            and takes(ArrayRechunkRun._get_output_partition, "partition_id", "key")
            and names(ArrayRechunkRun._get_output_partition, "_read_from_disk", "convert_chunk")
            and names(ArrayRechunkRun.__init__, "new", "split_axes")
        ),
    ),
    Seam(
        "DataFrameShuffleRun._shard_partition, ._repartition_buffers, .column, .meta, .worker_for, split_by_worker, "
        "serialize_table",
        "splits a partition of a DataFrame; its parts are serialized in the arena instead, and dropped if that fails",
        lambda: (
            takes(DataFrameShuffleRun._shard_partition, "data", "partition_id")
            and names(
                DataFrameShuffleRun._shard_partition, "split_by_worker", "column", "meta", "worker_for", "p2p-shards"
            )
            and takes(DataFrameShuffleRun._repartition_buffers, "data")
            and names(DataFrameShuffleRun._receive, "offload", "_repartition_buffers", "_write_to_disk")
            and takes(split_by_worker, "df", "column", "meta", "worker_for")
            and names(serialize_table, "ipc", "new_stream", "write_table")
        ),
    ),
    Seam(
        "ShardsBuffer.write, .close, ._process, .memory_limiter, DiskShardsBuffer.read, MemoryShardsBuffer.write",
        "received shards are kept in memory beside the files, as far as the limiter of these allows",
        lambda: (
            takes(ShardsBuffer.write, "data")
            and names(ShardsBuffer.write, "memory_limiter", "increase", "wait_for_available", "sizeof")
            and names(ShardsBuffer.process, "_process", "_exception")
            and takes(DiskShardsBuffer._process, "id", "shards")
            and "write" not in vars(DiskShardsBuffer)
            and "write" not in vars(MemoryShardsBuffer)
            and names(ShuffleRun._write_to_disk, "_disk_buffer", "write")
            and names(ShuffleRun._read_from_disk, "_disk_buffer", "read")
            and names(ShuffleRun.close, "_disk_buffer", "close")
            and names(DiskShardsBuffer.read, "DataUnavailable", "raise_on_exception", "_inputs_done")
            and names(MemoryShardsBuffer.read, "_deserialize")
            and {"limit", "available", "increase", "decrease"} <= set(dir(ResourceLimiter(0)))
        ),
    ),
    Seam(
        "ShuffleSchedulerPlugin.barrier(consistent=False)",
        "starts a shuffle again whose output is needed a second time, after its shards have been dropped",
        lambda: (
            takes(ShuffleSchedulerPlugin.barrier, "id", "run_id", "consistent")
            and names(ShuffleSchedulerPlugin.barrier, "_restart_shuffle", "active_shuffles", "ValueError")
            and inspect.iscoroutinefunction(ShuffleSchedulerPlugin.barrier)
        ),
    ),
)


@functools.cache
def why_not() -> str | None:
    """Return the reason why shuffles go Dask's way in this process, or None."""
    return moved(SEAMS)


async def send_blob(run: Any, address: str, blob: bytes) -> Any:
    """Send the pickle of a list of shards to a run's counterpart on another worker, and return its response."""
    return await retry(
        lambda: run._send(address, blob),
        count=run.RETRY_COUNT,
        delay_min=run.RETRY_DELAY_MIN,
        delay_max=run.RETRY_DELAY_MAX,
    )


def error_in(response: Any) -> BaseException | None:
    """Return the exception that a response contains, or None."""
    return clean_exception(**response)[1] if response["status"] == "error" else None


def as_received(response: Any) -> Any:
    """Return a response of this process as a connection would deliver it: with the bytes that were to be serialized."""
    return {name: part.data if isinstance(part, Serialize) else part for name, part in response.items()}


async def ask_for_restart(run: Any) -> None:
    """Let the scheduler start a run's shuffle again, as it does when the run's data turn out to be inconsistent.

    Nothing happens if this run has ended for the scheduler: another task was first, or nobody needs the shuffle any more.
    """
    with contextlib.suppress(KeyError, ValueError):  # no such shuffle, or a later run of it
        await run.scheduler.shuffle_barrier(id=run.id, run_id=run.run_id, consistent=False)
