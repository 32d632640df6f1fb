"""What one worker has published: a value is copied once, however many ask, and stays while the worker holds its key."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from distributed.protocol.serialize import Serialized as DaskSerialized

from dask_shm_plugin import adoption, codec, handles, notices, seams
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.codec import Published, Serialized
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.handles import Handle
from dask_shm_plugin.listings import Listings
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.uses import Uses, Watch

logger = logging.getLogger("dask_shm_plugin")


class _Record(NamedTuple):
    """What was published under a key; good for exactly this value, which it keeps alive, and no other."""

    value: object
    published: Published
    is_adopted: bool = False
    is_settled: bool = False
    """Whether it is decided if it is adopted."""
    is_idle: bool = False


class _Flight(NamedTuple):
    """A publication under way, for exactly this value."""

    value: object
    task: asyncio.Task[Published | DaskSerialized | None]


class Publisher:
    """The publications of one worker.

    Parameters
    ----------
    arena
        Where to.
    threshold
        Bytes of serialized frames from which a value is shared.
    data
        The worker's mapping from keys to values.
    address
        Where others ask for them.
    inputs
        Returns the keys that the worker's running tasks have as their inputs.
    is_alone
        Tells of keys, the value that they have, and whether that lies apart from what it was made of, if no other key
        leads to it.

    Notes
    -----
    Lives on the worker's event loop; copying happens in threads. A record is dropped in the same moment in which the
    worker lets the key go or spills its value. There must never be a moment when a record answers for another value:
    it holds the value itself and compares identity. Nor may there be one when a copy stands for a value that a task has
    had the chance to change since: it is adopted and listed only while it is watched that none has.
    """

    def __init__(
        self,
        arena: Arena,
        threshold: int,
        data: Any,
        address: str,
        inputs: Callable[[], set[Any]] = set,
        is_alone: Callable[[frozenset[Any], object, bool], bool] = lambda *_: True,
    ) -> None:
        self._arena, self._threshold, self._data = arena, threshold, data
        self._is_alone = is_alone
        self._listings = Listings(arena, address)
        self._uses = Uses(inputs, self._listings.cross_out)
        self._watches: dict[Any, Watch] = {}
        self._is_closed = False
        self._records: dict[Any, _Record] = {}
        self._flights: dict[Any, _Flight] = {}
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="dask-shm-copy")
        self._stop_listening = seams.on_spill(data, lambda key, value: self.forget(key))

    async def publish(self, key: Any, value: object, size: int) -> Published | DaskSerialized | None:
        """Publish the value of a key, unless that was done.

        Parameters
        ----------
        key, value
            As they are in the worker's data.
        size
            Dask's estimate of the value's bytes.

        Returns
        -------
        Published
            Whose handle others can resolve, as long as the caller keeps it.
        Serialized
            The value is too small to be shared, and was serialized to find that out.
        None
            It is to be sent as usual.
        """
        # One asker that goes away must not take the others' publication along.
        outcome: Published | DaskSerialized | None = await asyncio.shield(self._take_off(key, value, size).task)
        return outcome

    def small(self, key: Any, value: object, size: int) -> DaskSerialized | None:
        """Return, serialized, a value that is estimated to be too small to be shared, and is; takes no detour.

        The same for each of the thousands of small values in one answer would cost more than all the rest
        (25 of 90 microseconds for each, 2 cores, November 2026).
        """
        if size >= self._threshold or key in self._records or key in self._flights:
            return None
        serialized = Serialized.of(value)
        return DaskSerialized(serialized.header, serialized.frames) if serialized.size < self._threshold else None

    def forget(self, key: Any) -> None:
        """Drop the record of a key that the worker holds no longer in memory."""
        self._records.pop(key, None)
        self._take_back(key)

    def task_begins(self, keys: Iterable[Any]) -> None:
        """Take note that a task begins, which has some keys as its inputs."""
        self._uses.begin(keys)

    def prune(self) -> None:
        """Let no value keep two copies for ever; lives on the event loop.

        A shared copy beside a private one goes where nobody else has referred to it since the last call. The private one
        goes where it could not be adopted yet, and no task uses it now: nobody may ask for it any more.
        """
        for key, record in list(self._records.items()):
            is_idle = not record.is_adopted and not record.published.is_used_elsewhere
            if is_idle and record.is_idle:
                self.forget(key)
            elif is_idle != record.is_idle:
                self._records[key] = record._replace(is_idle=is_idle)
            elif not record.is_settled and not self._uses.are_running(seams.keys_of(self._data, record.value)):
                self._take_off(key, record.value, record.published.handle.size)

    def close(self) -> None:
        """Drop everything; views stay valid. What is under way is answered, but neither remembered nor listed."""
        self._is_closed = True
        self._stop_listening()
        for key in list(self._records):
            self.forget(key)
        self._listings.clear()
        self._threads.shutdown(wait=False)

    def __repr__(self) -> str:
        return f"<Publisher {len(self._records)} published, {len(self._flights)} under way>"

    def _take_off(self, key: Any, value: object, size: int) -> _Flight:
        flight = self._flights.get(key)
        if flight is None or flight.value is not value:
            flight = _Flight(value, asyncio.create_task(self._publish(key, value, size)))
            self._flights[key] = flight
            flight.task.add_done_callback(lambda _: self._land(key, flight))
        return flight

    async def _publish(self, key: Any, value: object, size: int) -> Published | DaskSerialized | None:
        watch = self._uses.watch({key, *seams.keys_of(self._data, value)})
        try:
            record = self._records.get(key)
            if record is None or record.value is not value or not await self._still_holds(record):
                outcome = await self._copy(value, size)
                if not isinstance(outcome, Published) or self._is_closed or not self._has(key, value):
                    return outcome
                record = self._records[key] = _Record(value, outcome)
            if not record.is_settled:
                record = await self._adopt(key, record, watch)
            self._list(key, record, watch)
            return record.published
        finally:
            if self._watches.get(key) is not watch:
                self._uses.end(watch)

    async def _copy(self, value: object, size: int) -> Published | DaskSerialized | None:
        if size < self._threshold:
            serialized = Serialized.of(value)
        else:
            serialized = await self._in_thread(Serialized.of, value)
        if serialized.size < self._threshold:
            return DaskSerialized(serialized.header, serialized.frames)
        try:
            published: Published = await self._in_thread(codec.publish, serialized, self._arena)
        except SharedMemoryError as error:
            notices.refused(error, serialized.size)
            return None
        if published.copied:
            COUNTERS.count("published", published.copied)
        return published

    async def _still_holds(self, record: _Record) -> bool:
        try:
            return bool(await self._in_thread(codec.still_holds, record.published, record.value, self._arena))
        except SharedMemoryError:
            # It cannot be looked at: published anew it is right in any case, and costs nothing where it lies in the arena.
            return False

    @step("adopt")
    async def _adopt(self, key: Any, record: _Record, watch: Watch) -> _Record:
        """Give the private copy up for the shared one, if nobody can tell the difference; return the record."""
        value, published = record.value, record.published
        shared = None
        if published.copied and adoption.may_adopt(value):
            if not watch.is_quiet:
                return record
            shared = await self._in_thread(_rebuild, published.handle, value)
        # While the thread was at work the key may have been released, replaced, spilled, or used by a task.
        is_same = self._records.get(key) is record and self._has(key, value)
        if not is_same or not (shared is None or watch.is_quiet):
            return record
        if shared is not None:
            # What a task has returned as it came is one object under several keys, and stays one. A key that was not
            # watched has come by it in another way than by a watched one (a global, ``future.result()`` in a task): who
            # put it there may have changed it.
            keys = seams.keys_of(self._data, value)
            if not watch.keys.issuperset(keys):
                return record
            for also in keys:
                if self._has(also, value):  # storing one may spill another
                    self.forget(also)
                    self._data[also] = shared
            if not self._has(key, shared):  # spilled at once
                return record
            COUNTERS.count("adopted", published.handle.size)
        record = _Record(value if shared is None else shared, published, is_adopted=shared is not None, is_settled=True)
        self._records[key] = record
        return record

    def _list(self, key: Any, record: _Record, watch: Watch) -> None:
        is_same = self._records.get(key) is record and self._has(key, record.value)
        if is_same and watch.is_quiet and self._is_alone(watch.keys, record.value, record.is_adopted):
            self._take_back(key)
            self._watches[key] = watch
            self._listings.enter(key, record.published.handle)

    def _take_back(self, key: Any) -> None:
        self._listings.cross_out(key)
        watch = self._watches.pop(key, None)
        if watch is not None:
            self._uses.end(watch)

    def _has(self, key: Any, value: object) -> bool:
        return seams.in_memory(self._data, key) is value

    def _land(self, key: Any, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not flight.task.cancelled():
            flight.task.exception()

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)


def _rebuild(handle: Handle, value: object) -> object | None:
    try:
        shared = handles.resolve(handle)
        return shared if adoption.is_faithful(shared, value) else None
    except SharedMemoryError as error:
        notices.kept_private(error)
        return None
    except Exception:
        logger.debug("a published value keeps its private copy", exc_info=True)
        return None
