"""Name the requesting process in a request for data, and tell how Dask would serialize the answer."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import Any

import distributed.comm.utils
from distributed.protocol.serialize import families
from distributed.sizeof import safe_sizeof

_TAG = "shm:"
BYTES_PLEASE = "bytes"
"""Takes the place of the memberships in a request that is repeated because its first answer could not be used."""


def tagged(askers: Iterable[str]) -> list[str]:
    """Return a list of serializers: all that Dask knows, and a tag for each membership of the requesting process.

    The list of serializers is the only field of a request that Dask passes on at every hop and that a worker without
    the plugin accepts. Such a worker never tries the tags, because they stand behind all serializers that it knows.
    """
    return [*families, *(_TAG + asker for asker in askers)]


def untag(serializers: list[str] | None) -> tuple[list[str], list[str] | None]:
    """Return the memberships in a list of serializers, and the list as it would have been without :func:`tagged`."""
    askers = [name[len(_TAG) :] for name in serializers or () if name.startswith(_TAG)]
    return askers, None if askers else serializers


def context_of(comm: Any) -> dict[str, Any]:
    """Return the context that a connection's ``write`` passes to serializers, but with the highest version of pickle.

    The scheduler asks for version 4 of pickle, because it may pass the data on to any process. Version 4 has no
    out-of-band buffers. Every Python on which distributed (2026.1.1 and later) runs can read version 5.
    """
    told = {"sender": comm.local_info, "recipient": comm.remote_info, **comm.handshake_options}
    return {**told, "pickle-protocol": pickle.HIGHEST_PROTOCOL}


def is_offloaded(comm: Any, message: Any) -> bool:
    """Return whether a connection would serialize a message in a thread."""
    limit = distributed.comm.utils.OFFLOAD_THRESHOLD
    if not limit or not comm.allow_offload:
        return False
    size = safe_sizeof(message, default_size=-1)
    return bool(size == -1 or size > limit)


async def cluster_of(scheduler: Any) -> str:
    """Ask a scheduler, through its rpc, for its unique id."""
    return str((await scheduler.identity(n_workers=0))["id"])
