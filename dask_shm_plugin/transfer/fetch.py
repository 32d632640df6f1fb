"""Request data: each request names the memberships of this process; if an answer cannot be used, ask again for bytes.

All requests of a process, in all its roles, go through one function of ``distributed``, which is replaced while a
worker or client of this process takes part. The process as a whole is a member of an arena: each of its roles can
resolve every handle.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import distributed.worker
from distributed.comm.core import connect

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import REASONS
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.node import membership
from dask_shm_plugin.seams import requests
from dask_shm_plugin.seams.replacement import SharedReplacement
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.transfer.arrivals import finish, insist_rebuilt, unusable
from dask_shm_plugin.transfer.landing import Landing, landing_of
from dask_shm_plugin.values import handles, index
from dask_shm_plugin.values.handles import Unresolved

_OUTSIDE = "outside:"
_ANSWER_TIMEOUT_S = 2.0
"""A worker that does not answer for so long is down or stopped, or too busy to send."""


class Outsider:
    """A role that is in no arena: from its creation to :meth:`end`, requests of this process give the reason.

    Parameters
    ----------
    kept_out_by
        Returns the present reason, by its name in the counters, or None.
    """

    def __init__(self, kept_out_by: Callable[[], str | None]) -> None:
        self.kept_out_by = kept_out_by
        _OUTSIDERS.append(self)
        REQUESTS.begin()

    def end(self) -> None:
        """Give no reason any more."""
        REQUESTS.end()
        _OUTSIDERS.remove(self)


_OUTSIDERS: list[Outsider] = []


def askers() -> list[str]:
    """Return the memberships of this process, as a request names them; if there are none, the reason if it is known."""
    memberships = [
        f"{arena.arena_id.hex()}:{arena.member.slot}:{arena.member.incarnation}"
        for arena in membership.all_arenas()
        if not arena.is_damaged
    ]
    return memberships or [f"{_OUTSIDE}{reason}" for one in _OUTSIDERS[:1] if (reason := one.kept_out_by())]


def why_no_member(asked_by: list[str]) -> str:
    """Return the reason, by its name in the counters, why the requesting process is not a member of this arena."""
    said = [asker[len(_OUTSIDE) :] for asker in asked_by if asker.startswith(_OUTSIDE)]
    return said[0] if said and said[0] in REASONS else "not-co-located"


def is_member(arena: Arena, asked_by: list[str]) -> bool:
    """Return whether the requesting process is a member of an arena now, in the incarnation that it names."""
    # A request that names its membership in another form, as another version may, is not one of a member.
    with contextlib.suppress(ValueError, AttributeError):
        for asker in asked_by:
            if asker == requests.BYTES_PLEASE:
                continue
            arena_id, slot, incarnation = asker.split(":")
            if arena_id == arena.arena_id.hex():
                return arena.roster.is_live(Member(int(slot), int(incarnation)))
    return False


async def ask_until_usable(
    ask: Callable[[Collection[Any], list[str]], Awaitable[Any]], keys: Collection[Any], names: list[str]
) -> Any:
    """Request data as a member, and unusable values again as bytes; return the response with the data of both.

    Parameters
    ----------
    ask
        Sends a request for keys, with a list of serializers, and returns the response.
    keys
        All keys that are wanted.
    names
        The memberships of this process, see :func:`askers`.

    Raises
    ------
    Exception
        The deserializer of a value has failed, as it would with bytes.
    """
    data: dict[Any, Any] = {}
    try:
        response = await ask(keys, requests.tagged(names))
        if response["status"] != "OK":
            return response
        data |= await finish(response["data"])
        insist_rebuilt(data)
        missing = unusable(data)
        if missing:
            again = await ask(missing, requests.tagged([requests.BYTES_PLEASE]))
            if again["status"] != "OK":
                return again
            data = {key: value for key, value in data.items() if key not in missing} | again["data"]
        return {**response, "data": data}
    except BaseException:
        response = again = None
        data.clear()
        raise


async def _answers(rpc: Any, address: str) -> bool:
    """Return whether a worker accepts a connection and answers on it, within two seconds."""
    connecting = asyncio.ensure_future(connect(address, timeout=_ANSWER_TIMEOUT_S, **rpc.connection_args))
    connecting.add_done_callback(_abort)
    # Not cancelled: that would leave an open connection, because `connect` waits without a timeout for the answer.
    await asyncio.wait([connecting], timeout=_ANSWER_TIMEOUT_S)
    return connecting.done() and connecting.exception() is None


def _abort(connecting: asyncio.Future[Any]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().abort()


async def _look_up(worker: str, keys: Collection[Any], who: str | None, landing: Landing | None) -> dict[Any, Any]:
    """Return the values of those keys that a worker has listed, so that it need not be asked for them."""
    listed = index.find(worker, keys)
    if not listed:
        return {}
    arrived = await finish({key: handles.receive(handle) for key, handle in listed.items()})
    found = {key: value for key, value in arrived.items() if type(value) is not Unresolved}
    for key in found:
        COUNTERS.count("found", listed[key].size)
        if landing is not None:
            landing.note(key, listed[key], found[key], who)
    return found


async def _get_data_from_worker(
    rpc: Any,
    keys: Any,
    worker: str,
    *,
    who: str | None = None,
    serializers: list[str] | None = None,
    deserializers: list[str] | None = None,
) -> Any:
    ask: Callable[..., Any] = REQUESTS.old
    names = askers()
    is_ours = names and rpc.deserialize and not (serializers or rpc.serializers) and not worker.startswith("inproc://")
    if not is_ours:
        return await ask(rpc, keys, worker, who=who, serializers=serializers, deserializers=deserializers)

    def ask_worker(keys: Collection[Any], serializers: list[str]) -> Any:
        return ask(rpc, keys, worker, who=who, serializers=serializers, deserializers=deserializers)

    found: dict[Any, Any] = {}
    try:
        landing = landing_of(who)
        found |= await _look_up(worker, keys, who, landing)
        insist_rebuilt(found)
        rest = [key for key in keys if key not in found]
        if found and not rest:
            return {"status": "OK", "data": found}
        if landing is not None and landing.takes_from(worker):
            response = await landing.fetch(ask_worker, functools.partial(_answers, rpc), rest, names, worker, who)
        else:
            response = await ask_until_usable(ask_worker, rest, names)
        return {**response, "data": found | response["data"]} if response["status"] == "OK" else response
    except BaseException:
        # Dask logs the error if the worker cannot be reached. A log keeps the frames of an error and their local
        # variables.
        found.clear()
        raise


REQUESTS = SharedReplacement(distributed.worker, "get_data_from_worker", _get_data_from_worker)
"""In place while any worker or client of this process takes part, or an :class:`Outsider` lives."""
