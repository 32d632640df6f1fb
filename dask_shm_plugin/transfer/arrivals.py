"""Complete the values of an answer: a handle may still be to rebuild, or cannot be resolved, or its deserializer has failed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.threads import call_in
from dask_shm_plugin.values import handles
from dask_shm_plugin.values.handles import Deferred, Failed, Unresolved


async def finish(data: dict[Any, Any]) -> dict[Any, Any]:
    """Rebuild the deferred values in Dask's thread for large messages, and return the data with them."""
    later = [key for key, value in data.items() if type(value) is Deferred]
    if not later:
        return data
    values = await asyncio.gather(*(call_in(None, handles.rebuild, data[key].handle) for key in later))
    return {**data, **dict(zip(later, values, strict=True))}


def unusable(data: Mapping[Any, Any]) -> list[Any]:
    """Return the keys of handles that could not be resolved, and count them as sent."""
    keys = [key for key, value in data.items() if type(value) is Unresolved]
    for key in keys:
        COUNTERS.count_sent(f"unresolved-{data[key].reason}", data[key].size)
    return keys


def insist_rebuilt(data: Mapping[Any, Any]) -> None:
    """Raise the first error of a value's own deserializer, as Dask would have done."""
    for value in data.values():
        if type(value) is Failed:
            raise value.error
