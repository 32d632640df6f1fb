"""The values that a worker has in memory, by key, and who is told when one is handed out, replaced or dropped.

Whatever reads a value of a worker, be it Dask for a task, an answer or an actor, or a user through ``worker.data``, reads a
mapping; so does whatever writes or drops one. That mapping is replaced by one that tells. Nothing reaches a value by its
key without being noticed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, ItemsView, Iterator, Mapping, MutableMapping, ValuesView
from types import SimpleNamespace
from typing import Any, Protocol

import zict
from distributed.spill import SpillBuffer

from dask_shm_plugin.seams import Replacement


class Note(Protocol):
    """Somebody who wants to know when the value of a key is handed out."""

    def handed_out(self) -> None:
        """Take note, before whoever reads has the value. Called in the reader's thread."""


class WatchedMapping(MutableMapping[Any, Any]):
    """A dict that tells of each value that it hands out.

    Parameters
    ----------
    raw
        The dict in which the values are.

    Attributes
    ----------
    notes
        By key, who is told when its value is handed out.
    changes
        Called with a key before it gets a value and after that, or with the key and nothing else when it is dropped.

    Notes
    -----
    Thread-safe as a dict is. A reader takes the value first and tells then: so who begins to watch, and counts the
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
            # Another one may have taken its place before that was told, or to somebody else.
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

    # What a dict has that a mapping has not: a user may have had one here.

    def values(self) -> ValuesView[Any]:
        """Return the values; each tells when it is come to."""
        return _Values(self)

    def items(self) -> ItemsView[Any, Any]:
        """Return keys and values; each tells when it is come to."""
        return _Items(self)

    def popitem(self) -> tuple[Any, Any]:
        """Drop the last one."""
        key = next(reversed(self.raw), None)
        if key not in self.raw:
            raise KeyError("there are no values")
        return key, self.pop(key)

    def clear(self) -> None:
        """Drop all."""
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
    """Values that may come and go meanwhile."""

    _mapping: WatchedMapping

    def __iter__(self) -> Iterator[Any]:
        return (value for _, value in _Items(self._mapping))


class _Items(ItemsView[Any, Any]):
    """Keys and values that may come and go meanwhile."""

    _mapping: WatchedMapping

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for key in list(self._mapping.raw):
            with contextlib.suppress(KeyError):
                yield key, self._mapping[key]


class WorkerData:
    """The data of one worker.

    Parameters
    ----------
    mapping
        What the worker reads and writes.
    owners
        Objects that have a mapping in their attribute ``data``, if nothing else has it: it can be replaced there.

    Notes
    -----
    Dask's own `SpillBuffer` is watched, and a dict that Dask has made. What a user gave as ``data=`` may be read past us:
    of such a mapping nothing is known but what it returns.
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
        """Watch the data of a worker until :meth:`stop`."""
        owners = worker.memory_manager, worker.state
        # As many references as a dict has that is in two attributes and nowhere else: no user has it.
        like = [SimpleNamespace(data={})]
        like.append(SimpleNamespace(data=like[0].data))
        is_dasks = sys.getrefcount(owners[0].data) == sys.getrefcount(like[0].data)
        return cls(worker.data, owners if is_dasks else ())

    @property
    def is_watched(self) -> bool:
        """Whether each hand-out is noticed."""
        return self._watched is not None

    def watch(self, notes: Mapping[Any, Note], changes: Callable[..., None]) -> None:
        """Tell these from now on; see :class:`WatchedMapping`."""
        if self._watched is not None:
            self._watched.notes, self._watched.changes = notes, changes

    def in_memory(self, key: Any) -> Any:
        """Return the value of a key, or None where it is not in memory or not watched; hands nothing out."""
        return None if self._watched is None else self._watched.raw.get(key)

    def swap(self, key: Any, value: object) -> None:
        """Let a key that is in memory have another value at once; nobody is told."""
        if self._watched is not None:
            self._watched.raw[key] = value

    def store(self, key: Any, value: object) -> None:
        """Give a key a value, as the worker does: it is weighed, and may be spilled."""
        self._mapping[key] = value

    def stop(self) -> None:
        """Put everything back."""
        self.watch({}, _ignore)
        for replacement in self._replaced:
            replacement.undo()
        self._replaced.clear()
        self._watched = None

    def __repr__(self) -> str:
        return f"<WorkerData {self._watched or 'not watched'}>"


def _is_dasks_buffer(mapping: Any) -> bool:
    """Tell whether a mapping is Dask's own, and nobody but its own parts has what it keeps in memory."""
    if type(mapping) is not SpillBuffer or type(mapping.fast) is not zict.LRU or type(mapping.fast.d) is not dict:
        return False
    like: zict.LRU[Any, Any] = zict.LRU(1, {})
    return sys.getrefcount(mapping.fast.d) == sys.getrefcount(like.d)


def _ignore(key: Any, *value: Any) -> None:
    """Do nothing about a change."""
