"""A preload for every scheduler, client and worker of a run with the plugin: it makes the plugin share all it can.

The values of these tests are small. Usually, frames of up to 1 KiB travel inside a handle, and shards of shuffles of
less than 64 KiB as with stock Dask. Here they lie in the arena, too.
"""

from __future__ import annotations

from typing import Any

from dask_shm_stress.watching import save_counts
from distributed import Worker

from dask_shm_plugin import preload
from dask_shm_plugin.shuffling import sending
from dask_shm_plugin.values import codec

INLINE_LIMITS = ("_INLINE_FRAME_BYTES", "_INLINE_TOTAL_BYTES")
"""The names of the limits in `codec`, in bytes, up to which frames travel inside a handle."""

for name in INLINE_LIMITS:
    if not isinstance(getattr(codec, name), int):
        raise TypeError(f"codec.{name} is not a number of bytes any more")
    setattr(codec, name, 1)
if not isinstance(sending._MIN_PARCEL_BYTES, int):
    raise TypeError("sending._MIN_PARCEL_BYTES is not a number of bytes any more")
sending._MIN_PARCEL_BYTES = 1


async def dask_setup(server: Any) -> None:
    """Switch sharing on, in schedulers and clients. The workers of a cluster follow their scheduler."""
    if not isinstance(server, Worker):
        await preload.dask_setup(server)


def dask_teardown(server: Any) -> None:
    """Save the counters of this process before it ends."""
    save_counts()
