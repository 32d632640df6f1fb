"""Watch the values that a worker has in memory: each value that is handed out, replaced or dropped is reported.

All code that reads, writes or drops a worker's value by its key does so through one mapping: Dask for a task, an
answer or an actor, and a user through ``worker.data``. Here that mapping is replaced by one that reports each access,
so none goes unnoticed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, ItemsView, Iterator, Mapping, MutableMapping, ValuesView
from types import SimpleNamespace
from typing import Any, Protocol

import zict
from distributed.spill import SpillBuffer

from dask_shm_plugin.seams.replacement import Replacement


class Note(Protocol):
    """An object that is told when the value of a key is handed out."""

    def handed_out(self) -> None:
        """Note that the value is handed out; called in the reader's thread, before the reader has the value."""


class WatchedMapping(MutableMapping[Any, Any]):
    """A mapping over a dict that reports each value that it hands out.

    Parameters
    ----------
    raw
        The dict that holds the values.

    Attributes
    ----------
    notes
        For each key that is watched, the object that is told when its value is handed out.
    changes
        Called with a key and its new value, before and after the value is stored. Called with only the key, before and
        after its value is dropped.

    Notes
    -----
    As thread-safe as a dict. A reader takes the value before it reports. So code that begins to watch, and counts the
    references after that, misses no reader.
    """

    def __init__(self, raw: dict[Any, Any]) -> None:
        self.raw = raw
        self.notes: Mapping[Any, Note] = {}
        self.changes: Callable[..., None] = _ignore

    def __getitem__(self, key: Any) -> Any:
        while True:
            value = self.raw[key]
            note = self.notes.get(key)
            if note is None:
                return value
            note.handed_out()
            # The value, or the note, may have been replaced before the report. Then the new one is taken and reported.
            if self.raw.get(key) is value and self.notes.get(key) is note:
                return value

    def __setitem__(self, key: Any, value: Any) -> None:
        self.changes(key, value)
        self.raw[key] = value
        self.changes(key, value)

    def __delitem__(self, key: Any) -> None:
        self.changes(key)
        del self.raw[key]
        self.changes(key)

    def __contains__(self, key: object) -> bool:
        return key in self.raw

    def __iter__(self) -> Iterator[Any]:
        return iter(self.raw)

    def __len__(self) -> int:
        return len(self.raw)

    def __reversed__(self) -> Iterator[Any]:
        return iter(reversed(self.raw))

    # Methods of a dict that a MutableMapping lacks or defines differently: without the plugin, this may be a dict.

    def values(self) -> ValuesView[Any]:
        """Return a view of the values; each value is reported when the iteration reaches it."""
        return _Values(self)

    def items(self) -> ItemsView[Any, Any]:
        """Return a view of the items; each value is reported when the iteration reaches it."""
        return _Items(self)

    def popitem(self) -> tuple[Any, Any]:
        """Remove and return the last item."""
        key = next(reversed(self.raw), None)
        if key not in self.raw:
            raise KeyError("the mapping is empty")
        return key, self.pop(key)

    def clear(self) -> None:
        """Drop all values."""
        for key in list(self.raw):
            del self[key]

    def copy(self) -> dict[Any, Any]:
        """Return a dict of the same values, as ``dict.copy`` does."""
        return dict(self.items())

    def __or__(self, other: Any) -> dict[Any, Any]:
        return self.copy() | dict(other)

    def __ror__(self, other: Any) -> dict[Any, Any]:
        return dict(other) | self.copy()

    def __ior__(self, other: Any) -> WatchedMapping:
        self.update(other)
        return self

    def __reduce__(self) -> Any:
        return dict, (self.copy(),)

    def __repr__(self) -> str:
        return f"<WatchedMapping of {len(self.raw)} values>"


class _Values(ValuesView[Any]):
    """A view of values that allows changes of the mapping during the iteration."""

    _mapping: WatchedMapping

    def __iter__(self) -> Iterator[Any]:
        return (value for _, value in _Items(self._mapping))


class _Items(ItemsView[Any, Any]):
    """A view of items that allows changes of the mapping during the iteration."""

    _mapping: WatchedMapping

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for key in list(self._mapping.raw):
            with contextlib.suppress(KeyError):
                yield key, self._mapping[key]


class WorkerData:
    """The values of one worker, watched if that is possible.

    Parameters
    ----------
    mapping
        The mapping that the worker reads and writes.
    owners
        The objects with this mapping as their attribute ``data``, if nothing else refers to it. It is replaced there.

    Notes
    -----
    Dask's own `SpillBuffer` is watched, and a dict that Dask has made. A mapping that a user has passed as ``data=``
    is not watched, because it may be read without this class.
    """

    def __init__(self, mapping: Any, owners: tuple[Any, ...] = ()) -> None:
        self._mapping = mapping
        self._replaced: list[Replacement] = []
        self._watched: WatchedMapping | None = None
        if _is_dasks_buffer(mapping):
            self._watched = WatchedMapping(mapping.fast.d)
            self._replaced = [Replacement(mapping.fast, "d", self._watched)]
        elif type(mapping) is dict and owners:
            self._mapping = self._watched = WatchedMapping(mapping)
            self._replaced = [Replacement(owner, "data", self._watched) for owner in owners]

    @classmethod
    def of(cls, worker: Any) -> WorkerData:
        """Watch the values of a worker until :meth:`stop`."""
        owners = worker.memory_manager, worker.state
        # If the dict has no more references than one that only two attributes refer to, no user has it.
        like = [SimpleNamespace(data={})]
        like.append(SimpleNamespace(data=like[0].data))
        is_dasks = sys.getrefcount(owners[0].data) == sys.getrefcount(like[0].data)
        return cls(worker.data, owners if is_dasks else ())

    def watch(self, notes: Mapping[Any, Note], changes: Callable[..., None]) -> None:
        """Report to these objects from now on; see :class:`WatchedMapping`."""
        if self._watched is not None:
            self._watched.notes, self._watched.changes = notes, changes

    def in_memory(self, key: Any) -> Any:
        """Return the value of a key, or None if it is not in memory or not watched; reports nothing."""
        return None if self._watched is None else self._watched.raw.get(key)

    def swap(self, key: Any, value: object) -> None:
        """Replace the value of a key that is in memory, at once and without a report."""
        if self._watched is not None:
            self._watched.raw[key] = value

    def store(self, key: Any, value: object) -> None:
        """Store a value as the worker does: it is weighed, and may be spilled."""
        self._mapping[key] = value

    def stop(self) -> None:
        """Stop watching, and put the original mappings back."""
        self.watch({}, _ignore)
        for replacement in self._replaced:
            replacement.undo()
        self._replaced.clear()
        self._watched = None

    def __repr__(self) -> str:
        return f"<WorkerData {self._watched or 'not watched'}>"


def _is_dasks_buffer(mapping: Any) -> bool:
    """Return whether a mapping is Dask's own SpillBuffer, and only its own parts refer to its in-memory dict."""
    if type(mapping) is not SpillBuffer or type(mapping.fast) is not zict.LRU or type(mapping.fast.d) is not dict:
        return False
    like: zict.LRU[Any, Any] = zict.LRU(1, {})
    return sys.getrefcount(mapping.fast.d) == sys.getrefcount(like.d)


def _ignore(key: Any, *value: Any) -> None:
    """Do nothing about a change."""
