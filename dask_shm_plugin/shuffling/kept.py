"""Received shards of tables that are kept in memory instead of in Dask's files, as far as Dask's limit for these allows.

Dask writes what a worker has received to files, and reads them again for the output. Bytes in that queue count towards
``distributed.p2p.storage.buffer``. Here, shards stay in memory while they take less than a part of that limit. Each
output has its own copies, so the shards of one output go when that output is done.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NoReturn

from dask.context import thread_state
from dask.sizeof import sizeof

from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.seams import shuffle as seams
from dask_shm_plugin.seams.replacement import Replacement
from dask_shm_plugin.shuffling.parcels import is_plain


class Allowance:
    """The bytes of shards that one worker keeps, a part of the limit that Dask's files have.

    Parameters
    ----------
    limiter
        Dask's limiter of the bytes that wait to be written to files.

    Notes
    -----
    To be used on the worker's event loop. Kept shards take three quarters of the limit at most. There must never be a
    moment when they take all of it: nothing more would be written to files then, and the shuffle would wait for ever.
    So a quarter must be left whoever has taken the rest: runs of an earlier plugin may still keep shards.
    """

    def __init__(self, limiter: Any) -> None:
        self.limiter, self._kept = limiter, 0

    def has(self, size: int) -> bool:
        """Return whether ``size`` bytes may be taken now."""
        limit = self.limiter.limit
        return bool(self.limiter.available - size >= limit // 4 and self._kept + size <= limit * 3 // 4)

    def take(self, size: int) -> None:
        """Take ``size`` bytes; ask :meth:`has` before."""
        self._kept += size
        self.limiter.increase(size)

    async def give_back(self, size: int) -> None:
        """Undo :meth:`take`."""
        self._kept -= size
        await self.limiter.decrease(size)


class KeptShards:
    """The shards of one run that are kept in memory, in front of Dask's files of that run.

    Parameters
    ----------
    run
        The run of a shuffle on this worker. Its buffer's methods are replaced.
    allowance
        The bytes that this worker may keep.
    is_on
        Whether more may be kept.
    note_reader
        Called with the key of a task, this object and the name of the output whose kept shards the task has read.
    note_closed
        Called with this object when the run was closed.
    restart
        Starts the shuffle again, see :class:`Restart`.

    Notes
    -----
    Shards that were read stay until :meth:`drop`: a task that fails may be run again, and reads them again. Dask's files
    can be read even after their output was done. If that is asked for, the shuffle is started again.

    :meth:`read` is called in the threads of tasks, all other methods on the worker's event loop.
    """

    def __init__(
        self,
        run: Any,
        allowance: Allowance,
        is_on: Callable[[], bool],
        note_reader: Callable[[Any, KeptShards, str], None],
        note_closed: Callable[[KeptShards], None],
        restart: Callable[[], NoReturn],
    ) -> None:
        self._run, self._allowance, self._is_on = run, allowance, is_on
        self._note_reader, self._note_closed, self._restart = note_reader, note_closed, restart
        self._shards: defaultdict[str, list[Any]] = defaultdict(list)
        self._sizes: defaultdict[str, int] = defaultdict(int)
        self._dropped: set[str] = set()
        buffer = run._disk_buffer
        self._write = Replacement(buffer, "write", self.write).old
        self._read = Replacement(buffer, "read", self.read).old
        self._close = Replacement(buffer, "close", self.close).old

    @step("keep shards")
    async def write(self, data: dict[str, Any]) -> None:
        """Keep shards of some outputs, or pass them on to Dask's files."""
        await self._write({})  # raises if the buffer has failed or is closed
        others = {name: shards for name, shards in data.items() if not self._keep(name, shards)}
        await self._write(others)
        await self._allowance.limiter.wait_for_available()

    def _keep(self, name: str, shards: Any) -> bool:
        size = sizeof(shards)
        if not (self._is_on() and self._allowance.has(size)):
            return False
        self._allowance.take(size)
        self._shards[name].append(shards)
        self._sizes[name] += size
        return True

    @step("read shards")
    def read(self, name: str) -> Any:
        """Return all shards of an output."""
        # In this order: the event loop may drop the output meanwhile. It notes the name first.
        kept = self._shards.get(name, [])
        if not kept and name in self._dropped:
            self._run.raise_if_closed()
            self._restart()
        try:
            written = self._read(name)
        except seams.DataUnavailable:
            if not kept:
                raise
            written = []
        if kept:
            self._note_reader(getattr(thread_state, "key", None), self, name)
        return [*written, *map(self._run.deserialize, kept)]

    async def drop(self, name: str) -> None:
        """Drop the shards of an output that is done."""
        if name in self._shards:
            self._dropped.add(name)
            await self._forget(name)

    async def close(self) -> None:
        """Close the buffer, as Dask does when the shuffle has ended or failed, and drop all shards."""
        try:
            await self._close()
        finally:
            self._note_closed(self)
            self._dropped.update(self._shards)
            for name in list(self._shards):
                await self._forget(name)

    async def _forget(self, name: str) -> None:
        if self._shards.pop(name, None) is not None:
            await self._allowance.give_back(self._sizes.pop(name))


def in_private(shards: list[Any]) -> list[Any]:
    """Return shards of one output with each array in memory of its own."""
    return [(index, array.copy() if is_plain(array) and array.base is not None else array) for index, array in shards]
