"""What one worker has published: a value is copied once, however many ask, and stays while the worker holds its key."""

from __future__ import annotations

import asyncio
import functools
import logging
import weakref
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from dask_shm_plugin import adoption, codec, handles, notices, writers
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.codec import Published, Serialized
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.entries import Ask, Entry
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.handles import Handle
from dask_shm_plugin.listings import Listings
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.threads import call_in
from dask_shm_plugin.worker_data import WorkerData

logger = logging.getLogger("dask_shm_plugin")

Serialize = Callable[[], Awaitable[Serialized]]
"""Serializes a value, once, where Dask would."""

_PAUSES = (0.0, 1e-3, 1e-2)
"""Seconds after which a value is looked at again: threads that have ended may have a reference for a moment longer."""

_ON_THE_WAY = 1.0
"""Seconds for which, at least, a handle finds what it names; whoever comes later asks again for bytes."""


class _Flight(NamedTuple):
    """A publication under way, for exactly this value, as it was when it began."""

    value: object
    task: asyncio.Task[Published | Serialized]
    entry: Entry | None
    run: int | None

    def is_of(self, value: object) -> bool:
        """Tell whether this is what would be published now."""
        is_intact = self.entry is not None and self.entry.is_intact and self.entry.run == self.run
        return self.value is value and is_intact


class Publisher:
    """The publications of one worker.

    Parameters
    ----------
    arena
        Where to.
    threshold
        Bytes of serialized frames from which a value is shared.
    data
        The worker's values.
    address
        Where others ask for them.

    Notes
    -----
    Lives on the worker's event loop; copying happens in threads. An entry goes in the same moment in which the worker
    lets the key go, replaces or spills its value. There must never be a moment when an entry answers for another value:
    it holds the value itself and compares identity. Nor may there be one when a copy stands for a value that somebody
    has had the chance to change since: it is adopted and listed only while nothing else reaches the value, from before
    it was serialized until after it was copied (`writers`, `worker_data`).
    """

    def __init__(self, arena: Arena, threshold: int, data: WorkerData, address: str) -> None:
        self._arena, self._threshold, self._data = arena, threshold, data
        self._listings = Listings(arena, address)
        self._entries: dict[Any, Entry] = {}
        self._adopting: dict[Any, Entry] = {}
        self._flights: dict[Any, _Flight] = {}
        self._turns: weakref.WeakValueDictionary[Any, asyncio.Lock] = weakref.WeakValueDictionary()
        self._background: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="dask-shm-copy")
        data.watch(self._entries, self._changed)

    # -- answers

    def ask(self, keys: Collection[Any]) -> Ask:
        """Take note that an answer is about to read some large values, and whether anything else reaches them now."""
        found = {key: entry for key in keys if (entry := self._entry(key)) is not None}
        for entry in found.values():
            self._look(entry)
        return Ask(found)

    async def publish(
        self, key: Any, value: object, serialize: Serialize, *, is_wanted: bool = True
    ) -> Published | Serialized:
        """Publish the value of a key, unless that was done.

        Parameters
        ----------
        key, value
            As they are in the worker's data.
        serialize
            Called at most once.
        is_wanted
            Whether somebody waits for it.

        Returns
        -------
        Published
            Whose handle others can resolve, as long as the caller keeps it.
        Serialized
            It is to be sent as bytes, to this asker alone.

        Raises
        ------
        Exception
            It cannot be serialized.
        """
        flight = self._flights.get(key)
        if flight is None or not flight.is_of(value):
            entry = self._entry_of(key, value)
            task = asyncio.create_task(self._publish(key, value, serialize, is_wanted=is_wanted))
            flight = _Flight(value, task, entry, entry.run if entry is not None else None)
            self._flights[key] = flight
            flight.task.add_done_callback(functools.partial(self._land, key, flight))
            is_own = True
        else:
            is_own = False
        # One asker that goes away must not take the others' publication along.
        outcome = await asyncio.shield(flight.task)
        if isinstance(outcome, Serialized) and outcome.is_personal and not is_own:
            return await serialize()
        return outcome

    def answered(self, ask: Ask) -> None:
        """Take note that an answer is over: what nothing else reaches is listed, and given up for the shared copy."""
        entries = list(ask.entries.items())
        ask.entries.clear()  # what failed may be kept by a log, and would keep the values
        for _, entry in entries:
            entry.asks -= 1
        for key, entry in entries:
            if entry.published is not None:
                # Others may look for it at once: they need not wait until it is adopted.
                if self._look(entry):
                    self._list(key, entry)
                self._soon(self._settle(key, entry))
            elif not entry.asks and self._entries.get(key) is entry and key not in self._flights:
                self.forget(key)

    # -- without being asked

    def offer(
        self, key: Any, serialize: Callable[[object], Awaitable[Serialized]], known: int = 0
    ) -> asyncio.Task[None]:
        """Publish and list the value of a key, soon, if nothing else reaches it.

        Parameters
        ----------
        key
            In the worker's data.
        serialize
            Serializes the value that it is given, where Dask would.
        known
            References to the value that the caller keeps until the task that is returned is done.
        """
        return self._soon(self._offer(key, serialize, known))

    def forget(self, key: Any) -> None:
        """Drop what was published of a key. Any thread may call this."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            entry.close()

    def prune(self, serialize: Callable[[object], Awaitable[Serialized]]) -> None:
        """Let no value keep two copies for ever.

        A shared copy beside a private one goes where nobody else has referred to it since the last call. The private one
        goes where it could not be adopted yet, and nothing else reaches it now: nobody may ask for it any more.
        """
        for key, entry in list(self._entries.items()):
            if entry.asks or entry.is_settling:
                continue
            if entry.published is None:
                self.offer(key, serialize)
                continue
            is_idle = not entry.is_adopted and not entry.published.is_used_elsewhere
            if is_idle and entry.is_idle:
                self.forget(key)
            elif is_idle != entry.is_idle:
                entry.is_idle = is_idle
            elif entry.published.copied and not entry.is_adopted and not entry.is_private:
                self.offer(key, serialize)

    def close(self) -> None:
        """Drop everything; views stay valid. What is under way is answered, but neither remembered nor listed."""
        self._is_closed = True
        self._data.stop()
        for key in list(self._entries):
            self.forget(key)
        self._listings.clear()
        self._threads.shutdown(wait=False)

    def __repr__(self) -> str:
        published = sum(entry.published is not None for entry in self._entries.values())
        return f"<Publisher {published} published, {len(self._flights)} under way>"

    # -- entries

    def _entry(self, key: Any) -> Entry | None:
        """Return what is known of a value that is in memory."""
        entry = self._entries.get(key)
        if entry is None and not self._is_closed and self._data.in_memory(key) is not None:
            # Readers are counted from here on, and references later.
            entry = self._entries[key] = Entry(
                self._data.in_memory(key), functools.partial(self._listings.cross_out, key)
            )
        return entry

    def _changed(self, key: Any, *value: object) -> None:
        """Take note that a key gets a value, or is dropped. Any thread may call this."""
        adopted = self._adopting.get(key)
        if adopted is None or (value and adopted.value is not value[0]):
            self.forget(key)

    def _look(self, entry: Entry, known: int = 0) -> bool:
        """Tell whether a value is alone, and take note if it has not been."""
        if entry.is_listed:
            return True
        reads = entry.reads
        # Known are the reference of the worker's data, and that of the entry.
        is_alone = writers.is_alone([entry.value], 2 + known)
        if is_alone and not entry.is_intact:
            entry.begin(reads)
        return is_alone

    # -- publishing

    async def _publish(
        self, key: Any, value: object, serialize: Serialize, *, is_wanted: bool
    ) -> Published | Serialized:
        entry = self._entry_of(key, value)
        run = entry.run if entry is not None else None
        if entry is not None and entry.published is not None and entry.is_intact and entry.is_verified:
            return entry.published
        serialized = await serialize()
        if serialized.size < self._threshold or serialized.is_personal:
            return serialized
        if serialized.is_copied_by_readers and not is_wanted:
            return serialized
        # Others may have the same in hand: where it has not changed, theirs will do.
        turn = self._turns.setdefault(key, asyncio.Lock())
        async with turn:
            entry = self._entry_of(key, value)
            published = entry.published if entry is not None else None
            if published is None or not await self._still_holds(published, serialized):
                try:
                    published = await self._in_thread(codec.publish, serialized, self._arena)
                except (SharedMemoryError, OSError, MemoryError, RuntimeError) as error:  # the last one: it is closed
                    notices.refused(error, serialized.size)
                    return serialized
                if published.copied:
                    COUNTERS.count("published", published.copied)
            self._remember(key, value, published, run)
        if serialized.is_copied_by_readers:
            self._forget_soon(key, published)
        return published

    def _forget_soon(self, key: Any, published: Published) -> None:
        """Forget what was published when nobody is on the way to it: its owner and each reader have a copy of their own."""

        def look_again() -> None:
            entry = self._entries.get(key)
            if entry is not None and entry.published is published:
                if entry.asks or published.is_used_elsewhere:
                    self._forget_soon(key, published)
                else:
                    self.forget(key)

        # The scheduler hands answers on, and does not say when they have arrived.
        asyncio.get_running_loop().call_later(_ON_THE_WAY, look_again)

    def _entry_of(self, key: Any, value: object) -> Entry | None:
        """Return what is known of this very value."""
        entry = self._entries.get(key)
        return entry if entry is not None and entry.value is value else None

    def _remember(self, key: Any, value: object, published: Published, run: int | None) -> None:
        if self._is_closed or self._data.in_memory(key) is not value:
            return
        entry = self._entry(key)
        if entry is not None and entry.value is value:
            if published is not entry.published:
                entry.published, entry.is_adopted = published, False
                entry.is_private |= published.has_overlaps
            entry.is_verified = entry.run == run

    async def _still_holds(self, published: Published, serialized: Serialized) -> bool:
        try:
            return bool(await self._in_thread(codec.still_holds, published, serialized, self._arena))
        except (SharedMemoryError, OSError, MemoryError, RuntimeError):
            # It cannot be looked at: published anew it is right in any case, and costs nothing where it lies in the arena.
            return False

    async def _offer(self, key: Any, serialize: Callable[[object], Awaitable[Serialized]], known: int) -> None:
        entry = self._entry(key)
        if entry is None:
            return
        for _ in _PAUSES:
            # What something else reaches would have to be serialized again for each answer.
            if not await self._is_alone_soon(entry, known):
                return
            await self.publish(key, entry.value, functools.partial(serialize, entry.value), is_wanted=False)
            if entry.published is None:
                if not entry.asks and self._entries.get(key) is entry:
                    self.forget(key)
                return
            await self._settle(key, entry, known)
            if entry.is_listed or self._entries.get(key) is not entry:
                return

    async def _settle(self, key: Any, entry: Entry, known: int = 0) -> None:
        """Adopt and list a value, if nothing else reaches it and what was published is what it is now."""
        if entry.is_settling:
            return
        entry.is_settling = True
        try:
            if await self._is_settled(key, entry, known):
                if not (entry.is_adopted or entry.is_private) and entry.published and entry.published.copied:
                    entry = await self._adopt(key, entry, known)
                self._list(key, entry)
        finally:
            entry.is_settling = False

    async def _is_settled(self, key: Any, entry: Entry, known: int) -> bool:
        return (
            await self._is_alone_soon(entry, known)
            and entry.is_intact
            and entry.is_verified
            and self._entries.get(key) is entry
            and self._data.in_memory(key) is entry.value
        )

    async def _is_alone_soon(self, entry: Entry, known: int) -> bool:
        for pause in _PAUSES:
            if self._look(entry, known):
                return True
            if entry.asks:
                return False
            await asyncio.sleep(pause)
        return False

    @step("adopt")
    async def _adopt(self, key: Any, entry: Entry, known: int) -> Entry:
        """Give the private copy up for the shared one, if nobody can tell the difference; return the entry."""
        published = entry.published
        if published is None or not adoption.may_adopt(entry.value):
            entry.is_private = True
            return entry
        shared = await self._in_thread(_rebuild, published.handle)
        if shared is None or not adoption.is_faithful(shared, entry.value):
            entry.is_private = True
            return entry
        adopted = Entry(shared, functools.partial(self._listings.cross_out, key))
        adopted.published, adopted.is_adopted = published, True
        adopted.begin(0, is_verified=True)
        # While the thread was at work the key may have been released, replaced, spilled, read, or published anew.
        if not await self._is_settled(key, entry, known) or entry.published is not published:
            return entry
        self._adopting[key] = adopted
        try:
            if not entry.give_way(lambda: self._swap(key, adopted)):
                return entry
            entry.close()
            if self._data.in_memory(key) is shared:
                self._data.store(key, shared)
        finally:
            del self._adopting[key]
        if self._data.in_memory(key) is shared:
            COUNTERS.count("adopted", published.handle.size)
        else:  # spilled at once
            self.forget(key)
        return adopted

    def _swap(self, key: Any, adopted: Entry) -> None:
        # In this order: who has the new value by then, and has told of the old one, tells again.
        self._data.swap(key, adopted.value)
        self._entries[key] = adopted

    def _list(self, key: Any, entry: Entry) -> None:
        is_same = self._entries.get(key) is entry and self._data.in_memory(key) is entry.value
        if is_same and entry.published is not None and not self._is_closed:
            entry.list(functools.partial(self._listings.enter, key, entry.published.handle))

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

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await call_in(self._threads, function, *args)


async def _logged(work: Awaitable[None]) -> None:
    try:
        await work
    except Exception:
        logger.debug("a value is not published, or keeps its private copy", exc_info=True)


def _rebuild(handle: Handle) -> object | None:
    shared: object | None = None
    try:
        shared = handles.resolve(handle)
        shared = shared if codec.is_shared(shared) else None
    except SharedMemoryError as error:
        notices.kept_private(error)
    except Exception:
        logger.debug("a published value keeps its private copy", exc_info=True)
    return shared
