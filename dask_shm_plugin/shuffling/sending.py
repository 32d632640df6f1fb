"""Split input partitions straight into blocks of the arena, and send their names to workers of the same arena."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from typing import Any

from distributed.metrics import context_meter

from dask_shm_plugin import notices
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.seams import shuffle as seams
from dask_shm_plugin.seams.replacement import Replacement
from dask_shm_plugin.shuffling import parcels
from dask_shm_plugin.shuffling.failures import forget_shards, forget_tables
from dask_shm_plugin.shuffling.parcels import Parcel, ParcelLost, Shard
from dask_shm_plugin.table.layout import BLOCKS
from dask_shm_plugin.threads import in_thread

_MIN_PARCEL_BYTES = 64 << 10
"""Shards of one input partition for one worker that take fewer bytes are sent as with stock Dask, many in a message."""
_MAX_FULL = 0.5
"""Fraction of the arena's room, or of its table's rows, from which on nothing more of a shuffle goes there."""
_MAX_WAITING_BYTES = 16 << 20
"""Bytes of parcels that wait to be sent, from which on tasks that have split an input wait, too."""


class Sender:
    """Sends the shards of one run from one worker.

    Parameters
    ----------
    run
        The run of a shuffle on this worker. Its methods that split a partition and send its parts are replaced.
    plugin
        Dask's shuffle plugin of this worker.
    arena
        The arena of this worker.
    is_on
        Whether shards may go to the arena.

    Notes
    -----
    Partitions are split in the threads of tasks; the rest runs on the worker's event loop.
    """

    def __init__(self, run: Any, plugin: Any, arena: Arena, is_on: Callable[[], bool]) -> None:
        self._run, self._plugin, self._arena, self._is_on = run, plugin, arena, is_on
        is_table = isinstance(run, seams.DataFrameShuffleRun)
        self._split = Replacement(run, "_shard_partition", self.split_table if is_table else self.split_array).old
        if is_table:
            forget_tables(run)
        self._receive = Replacement(run, "receive", self.receive).old
        self._write = Replacement(run._comm_buffer, "write", self.write).old
        Replacement(run._comm_buffer, "send", self.send)
        self._close = Replacement(run._comm_buffer, "close", self.close).old
        self._inputs_done = Replacement(run, "inputs_done", self.inputs_done).old
        self._strangers: set[str] = set()
        self._has_packed = False
        self._waiting, self._few_wait = 0, asyncio.Event()
        self._few_wait.set()
        self._lock = threading.Lock()
        self._parcels: weakref.WeakSet[Parcel] | None = weakref.WeakSet()

    # -- splitting

    def split_array(self, data: Any, partition_id: Any, **kwargs: Any) -> Any:
        """Return the shards of a chunk of an array by the worker that they are for."""
        if not parcels.is_plain(data) or not self._has_room():
            return self._split(data, partition_id, **kwargs)
        run = self._run
        by_worker: defaultdict[str, list[Shard]] = defaultdict(list)
        for splits in product(*(axis[i] for axis, i in zip(run.split_axes, partition_id, strict=True))):
            chunk, index, part = zip(*splits, strict=True)
            by_worker[run.worker_for[chunk]].append((chunk, (index, data[part])))
        arrays = [array for shards in by_worker.values() for _, (_, array) in shards]
        _note_shards(sum(array.nbytes for array in arrays), len(arrays))
        return {address: (partition_id, self._pack_arrays(address, shards)) for address, shards in by_worker.items()}

    def _pack_arrays(self, address: str, shards: list[Shard]) -> Any:
        size = parcels.size_of(shards)
        if size >= _MIN_PARCEL_BYTES and self._is_co_located(address):
            try:
                return self._noted(parcels.pack_arrays(self._arena, shards))
            except (SharedMemoryError, OSError) as error:
                notices.refused(error, size)
        return [(chunk, (index, array.copy())) for chunk, (index, array) in shards]

    def split_table(self, data: Any, partition_id: Any, **kwargs: Any) -> Any:
        """Return the serialized rows of a partition of a DataFrame by the worker that they are for."""
        if not self._has_room():
            return self._split(data, partition_id, **kwargs)
        run = self._run
        tables = seams.split_by_worker(data, run.column, run.meta, run.worker_for)
        packed = {address: self._pack_table(address, table) for address, table in tables.items()}
        _note_shards(sum(one.size if type(one) is Parcel else len(one) for one in packed.values()), len(packed))
        return {address: (partition_id, one) for address, one in packed.items()}

    def _pack_table(self, address: str, table: Any) -> Any:
        if self._is_co_located(address):
            try:
                parcel = parcels.pack_table(self._arena, table, _MIN_PARCEL_BYTES)
                if parcel is not None:
                    return self._noted(parcel)
            except (SharedMemoryError, OSError) as error:
                notices.refused(error, table.nbytes)
        return seams.serialize_table(table)

    def _noted(self, parcel: Parcel) -> Parcel:
        """Note a parcel, to be closed with the run; if the run was closed meanwhile, close it now: it is not sent."""
        self._has_packed = True
        with self._lock:
            if self._parcels is None:
                parcel.close()
            else:
                self._parcels.add(parcel)
        return parcel

    def _has_room(self) -> bool:
        """Return whether the arena has room for a shuffle beside the values that are shared."""
        if not self._is_on():
            return False
        try:
            stats = self._arena.glance()
        except (SharedMemoryError, OSError):
            return False
        return max(stats.used / (stats.capacity or 1), stats.blocks / BLOCKS) < _MAX_FULL and stats.capacity > 0

    def _is_co_located(self, address: str) -> bool:
        try:
            return address not in self._strangers and bool(self._arena.roster.workers_at(address))
        except SharedMemoryError:
            return False

    # -- sending

    async def write(self, data: dict[str, Any]) -> None:
        """Let shards be sent, in place of ``CommShardsBuffer.write``, and wait while too many parcels wait.

        Dask's own limit is 100 MB per worker. Pages for so many blocks would be made, mapped, and given back. A few blocks
        that are used again and again are warm.
        """
        size = sum(payload.size for _, payload in data.values() if type(payload) is Parcel)
        self._count_waiting(size)
        try:
            await self._write(data)
        except Exception:  # raised before anything is queued, since the run has failed or is closed
            self._count_waiting(-size)
            raise
        await self._few_wait.wait()

    def _count_waiting(self, size: int) -> None:
        self._waiting += size
        if self._waiting < _MAX_WAITING_BYTES or self._parcels is None:
            self._few_wait.set()
        else:
            self._few_wait.clear()

    @step("send shards")
    async def send(self, address: str, shards: list[tuple[Any, Any]]) -> Any:
        """Send shards of some input partitions to a worker, in place of ``ShuffleRun.send``."""
        packed = [payload for _, payload in shards if type(payload) is Parcel]
        try:
            return await self._send(address, shards)
        finally:
            # Dask has ten tasks per run that send, and each refers to what it has sent until it sends again.
            for parcel in packed:
                parcel.close()
            self._count_waiting(-sum(parcel.size for parcel in packed))

    async def _send(self, address: str, shards: list[tuple[Any, Any]]) -> Any:
        if address == self._run.local_address and all(_may_be_handed_over(payload) for _, payload in shards):
            return await self._hand_over(shards)
        packed = [shard for shard in shards if type(shard[1]) is Parcel]
        others = [shard for shard in shards if type(shard[1]) is not Parcel]
        if packed:
            response = await self._send_packed(address, packed)
            if response is None:
                others += [(partition, parcel.as_sent()) for partition, parcel in packed]
            elif not others or response["status"] != "OK":
                return response
        return await self._run.send(address, others)

    async def _send_packed(self, address: str, packed: list[tuple[Any, Parcel]]) -> Any:
        """Send the names of blocks, and return the response, or None if the receiver cannot open them."""
        try:
            response = await seams.send_blob(self._run, address, pickle.dumps(packed))
        except (ImportError, AttributeError):
            # The receiver is a member of the arena with another version of this package.
            self._strangers.add(address)
            return None
        if isinstance(seams.error_in(response), ParcelLost):
            self._strangers.add(address)  # so nothing more is packed in vain
            return None
        COUNTERS.count("shuffled", sum(parcel.size for _, parcel in packed))
        return response

    async def _hand_over(self, shards: list[tuple[Any, Any]]) -> Any:
        """Receive this worker's own part, without a connection."""
        self._run.raise_if_closed()  # as Dask does before it sends
        opened = [(partition, one.open() if type(one) is Parcel else one) for partition, one in shards]
        try:
            run = self._run
            response = await self._plugin.shuffle_receive(shuffle_id=run.id, run_id=run.run_id, data=opened)
            return seams.as_received(response)
        finally:
            opened.clear()  # if this has failed, the error's traceback refers to the list

    async def receive(self, data: Any) -> Any:
        """Receive shards as ``ShuffleRun.receive`` does."""
        try:
            return await self._receive(data)
        except Exception as error:
            forget_shards(error)
            raise
        finally:
            forget_shards(self._run._exception)

    async def inputs_done(self) -> None:
        """End the transfer as Dask does, and give free pages of the arena back: outputs will need memory now."""
        await self._inputs_done()
        if self._has_packed:
            await in_thread(self._give_pages_back)

    def _give_pages_back(self) -> None:
        with contextlib.suppress(SharedMemoryError, OSError), self._arena.in_use:
            self._arena.holdings.tidy()
            self._arena.trimmer.trim_all()

    async def close(self) -> None:
        """Close Dask's buffer of what is to be sent, and all parcels at once: Dask waits for workers that are gone."""
        with self._lock:
            left, self._parcels = list(self._parcels or ()), None
        for parcel in left:
            parcel.close()
        self._few_wait.set()
        await self._close()


def _may_be_handed_over(payload: Any) -> bool:
    """Return whether a receiver in this process may have a payload itself, and not a copy as from another process."""
    return type(payload) in (Parcel, bytes) or all(parcels.is_plain(array) for _, (_, array) in payload)


def _note_shards(size: int, count: int) -> None:
    context_meter.digest_metric("p2p-shards", size, "bytes")
    context_meter.digest_metric("p2p-shards", count, "count")
