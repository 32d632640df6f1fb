"""Keep track of which values of a worker are published, and which of them may be listed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Protocol

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.seams.worker_data import WorkerData
from dask_shm_plugin.transfer.entry import Entry
from dask_shm_plugin.values import aliases
from dask_shm_plugin.values.codec import Published
from dask_shm_plugin.values.handles import Handle
from dask_shm_plugin.values.index import SENT, PublishedIndex


class Listener(Protocol):
    """Is told which values other processes can find without a request."""

    def published(self, key: Any, size: int) -> None:
        """Note that a value of ``size`` bytes is listed."""

    def withdrawn(self, key: Any) -> None:
        """Note that a value is not published any more. Any thread may call this."""


class Entries:
    """The :class:`Entry` of each value of one worker that is published or about to be, by key.

    Parameters
    ----------
    arena
        The arena that lists the values in its directory.
    data
        The values of the worker.
    address
        The address at which other processes request data from the worker.
    listener
        Is told of each value that is listed or forgotten.

    Notes
    -----
    To be used on the worker's event loop; any thread may call :meth:`forget`. An entry is dropped in the same moment in
    which the worker releases, replaces or spills its value. There must never be a moment when an entry answers for
    another value: it holds the value itself and compares identity.
    """

    def __init__(self, arena: Arena, data: WorkerData, address: str, listener: Listener | None = None) -> None:
        self._listener = listener
        self._data = data
        self._index = PublishedIndex(arena, address)
        self._sent = PublishedIndex(arena, SENT)
        self._entries: dict[Any, Entry] = {}
        self._adopting: dict[Any, Entry] = {}
        self._is_closed = False
        data.watch(self._entries, self._changed)

    def get(self, key: Any) -> Entry | None:
        """Return the entry of a key, if there is one."""
        return self._entries.get(key)

    def find(self, key: Any, value: object) -> Entry | None:
        """Return the entry of this very value, if there is one."""
        entry = self._entries.get(key)
        return entry if entry is not None and entry.value is value else None

    def find_or_add(self, key: Any) -> Entry | None:
        """Return the entry of a key; create it if it is missing and the key's value is in memory."""
        entry = self._entries.get(key)
        if entry is None and not self._is_closed and self._data.in_memory(key) is not None:
            # The entry counts reads from here on. References are counted after that, so no reader is missed.
            entry = self._entries[key] = self._new(key, self._data.in_memory(key))
        return entry

    def is_current(self, key: Any, entry: Entry) -> bool:
        """Return whether an entry is the present one of its key."""
        return self._entries.get(key) is entry

    def is_in_memory(self, key: Any, value: object) -> bool:
        """Return whether a key has this very value in memory, and the entries are not closed."""
        return not self._is_closed and self._data.in_memory(key) is value

    def look(self, entry: Entry, known: int = 0) -> bool:
        """Return whether nothing else reaches a value; if so, its entry is intact from now until the next read.

        Parameters
        ----------
        entry
            The entry of the value.
        known
            The number of references to the value that the caller holds.
        """
        if entry.is_listed:
            return True
        reads = entry.reads
        # Two references are always known: those of the worker's data and of the entry.
        is_alone = aliases.is_alone([entry.value], 2 + known)
        if is_alone and not entry.is_intact:
            entry.begin(reads)
        return is_alone

    def list(self, key: Any, entry: Entry) -> None:
        """List a published value, so that other processes find it without a request, if its entry is current."""
        is_same = self.is_current(key, entry) and self.is_in_memory(key, entry.value)
        if is_same and entry.published is not None:
            entry.list(functools.partial(self._add_listing, key, entry.published.handle))

    def list_as_sent(self, key: Any, published: Published) -> None:
        """List a value that is sent to another node: if its version comes back from there, this copy is taken.

        Unlike :meth:`list`, this does not say that the worker would send the same now.
        """
        self._sent.add(key, published.handle)
        entry = self._entries.get(key)
        if entry is None or entry.published is not published:
            self._sent.remove(key)

    def _add_listing(self, key: Any, handle: Handle) -> None:
        self._index.add(key, handle)
        if self._listener is not None:
            self._listener.published(key, handle.size)

    def adopt(self, key: Any, entry: Entry, shared: object) -> Entry | None:
        """Replace a private copy by the shared one; return the new entry, or None if the value was read meanwhile."""
        adopted = self._new(key, shared)
        adopted.published, adopted.is_adopted = entry.published, True
        adopted.begin(0, is_verified=True)
        self._adopting[key] = adopted
        try:
            if not entry.give_way(lambda: self._swap(key, adopted)):
                return None
            entry.close()
            if self._data.in_memory(key) is shared:
                self._data.store(key, shared)
        finally:
            del self._adopting[key]
        if self._data.in_memory(key) is not shared:  # storing it has spilled it at once
            self.forget(key)
        return adopted

    def forget(self, key: Any) -> None:
        """Drop the entry of a key. Any thread may call this."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            entry.close()
            self._sent.remove(key)
            if self._listener is not None:
                self._listener.withdrawn(key)

    def close(self) -> None:
        """Drop all entries; no value is added or listed any more."""
        self._is_closed = True
        self._data.stop()
        for key in list(self._entries):
            self.forget(key)
        self._index.clear()
        self._sent.clear()

    def __iter__(self) -> Iterator[tuple[Any, Entry]]:
        return iter(list(self._entries.items()))

    def __len__(self) -> int:
        return len(self._entries)

    def _new(self, key: Any, value: object) -> Entry:
        return Entry(value, functools.partial(self._index.remove, key))

    def _swap(self, key: Any, adopted: Entry) -> None:
        # The data come first: a reader that takes the new value and reports to the old entry then finds the new entry,
        # and reports again.
        self._data.swap(key, adopted.value)
        self._entries[key] = adopted

    def _changed(self, key: Any, *value: object) -> None:
        """Forget a key that gets another value, or is dropped. Any thread may call this."""
        adopted = self._adopting.get(key)
        if adopted is None or (value and adopted.value is not value[0]):
            self.forget(key)
