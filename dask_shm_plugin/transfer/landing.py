"""Receive values from other nodes once per node: they land in the arena, and the neighbours find them there."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import time
import weakref
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.node import membership
from dask_shm_plugin.seams import requests
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.threads import call_in
from dask_shm_plugin.transfer import arrivals
from dask_shm_plugin.transfer.asking import Turn
from dask_shm_plugin.transfer.between_nodes import Elsewhere, NodeRequest
from dask_shm_plugin.values import handles, index
from dask_shm_plugin.values.codec import Published
from dask_shm_plugin.values.handles import Deferred, Failed, Handle, Unresolved
from dask_shm_plugin.values.index import PublishedIndex
from dask_shm_plugin.values.parcels import Parcel

_LISTED_S = 10.0
"""How long a landed value can be found, whether or not a worker stores it under its key."""
_ASK_AGAIN_S = 1.0
"""How long a worker waits for its neighbour before it asks the sender again: this may have died."""
_PATIENCE_S = 5.0
_PATIENCE_BYTES_PER_S = 50e6
"""All in all it waits 5 s, and as long as a network of 0.4 Gbit/s takes for the value; then it receives it itself."""
_MAX_LOST = 2
"""Number of neighbours for which a worker waits in vain; after them it asks for bytes, which do not land."""
_BUSY_S, _MAX_BUSY = 0.15, 20
"""How often, and after which time, a sender is asked again that is too busy for the second part of an answer."""
_PAUSES_S = 0.002, 0.05
"""The first and the longest pause between two looks for a value that the neighbour receives."""
_MAX_KEYS = 64
"""Number of keys that are looked for at home if their sizes are not known."""

IS_CARRIED: contextvars.ContextVar[bool] = contextvars.ContextVar("IS_CARRIED", default=False)
"""Whether the network has carried the bytes of the fetch that this task has made."""

Ask = Callable[[Collection[Any], list[str]], Awaitable[Any]]
"""Sends a request for keys, with a list of serializers, and returns the response."""


class Landing:
    """Receives values from other nodes for one worker, from its creation to :meth:`stop`.

    Parameters
    ----------
    arena
        The arena of this process.
    address
        The address of the worker.
    may_be_large
        Tells whether the value of a key may be large enough to be shared.

    Notes
    -----
    To be used on the worker's event loop. Dask's thread for large messages copies.
    """

    def __init__(self, arena: Arena, address: str, may_be_large: Callable[[Any], bool]) -> None:
        self._arena, self._address, self._may_be_large = arena, address, may_be_large
        self._is_over = False
        self._index = PublishedIndex(arena, index.LANDED)
        self._landed: dict[Any, tuple[Published | None, asyncio.TimerHandle]] = {}
        self._from_afar: dict[Any, tuple[Handle, weakref.ref[Any]]] = {}
        _LANDINGS[address] = self

    def stop(self) -> None:
        """Receive nothing any more, and withdraw all listings."""
        self._is_over = True
        if _LANDINGS.get(self._address) is self:
            del _LANDINGS[self._address]
        for key in list(self._landed):
            self._forget(key)

    def takes_from(self, worker: str) -> bool:
        """Return whether values of a worker land: it shares no arena with this process, and this node has several workers."""
        try:
            return self.has_neighbours and not any(
                worker in arena.roster.workers() for arena in membership.all_arenas()
            )
        except SharedMemoryError:
            return False

    @property
    def has_neighbours(self) -> bool:
        """Whether other workers share the arena, so that it is worth the copy."""
        try:
            return len(self._arena.roster.workers()) > 1 and not self._arena.is_damaged
        except SharedMemoryError:
            return False

    def note(self, key: Any, handle: Handle, value: object, who: str | None) -> None:
        """Note that a value was fetched by its handle, if it was made on another node.

        Parameters
        ----------
        key, handle, value
            The value.
        who
            The worker that will store it. A value that a user gets first may be changed before it is stored.
        """
        self._from_afar.pop(key, None)
        if who == self._address and handle.is_from_afar:
            with contextlib.suppress(TypeError):  # a list or dict
                self._from_afar[key] = handle, weakref.ref(value)

    def handle_of(self, key: Any, value: object) -> Handle | None:
        """Return the handle of a value that a worker has just stored, if it was fetched from another node by that.

        Each worker that has such a value lists it: otherwise its neighbours would have it sent once more.
        """
        handle, reference = self._from_afar.pop(key, (None, None))
        return handle if reference is not None and reference() is value else None

    def forget(self, key: Any) -> None:
        """Forget the value of a key: the worker has dropped it."""
        self._from_afar.pop(key, None)
        if key in self._landed:
            self._forget(key)

    async def fetch(
        self,
        ask: Ask,
        answers: Callable[[str], Awaitable[bool]],
        keys: Collection[Any],
        names: list[str],
        worker: str,
        who: str | None,
    ) -> Any:
        """Request data of a worker on another node; return the response with the values.

        Parameters
        ----------
        ask, keys, names
            As for `fetch.ask_until_usable`.
        answers
            Tells whether a worker at some address answers.
        worker
            The worker on the other node.
        who
            The worker that will store the values, or None.
        """
        fetch = _Fetch(self, who)
        data: dict[Any, Any] = {}
        arrived: dict[Any, Any] = {}
        missing = list(keys)
        turn = Turn(self._arena, self._large_of(keys), worker, answers)
        busy = 0
        try:
            while True:
                asked = await turn.of(missing)
                response = await ask(asked, requests.tagged(fetch.names(asked, names)))
                if response["status"] != "OK":
                    busy += 1
                    if not data or busy > _MAX_BUSY:
                        return response
                    await asyncio.sleep(_BUSY_S)  # Dask would drop what has arrived
                    continue
                arrived |= await fetch.finish(response["data"])
                data |= {key: value for key, value in arrived.items() if value is not _NOT_HERE}
                turn.end([key for key in asked if key in data])
                missing = [key for key in missing if key not in asked or arrived.get(key) is _NOT_HERE]
                if not missing:
                    return {**response, "data": data}
                arrived.clear()
        except BaseException:
            # A log keeps the frames of an error and their local variables.
            response = None
            data.clear()
            arrived.clear()
            raise
        finally:
            turn.end()

    def _large_of(self, keys: Collection[Any]) -> list[Any]:
        return [key for key in keys if self._may_be_large(key)][:_MAX_KEYS]

    def at_home(self, keys: Collection[Any]) -> dict[bytes, Handle]:
        """Return the handles of large values that this node has under these keys, by version."""
        found = index.find_at_home(self._arena, self._large_of(keys))
        return {handle.version: handle for handle in found if handle.parts}

    async def land(self, key: Any, parcel: Parcel, who: str | None) -> Any:
        """Put a value into the arena and list it; return the value."""
        published, value = await call_in(None, parcel.landed, self._arena)
        if self._is_over:
            return value
        handle = published.handle if published is not None else _refusal(self._arena, parcel.version)
        self.forget(key)
        self._landed[key] = published, asyncio.get_running_loop().call_later(_LISTED_S, self._expire, key)
        self._index.add(key, handle)
        if published is not None:
            self.note(key, handle, value, who)
        return value

    def _expire(self, key: Any) -> None:
        """Withdraw the listing of a landed value, but not while neighbours use the value."""
        published, _ = self._landed[key]
        if published is not None and published.is_used_elsewhere:
            self._landed[key] = published, asyncio.get_running_loop().call_later(_LISTED_S, self._expire, key)
        else:
            self._forget(key)

    def _forget(self, key: Any) -> None:
        _, expiry = self._landed.pop(key)
        # The timer's list keeps a cancelled one, but not its arguments.
        expiry.cancel()
        self._index.remove(key)

    async def wait_for(self, key: Any, elsewhere: Elsewhere) -> Handle | None:
        """Wait until a neighbour has listed a value that it receives; return None if it dies, or after a second."""
        pause, deadline = _PAUSES_S[0], time.monotonic() + _ASK_AGAIN_S
        while True:
            is_over = time.monotonic() > deadline or not self.is_running(elsewhere.receiver)
            found = [one for one in index.find_at_home(self._arena, [key]) if one.version == elsewhere.version]
            if found:
                # One member may have had no room for the value, and another one has it.
                return max(found, key=lambda handle: len(handle.parts))
            if is_over:
                return None
            await asyncio.sleep(pause)
            pause = min(2 * pause, _PAUSES_S[1])

    def is_running(self, member: Member | None) -> bool:
        """Return whether a member of the arena is alive."""
        return member is not None and self._arena.roster.is_running(member)

    @property
    def arena(self) -> Arena:
        """The arena of this process."""
        return self._arena

    def __repr__(self) -> str:
        return f"<Landing of {self._address}, {len(self._landed)} values>"


_NOT_HERE = object()
"""Stands for a value that is to be requested again."""


class _Fetch:
    """What one fetch has learned from the answers so far."""

    def __init__(self, landing: Landing, who: str | None) -> None:
        self._landing, self._who = landing, who
        self._home: dict[bytes, Handle] = {}
        self._lost: set[Member] = set()
        self._unusable: set[bytes] = set()
        self._needs_bytes = False
        self._begun = time.monotonic()

    def names(self, keys: Collection[Any], names: list[str]) -> list[str]:
        """Return the names with which to ask next: as a node, or for mere bytes when patience has ended."""
        if self._needs_bytes or len(self._lost) > _MAX_LOST:
            return [requests.BYTES_PLEASE]
        home = self._landing.at_home(keys)
        self._home = {version: handle for version, handle in home.items() if version not in self._unusable}
        return [*names, NodeRequest.of(self._landing.arena, self._home, self._lost).asker]

    async def finish(self, data: dict[Any, Any]) -> dict[Any, Any]:
        """Put the values of an answer in place of its messages; ``_NOT_HERE`` for those that are to be requested again."""
        if any(type(value) is not Elsewhere for value in data.values()):
            IS_CARRIED.set(True)
        # First those for which neighbours may wait: two workers that wait for each other's would wait in vain. Each
        # parcel is dropped once it has landed: it has a private copy.
        for key in [key for key, value in data.items() if type(value) is Parcel]:
            data[key] = await self._landing.land(key, data[key], self._who)
        # The sender may be a member of this arena, and this process did not know that yet.
        data |= await arrivals.finish(data)
        arrivals.insist_rebuilt(data)
        for key in arrivals.unusable(data):
            data[key], self._needs_bytes = _NOT_HERE, True
        later = [key for key, value in data.items() if type(value) is Elsewhere]
        data |= zip(later, await asyncio.gather(*(self._from_home(key, data[key]) for key in later)), strict=True)
        return data

    async def _from_home(self, key: Any, elsewhere: Elsewhere) -> Any:
        if elsewhere.receiver is None:
            handle = self._home.get(elsewhere.version)
        else:
            patience = _PATIENCE_S + elsewhere.size / _PATIENCE_BYTES_PER_S
            handle = await self._landing.wait_for(key, elsewhere)
            is_late = time.monotonic() > self._begun + patience * (1 + len(self._lost))
            if handle is None and self._landing.is_running(elsewhere.receiver) and not is_late:
                return _NOT_HERE
        value = await _mapped(handle) if handle is not None and handle.parts else _NOT_HERE
        if handle is None or value is _NOT_HERE:
            if handle is not None:
                self._unusable.add(elsewhere.version)
            if elsewhere.receiver is not None:
                self._lost.add(elsewhere.receiver)
            return _NOT_HERE
        COUNTERS.count("found", elsewhere.size)
        self._landing.note(key, handle, value, self._who)
        return value


async def _mapped(handle: Handle) -> Any:
    """Return the value of a handle, or ``_NOT_HERE`` if it cannot be mapped; the value's own deserializer may raise."""
    value = handles.receive(handle)
    if type(value) is Deferred:
        value = await call_in(None, handles.rebuild, handle)
    if type(value) is Failed:
        raise value.error
    return _NOT_HERE if type(value) is Unresolved else value


def _refusal(arena: Arena, version: bytes) -> Handle:
    """Return a handle without frames: it tells the neighbours that the value of this version has not landed."""
    return Handle.of(arena.arena_id, b"", (), 0, 0, version)


_LANDINGS: dict[str, Landing] = {}


def landing_of(who: str | None) -> Landing | None:
    """Return the landing of the worker that makes a request; without its address, that of any worker of this process."""
    if who is not None:
        return _LANDINGS.get(who)
    landings = list(_LANDINGS.values())
    return landings[0] if len({id(landing.arena) for landing in landings}) == 1 else None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_LANDINGS.clear)  # the worker and its arena are the parent's
