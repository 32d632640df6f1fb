"""Publish the values of one worker: each is copied once for all requests, and stays while the worker holds its key."""

from __future__ import annotations

import asyncio
import functools
import logging
import weakref
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from dask_shm_plugin import notices
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.seams.worker_data import WorkerData
from dask_shm_plugin.threads import call_in
from dask_shm_plugin.transfer.adopter import RETRY_PAUSES_S, Adopter
from dask_shm_plugin.transfer.entries import Entries, Listener
from dask_shm_plugin.transfer.entry import Ask, Entry
from dask_shm_plugin.transfer.publishing import publish_or_count
from dask_shm_plugin.values import codec
from dask_shm_plugin.values.codec import Published, Serialized
from dask_shm_plugin.values.handles import Handle
from dask_shm_plugin.values.kept import KeptValues

logger = logging.getLogger("dask_shm_plugin")

Serialize = Callable[[], Awaitable[Serialized]]
"""Serializes a value, once, in the thread in which Dask would."""

_DELIVERY_S = 1.0
"""Minimum time (s) for which a handle can be resolved after it was sent; a slower process asks again, for bytes."""


class _Flight(NamedTuple):
    """A publication in progress, of exactly this value, as it was when the publication began."""

    value: object
    task: asyncio.Task[Published | Serialized]
    entry: Entry | None
    run: int | None

    def is_of(self, value: object) -> bool:
        """Return whether a publication of a value that begins now would have the same result."""
        is_intact = self.entry is not None and self.entry.is_intact and self.entry.run == self.run
        return self.value is value and is_intact


class Publisher:
    """Publishes the values of one worker.

    Parameters
    ----------
    arena
        The arena in which values are published.
    threshold
        Smallest value to share, in bytes of its serialized frames.
    data
        The worker's values.
    address
        The address at which other processes request data from the worker.
    kept
        Is told of each value that is published.
    listener
        Is told of each value that other processes can find without a request.

    Notes
    -----
    To be used on the worker's event loop. Threads copy the values.
    """

    def __init__(
        self,
        arena: Arena,
        threshold: int,
        data: WorkerData,
        address: str,
        kept: KeptValues | None = None,
        listener: Listener | None = None,
    ) -> None:
        self._arena, self._threshold = arena, threshold
        self._kept, self._data = kept or KeptValues(arena), data
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="dask-shm-copy")
        self._entries = Entries(arena, data, address, listener)
        self._adopter = Adopter(self._entries, self._threads)
        self._flights: dict[Any, _Flight] = {}
        self._turns: weakref.WeakValueDictionary[Any, asyncio.Lock] = weakref.WeakValueDictionary()
        self._background: set[asyncio.Task[None]] = set()

    # -- answers

    def ask(self, keys: Collection[Any]) -> Ask:
        """Register an answer that is about to read some large values; look whether anything else reaches these now."""
        found = {key: entry for key in keys if (entry := self._entries.find_or_add(key)) is not None}
        for entry in found.values():
            self._entries.look(entry)
        return Ask(found)

    async def publish(
        self, key: Any, value: object, serialize: Serialize, *, is_wanted: bool = True
    ) -> Published | Serialized:
        """Publish the value of a key, unless its published copy is still valid.

        Parameters
        ----------
        key, value
            As they are in the worker's data.
        serialize
            Serializes the value; called at most once.
        is_wanted
            Whether a process has requested the value.

        Returns
        -------
        Published
            The published value. Other members can resolve its handle as long as the caller keeps this object.
        Serialized
            The value is to be sent as bytes, to the requesting process only.

        Raises
        ------
        Exception
            The value cannot be serialized.
        """
        flight = self._flights.get(key)
        if flight is None or not flight.is_of(value):
            entry = self._entries.find(key, value)
            task = asyncio.create_task(self._publish(key, value, serialize, is_wanted=is_wanted))
            flight = _Flight(value, task, entry, entry.run if entry is not None else None)
            self._flights[key] = flight
            flight.task.add_done_callback(functools.partial(self._land, key, flight))
            is_own = True
        else:
            is_own = False
        # Shielded: a request that is cancelled must not cancel the publication for the other requests.
        outcome = await asyncio.shield(flight.task)
        if isinstance(outcome, Serialized) and outcome.is_personal and not is_own:
            return await serialize()
        return outcome

    def sent_away(self, key: Any, published: Published) -> None:
        """Note that a published value is sent to another node, from which its version may come back to this one."""
        self._entries.list_as_sent(key, published)

    def answered(self, ask: Ask) -> None:
        """Note that an answer is over: list and adopt those of its published values that nothing else reaches."""
        entries = list(ask.entries.items())
        ask.entries.clear()  # a log may keep an answer that has failed, and would keep the values
        for _, entry in entries:
            entry.asks -= 1
        for key, entry in entries:
            if entry.published is not None:
                # Listed before it is adopted: other processes may look for it at once.
                if self._entries.look(entry):
                    self._entries.list(key, entry)
                self._soon(self._adopter.settle(key, entry))
            elif not entry.asks and self._entries.is_current(key, entry) and key not in self._flights:
                self._entries.forget(key)

    # -- for people

    def in_memory(self, key: Any) -> object:
        """Return the value of a key if it is in memory, without reporting a read; None if not."""
        return self._data.in_memory(key)

    def entry(self, key: Any) -> Entry | None:
        """Return the entry of a key, if there is one."""
        return self._entries.get(key)

    # -- without being asked

    def offer(self, key: Any, known: int = 0) -> asyncio.Task[None]:
        """Publish and list the value of a key, in a new task, if nothing else reaches it.

        Parameters
        ----------
        key
            A key in the worker's data.
        known
            The number of references to the value that the caller holds until the returned task is done.
        """
        return self._soon(self._offer(key, known))

    def stored(self, key: Any, handle: Handle) -> None:
        """List a value that was just made from a handle; to be called before any reader can have it."""
        entry = self._entries.find_or_add(key)
        if entry is None or entry.reads or entry.published is not None:
            return
        try:
            entry.published = Published.of_handle(handle, self._arena)
        except SharedMemoryError:
            self._entries.forget(key)
            return
        entry.is_adopted = True  # the worker's value is the mapping
        entry.begin(0, is_verified=True)
        self._soon(self._adopter.settle(key, entry))

    def prune(self) -> None:
        """Make sure that no value keeps two copies for ever; called regularly.

        A shared copy beside a private one is dropped if no other member referred to it at this call and the one before.
        Otherwise, adoption is tried again if nothing else reaches the private copy now: there may be no further request
        that would try it.
        """
        for key, entry in self._entries:
            if entry.asks or entry.is_settling:
                continue
            if entry.published is None:
                self.offer(key)
                continue
            is_idle = not entry.is_adopted and not entry.published.is_used_elsewhere
            if is_idle and entry.is_idle:
                self._entries.forget(key)
            elif is_idle != entry.is_idle:
                entry.is_idle = is_idle
            elif entry.published.copied and not entry.is_adopted and not entry.is_private:
                self.offer(key)

    def close(self) -> None:
        """Drop all published values; views stay valid.

        Publications in progress are answered, but neither remembered nor listed.
        """
        self._entries.close()
        self._threads.shutdown(wait=False)

    def __repr__(self) -> str:
        published = sum(entry.published is not None for _, entry in self._entries)
        return f"<Publisher {published} published, {len(self._flights)} under way>"

    # -- publishing

    async def _publish(
        self, key: Any, value: object, serialize: Serialize, *, is_wanted: bool
    ) -> Published | Serialized:
        entry = self._entries.find(key, value)
        run = entry.run if entry is not None else None
        if entry is not None and entry.published is not None and entry.is_intact and entry.is_verified:
            return entry.published
        serialized = await serialize()
        if serialized.size < self._threshold or serialized.is_personal:
            return serialized
        if serialized.is_copied_by_readers and not is_wanted:
            return serialized
        # Another publication of this key may be in progress. If the value has not changed, its copy is used.
        turn = self._turns.setdefault(key, asyncio.Lock())
        async with turn:
            entry = self._entries.find(key, value)
            published = entry.published if entry is not None else None
            if published is None or not await self._still_holds(published, serialized):
                try:
                    published = await call_in(self._threads, publish_or_count, serialized, self._arena)
                except RuntimeError as error:  # the publisher is closed, and its executor shut down
                    notices.refused(error, serialized.size)
                    published = None
                if published is None:
                    return serialized
            self._remember(key, value, published, run)
        if serialized.is_copied_by_readers:
            self._forget_soon(key, published)
        return published

    def _forget_soon(self, key: Any, published: Published) -> None:
        """Forget a published value once no process is about to resolve it: its owner and readers have own copies."""

        def look_again() -> None:
            entry = self._entries.get(key)
            if entry is not None and entry.published is published:
                if entry.asks or published.is_used_elsewhere:
                    self._forget_soon(key, published)
                else:
                    self._entries.forget(key)

        # Some answers go through the scheduler, which does not report when they have arrived.
        asyncio.get_running_loop().call_later(_DELIVERY_S, look_again)

    def _remember(self, key: Any, value: object, published: Published, run: int | None) -> None:
        if not self._entries.is_in_memory(key, value):
            return
        entry = self._entries.find_or_add(key)
        if entry is not None and entry.value is value:
            if published is not entry.published:
                entry.published, entry.is_adopted = published, False
                entry.is_private |= published.has_overlaps
            entry.is_verified = entry.run == run
            self._kept.note(key, value, published.blocks)

    async def _still_holds(self, published: Published, serialized: Serialized) -> bool:
        try:
            return bool(await call_in(self._threads, codec.still_holds, published, serialized, self._arena))
        except (SharedMemoryError, OSError, MemoryError, RuntimeError):
            # They cannot be compared. Publishing again is always correct, and copies nothing that lies in the arena.
            return False

    async def _offer(self, key: Any, known: int) -> None:
        entry = self._entries.find_or_add(key)
        if entry is None:
            return
        for _ in RETRY_PAUSES_S:
            # A value that something else reaches is not published now: each answer would have to serialize it again.
            if not await self._adopter.is_alone_soon(entry, known):
                return
            await self.publish(key, entry.value, functools.partial(_serialize_unasked, entry.value), is_wanted=False)
            if entry.published is None:
                if not entry.asks and self._entries.is_current(key, entry):
                    self._entries.forget(key)
                return
            await self._adopter.settle(key, entry, known)
            if entry.is_listed or not self._entries.is_current(key, entry):
                return

    # -- threads and tasks

    def _land(self, key: Any, flight: _Flight, task: asyncio.Task[Any]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not task.cancelled():
            task.exception()

    def _soon(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(_logged(work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


async def _logged(work: Awaitable[None]) -> None:
    try:
        await work
    except Exception:
        logger.debug("a value is not published, or keeps its private copy", exc_info=True)


async def _serialize_unasked(value: object) -> Serialized:
    """Serialize a value for no connection in particular, before any process has requested it."""
    return await codec.where_dask_would(True, Serialized.of, value, {})
