"""How this process asks for data: it says who asks, and asks again for bytes when an answer cannot be used.

All requests of a process, whatever its roles, go through one function of ``distributed``; it is replaced while the
process is a member of any arena. Being a member is a matter of the process: every role in it can use every handle.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import distributed.worker

from dask_shm_plugin import handles, listings, membership, seams
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.exceptions import REASONS
from dask_shm_plugin.handles import Deferred, Failed, Unresolved
from dask_shm_plugin.memberbook import Member
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.threads import call_in

BYTES_PLEASE = "bytes"
"""Stands in the place of a membership in a request for what was answered before, in a way that was of no use."""


_OUTSIDE = "outside:"


class Outsider:
    """A role that is in no arena: until :meth:`end`, its requests say what keeps it out.

    Parameters
    ----------
    kept_out_by
        Returns the reason of now, as counters name it.
    """

    def __init__(self, kept_out_by: Callable[[], str | None]) -> None:
        self.kept_out_by = kept_out_by
        _OUTSIDERS.append(self)
        REQUESTS.begin()

    def end(self) -> None:
        """Say nothing any more."""
        REQUESTS.end()
        _OUTSIDERS.remove(self)


_OUTSIDERS: list[Outsider] = []


def askers() -> list[str]:
    """Return the memberships of this process, as a request names them; where it has none, the reason."""
    memberships = [
        f"{arena.arena_id.hex()}:{arena.member.slot}:{arena.member.incarnation}"
        for arena in membership.all_arenas()
        if not arena.is_damaged
    ]
    return memberships or [f"{_OUTSIDE}{reason}" for one in _OUTSIDERS[:1] if (reason := one.kept_out_by())]


def why_no_member(asked_by: list[str]) -> str:
    """Return the reason, as counters name it, why one of those who ask is no member of any arena of this worker's."""
    said = [asker[len(_OUTSIDE) :] for asker in asked_by if asker.startswith(_OUTSIDE)]
    return said[0] if said and said[0] in REASONS else "not-co-located"


def is_member(arena: Arena, asked_by: list[str]) -> bool:
    """Tell whether one of those who ask is a member of an arena, alive and in this incarnation."""
    # Who says it in another way, as another version may, is none.
    with contextlib.suppress(ValueError, AttributeError):
        for asker in asked_by:
            if asker == BYTES_PLEASE:
                continue
            arena_id, slot, incarnation = asker.split(":")
            if arena_id == arena.arena_id.hex():
                return arena.roster.is_live(Member(int(slot), int(incarnation)))
    return False


async def finish(data: dict[Any, Any]) -> dict[Any, Any]:
    """Rebuild in Dask's thread what could not be rebuilt on the event loop, and return the data with it."""
    later = [key for key, value in data.items() if type(value) is Deferred]
    if not later:
        return data
    values = await asyncio.gather(*(call_in(None, handles.become, data[key].handle) for key in later))
    return {**data, **dict(zip(later, values, strict=True))}


def unusable(data: Mapping[Any, Any]) -> list[Any]:
    """Return the keys of which a handle could not be resolved, and count them."""
    keys = [key for key, value in data.items() if type(value) is Unresolved]
    for key in keys:
        COUNTERS.count_sent(f"unresolved-{data[key].reason}", data[key].size)
    return keys


def insist_rebuilt(data: Mapping[Any, Any]) -> None:
    """Raise what the deserializer of a value has raised, as Dask would have."""
    for value in data.values():
        if type(value) is Failed:
            raise value.error


async def _look_up(worker: str, keys: Collection[Any]) -> dict[Any, Any]:
    """Return what a worker need not be asked for."""
    listed = listings.find(worker, keys)
    if not listed:
        return {}
    arrived = await finish({key: handles.arrive(handle) for key, handle in listed.items()})
    found = {key: value for key, value in arrived.items() if type(value) is not Unresolved}
    for key in found:
        COUNTERS.count("found", listed[key].size)
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
    values: dict[Any, Any] = {}
    try:
        values |= await _look_up(worker, keys)
        rest = [key for key in keys if key not in values]
        insist_rebuilt(values)
        if values and not rest:
            return {"status": "OK", "data": values}
        response = await ask(rpc, rest, worker, who=who, serializers=seams.tagged(names), deserializers=deserializers)
        if response["status"] != "OK":
            return response
        values |= await finish(response.pop("data"))
        insist_rebuilt(values)
        missing = unusable(values)
        if missing:
            bytes_please = seams.tagged([BYTES_PLEASE])
            again = await ask(rpc, missing, worker, who=who, serializers=bytes_please, deserializers=deserializers)
            if again["status"] != "OK":
                return again
            values = {key: value for key, value in values.items() if key not in missing} | again["data"]
        return {**response, "data": values}
    except BaseException:
        # Dask logs that the worker cannot be reached, and a log keeps what stands in the frames of an error.
        values.clear()
        raise


REQUESTS = seams.SharedReplacement(distributed.worker, "get_data_from_worker", _get_data_from_worker)
"""In place while any role of this process is on."""
