"""Published values in the directory of the arena, by the address of the worker that has them and their key."""

from __future__ import annotations

from typing import Any

from dask_shm_plugin import membership
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.handles import Handle
from dask_shm_plugin.memberbook import Member

_PLAIN = (str, bytes, int, float)


class Listings:
    """What one worker lists.

    Parameters
    ----------
    arena
        Where.
    address
        Of the worker, as those know it who would ask it.
    """

    def __init__(self, arena: Arena, address: str) -> None:
        self._arena, self._address = arena, address
        # The names as they were entered: keys that are equal, like 1 and 1.0, have different ones.
        self._listed: dict[Any, bytes] = {}

    def enter(self, key: Any, handle: Handle) -> None:
        """Let others find the value of a key, unless there is no room."""
        name = _name(self._address, key)
        if name is not None and self._arena.directory.enter(name, handle.to_bytes()):
            self._listed[key] = name

    def cross_out(self, key: Any) -> None:
        """Let nobody find it any more, from this moment on; harmless when it is not listed."""
        name = self._listed.get(key)
        if name is not None:
            # First there, for an interrupt between the two must leave nothing that can be found.
            self._arena.directory.cross_out(name)
            self._listed.pop(key, None)

    def clear(self) -> None:
        """Let nobody find anything any more."""
        for key in list(self._listed):
            self.cross_out(key)

    def __repr__(self) -> str:
        return f"<Listings of {self._address}, {len(self._listed)} values>"


def find(address: str, keys: Any) -> dict[Any, Handle]:
    """Return handles of those keys that a worker has listed, and would send now if it were asked."""
    return {key: handle for arena in membership.all_arenas() for key, handle in _find(arena, address, keys)}


def _find(arena: Arena, address: str, keys: Any) -> list[tuple[Any, Handle]]:
    found = []
    try:
        members = [] if arena.is_damaged else arena.roster.workers_at(address)
        # To look for each of thousands of small values took 2.5 µs (November 2026).
        workers = [member for member in members if not arena.directory.is_empty(member)]
        for key in keys if workers else ():
            data = _first(arena, workers, _name(address, key))
            if data is not None:
                found.append((key, Handle.from_bytes(arena.arena_id, data)))
    except Exception:
        # Whatever it is, the worker can be asked; an error here would keep a task waiting for ever (distributed#6705).
        return []
    return found


def _first(arena: Arena, workers: list[Member], name: bytes | None) -> bytes | None:
    if name is None:
        return None
    return next((data for one in workers if (data := arena.directory.find(one, name)) is not None), None)


def _name(address: str, key: Any) -> bytes | None:
    """Return a name that no other key has, or None for a key of an unusual kind."""
    return f"{address} {key!r}".encode() if _is_plain(key) else None


def _is_plain(key: Any) -> bool:
    return type(key) in _PLAIN or (type(key) is tuple and all(map(_is_plain, key)))
