"""List published values in the arena's directory, by the address of their worker and their key."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.node import membership
from dask_shm_plugin.table.layout import PLACE_BYTES
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.values.handles import Handle

_PLAIN = (str, bytes, int, float)


class PublishedIndex:
    """The published values that one worker lists, so that other processes find them without a request.

    Parameters
    ----------
    arena
        The arena that has the directory.
    address
        The address at which other processes would request data from the worker.
    """

    def __init__(self, arena: Arena, address: str) -> None:
        self._arena, self._address = arena, address
        # The name under which each key was listed. Equal keys, such as 1 and 1.0, have different names.
        self._listed: dict[Any, bytes] = {}

    def add(self, key: Any, handle: Handle) -> None:
        """List the handle of a key, unless the directory has no room for it."""
        name = name_of(self._address, key)
        if name is not None and self._arena.directory.add(name, handle.to_bytes()):
            self._listed[key] = name

    def remove(self, key: Any) -> None:
        """Withdraw the listing of a key: no process finds it after this returns; harmless if it is not listed."""
        name = self._listed.get(key)
        if name is not None:
            # The directory comes first: an interrupt between the two steps must not leave a listing that can be found.
            self._arena.directory.remove(name)
            self._listed.pop(key, None)

    def clear(self) -> None:
        """Withdraw all listings."""
        for key in list(self._listed):
            self.remove(key)

    def __repr__(self) -> str:
        return f"<PublishedIndex of {self._address}, {len(self._listed)} values>"


def find(address: str, keys: Any) -> dict[Any, Handle]:
    """Return the handles of those keys that a worker has listed: those that it would send now if it were asked."""
    return {key: handle for arena in membership.all_arenas() for key, handle in _find(arena, address, keys)}


LANDED = "landed"
"""Takes the place of the address where a value that came from another node is listed, before any worker stores it."""
SENT = "sent"
"""Takes its place where a value is listed that was sent to another node, even if its owner may have changed it since."""


def find_at_home(arena: Arena, keys: Iterable[Any]) -> list[Handle]:
    """Return the handles of some keys that any member of an arena has listed; they may be of several versions.

    Only a worker that has the value under its key can tell which version is the present one.
    """
    found: list[Handle] = []
    with contextlib.suppress(Exception):  # see `_find`
        for data in _listed_at_home(arena, keys):
            with contextlib.suppress(Exception):  # one of another form does not hide the others
                found.append(Handle.from_bytes(arena.arena_id, data))
    return found


def _listed_at_home(arena: Arena, keys: Iterable[Any]) -> set[bytes]:
    directory, workers = arena.directory, {} if arena.is_damaged else arena.roster.workers()
    listing = {
        address: here
        for address, members in workers.items()
        if (here := [member for member in members if not directory.is_empty(member)])
    }
    everyone = [member for here in listing.values() for member in here]
    found: set[bytes] = set()
    for key in filter(_is_plain, keys if listing else ()):
        text = repr(key)
        for place in (LANDED, SENT):
            found.update(directory.find_among(everyone, _name(place, text)))
        for address, here in listing.items():
            found.update(directory.find_among(here, _name(address, text)))
    return found


_SPAN_BYTES, _OTHER_BYTES = 40, 160
"""Bytes of a listed handle, at most, for each part of the value that lies in a block, and for all other fields."""


def is_listable(handle: Handle) -> bool:
    """Return whether a handle has a place in a directory, on each node on which its value may land."""
    parts = sum(len(part) if isinstance(part, bytes) else _SPAN_BYTES for part in handle.parts)
    return len(handle.header) + parts + _OTHER_BYTES <= PLACE_BYTES


def _find(arena: Arena, address: str, keys: Any) -> list[tuple[Any, Handle]]:
    found = []
    try:
        members = [] if arena.is_damaged else arena.roster.workers_at(address)
        # Skips members without listings: looking up each of thousands of small values took 2.5 µs (November 2026).
        workers = [member for member in members if not arena.directory.is_empty(member)]
        for key in keys if workers else ():
            data = _first(arena, workers, name_of(address, key))
            if data is not None:
                found.append((key, Handle.from_bytes(arena.arena_id, data)))
    except Exception:
        # After any error, the worker can still be asked. Raising here would keep a task waiting for ever
        # (distributed#6705).
        return []
    return found


def _first(arena: Arena, workers: list[Member], name: bytes | None) -> bytes | None:
    return None if name is None else next(arena.directory.find_among(workers, name), None)


def name_of(address: str, key: Any) -> bytes | None:
    """Return a name that is unique to the address and key, or None for a key of an unusual type."""
    return _name(address, repr(key)) if _is_plain(key) else None


def _name(address: str, text: str) -> bytes:
    return f"{address} {text}".encode()


def _is_plain(key: Any) -> bool:
    return type(key) in _PLAIN or (type(key) is tuple and all(map(_is_plain, key)))
