"""Send each value to each node once: later askers of a node are sent to their neighbour that receives the value."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any, NamedTuple

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.transfer.between_nodes import Elsewhere, NodeRequest
from dask_shm_plugin.values import index, parcels
from dask_shm_plugin.values.codec import Published

_LANDING_S = 0.5
_LANDING_BYTES_PER_S = 500e6
"""A received value is put into the arena of its node within this time, or more slowly than it is worth waiting for."""


class _Flight:
    """A value on its way to a node, until it has landed there; ``over_at`` is None while bytes are being sent."""

    def __init__(self, receiver: Member, size: int) -> None:
        self.receiver, self._size = receiver, size
        self._over_at: float | None = None

    @property
    def is_over(self) -> bool:
        return self._over_at is not None and time.monotonic() > self._over_at

    def arrived(self) -> float:
        """Note that the bytes have arrived; return the seconds until the value has landed."""
        left = _LANDING_S + self._size / _LANDING_BYTES_PER_S
        self._over_at = time.monotonic() + left
        return left


class _Route(NamedTuple):
    arena_id: str
    version: bytes


class Flights:
    """The values of one worker that are on their way to other nodes.

    Notes
    -----
    To be used on the worker's event loop.
    """

    def __init__(self) -> None:
        self._by_route: dict[_Route, _Flight] = {}

    def receiver_of(self, request: NodeRequest, version: bytes) -> Member | None:
        """Return the neighbour of the requesting worker that is receiving a value, or None."""
        self._forget_old()
        flight = self._by_route.get(_Route(request.arena_id, version))
        return None if flight is None or flight.receiver in request.lost else flight.receiver

    def begin(self, request: NodeRequest, version: bytes, size: int) -> tuple[_Route, _Flight]:
        """Note that a value is sent to the requesting worker."""
        route = _Route(request.arena_id, version)
        flight = self._by_route[route] = _Flight(request.member, size)
        return route, flight

    def end(self, route: _Route, flight: _Flight, *, has_arrived: bool) -> None:
        """Note that the value was received, or that it will not be."""
        if has_arrived:
            left = flight.arrived()
            with contextlib.suppress(RuntimeError):  # no event loop
                asyncio.get_running_loop().call_later(left + 0.01, self._forget_old)
        elif self._by_route.get(route) is flight:
            del self._by_route[route]

    def _forget_old(self) -> None:
        for route in [route for route, flight in self._by_route.items() if flight.is_over]:
            del self._by_route[route]

    def __repr__(self) -> str:
        return f"<Flights {len(self._by_route)} under way>"


class AnswerToNode:
    """Answers one request of another node.

    Parameters
    ----------
    flights
        The flights of this worker.
    request
        The request.
    arena
        The arena of this worker.

    Attributes
    ----------
    is_near
        Whether handles are sent, so that values are worth publishing that readers copy.
    """

    is_near = False

    def __init__(self, flights: Flights, request: NodeRequest, arena: Arena) -> None:
        self._flights, self._request, self._arena = flights, request, arena
        self._begun: list[tuple[_Route, _Flight]] = []

    def message_for(self, published: Published) -> tuple[Any, str | None]:
        """Return the message to send for a published value, and the reason for sending bytes, or None."""
        handle, request = published.handle, self._request
        if handle.version.hex() in request.has:
            return Elsewhere(handle.version, handle.size, None).message, None
        receiver = self._flights.receiver_of(request, handle.version)
        if receiver is not None:
            return Elsewhere(handle.version, handle.size, receiver).message, None
        message = parcels.message_of(published, self._arena)
        if not index.is_listable(handle):
            return message, "not-co-located"  # the neighbours would wait for it in vain
        self._begun.append(self._flights.begin(request, handle.version, handle.size))
        return message, "not-co-located"

    def over(self, *, has_arrived: bool) -> None:
        """Note the end of the answer: all its values were received, or none of them counts as received."""
        for route, flight in self._begun:
            self._flights.end(route, flight, has_arrived=has_arrived)


class AnswerToMember:
    """Answers one request of a member of this worker's arena: with handles."""

    is_near = True

    def message_for(self, published: Published) -> tuple[Any, str | None]:
        """Return the message to send for a published value; there is no reason for sending bytes."""
        return published.message, None

    def over(self, *, has_arrived: bool) -> None:
        """Do nothing."""


Recipient = AnswerToMember | AnswerToNode
