"""One worker of a node at a time asks other nodes for a value: its neighbours wait, and find it in the arena.

Workers that ask the same sender need not wait for each other: the sender decides which of them receives the value.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.values import index

_WANTS, _ASKS = b"?", b"!"
_PATIENCE_S = 10.0
"""A worker waits for its neighbours for so long: one of them may have been stopped."""
_LOOK_S = 0.5
"""A worker that waits for so long finds out whether the senders of its neighbours answer, and again after each such time."""
_PAUSES_S = 0.002, 0.05
"""The first and the longest pause between two looks."""


class Turn:
    """The turn of one worker to ask a sender for some keys, from its creation to :meth:`end`.

    Parameters
    ----------
    arena
        The arena of the worker.
    keys
        The keys of large values.
    sender
        The address of the sender.
    answers
        Tells whether a worker at some address answers, within some seconds.

    Notes
    -----
    Each worker lists in its directory which keys it wants or asks for. There must never be a moment when two ask
    different senders for one key, each without having seen the other. So a worker looks once more after it has listed
    that it asks. Of two that see each other there, the one with the lower slot goes on. A worker that asks does not
    wait, so there is no cycle. The listing of a dead worker is not found, and that of a neighbour whose sender does not
    answer counts no more. A worker waits for one other neighbour at most: if that has not received a value that can be
    found, the next one may not either.
    """

    def __init__(
        self, arena: Arena, keys: Collection[Any], sender: str, answers: Callable[[str], Awaitable[bool]]
    ) -> None:
        self._arena, self._sender, self._answers = arena, sender.encode(), answers
        self._senders: set[bytes] = set()
        """Those of neighbours that were seen."""
        self._gone: set[bytes] = set()
        self._names = {key: name for key in keys if (name := index.name_of("asking", key)) is not None}
        self._taken: set[Any] = set()
        self._withdrawn: set[Any] = set()
        self._waited_for: dict[Any, Member] = {}
        self._patient_until = time.monotonic() + _PATIENCE_S
        for key in self._names:
            self._list(key, _WANTS)

    async def of(self, keys: Collection[Any]) -> list[Any]:
        """Return those of some keys that may be asked for now, all of them if patience has ended; wait while it is none."""
        for key in self._withdrawn & self._names.keys():
            self._list(key, _WANTS)
        looking: asyncio.Future[None] | None = None
        pause, longest = _PAUSES_S
        try:
            while True:
                free = [key for key in keys if self._take(key)]
                if free or not keys:
                    self._withdraw(keys)
                    return free
                if time.monotonic() > self._patient_until:
                    return list(keys)
                looking = looking or asyncio.ensure_future(self._look_for_gone())
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)
        finally:
            if looking is not None:
                looking.cancel()

    def _withdraw(self, keys: Collection[Any]) -> None:
        """List some keys no more for a while: no neighbour should wait for those that are not asked for now."""
        self._withdrawn = {key for key in keys if key in self._names and key not in self._taken}
        for key in self._withdrawn:
            self._arena.directory.remove(self._names[key])

    async def _look_for_gone(self) -> None:
        """Note again and again which senders of neighbours do not answer: these neighbours may wait for long."""
        while True:
            await asyncio.sleep(_LOOK_S)
            senders = self._senders - self._gone
            answer = await asyncio.gather(*(self._answers(sender.decode()) for sender in senders))
            gone = {sender for sender, does_answer in zip(senders, answer, strict=True) if not does_answer}
            if gone:
                self._gone |= gone
                self._waited_for.clear()

    def end(self, keys: Collection[Any] | None = None) -> None:
        """Ask for some keys no more, by default for all: their values have arrived, or will not."""
        for key in list(self._names) if keys is None else keys:
            name = self._names.pop(key, None)
            if name is not None:
                self._arena.directory.remove(name)

    def _take(self, key: Any) -> bool:
        if key not in self._names or key in self._taken:
            return True
        others = self._others(key)
        asking = [member for member, state in others if state == _ASKS]
        if asking:
            self._waited_for.setdefault(key, asking[0])
        has_waited = self._waited_for.get(key) not in (None, *asking)
        if not has_waited and (asking or self._has_first(others)):
            return False
        self._list(key, _ASKS)
        if not has_waited and self._has_first(self._others(key)):
            self._list(key, _WANTS)
            return False
        self._taken.add(key)
        return True

    def _has_first(self, others: list[tuple[Member, bytes]]) -> bool:
        return any(member < self._arena.member for member, _ in others)

    def _others(self, key: Any) -> list[tuple[Member, bytes]]:
        """Return the neighbours that want a key or ask for it, of other senders, and the state of each."""
        found = []
        with contextlib.suppress(SharedMemoryError):
            for member in {one for members in self._arena.roster.workers().values() for one in members}:
                data = None if member == self._arena.member else self._arena.directory.find(member, self._names[key])
                if data is not None and data[1:] not in (self._sender, *self._gone):
                    self._senders.add(data[1:])
                    found.append((member, data[:1]))
        return found

    def _list(self, key: Any, state: bytes) -> None:
        self._arena.directory.add(self._names[key], state + self._sender)

    def __repr__(self) -> str:
        return f"<Turn for {len(self._names)} keys at {self._sender.decode()}>"
