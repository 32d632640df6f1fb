"""A preload for every scheduler, client and worker of the run with the plugin: switches it on, and makes it do its most.

Values of tests are small, and frames of up to 1 KiB travel inside of a handle: here these lie in the arena, too.
"""

from __future__ import annotations

from typing import Any

from dask_shm_stress.watching import save_counts
from distributed import Worker

from dask_shm_plugin import codec, preload

INLINE = ("_INLINE_FRAME", "_INLINE_TOTAL")
"""The bounds of `codec` up to which frames travel inside of a handle, in bytes."""

for name in INLINE:
    if not isinstance(getattr(codec, name), int):
        raise TypeError(f"codec.{name} is no number of bytes any more")
    setattr(codec, name, 1)


async def dask_setup(server: Any) -> None:
    """Switch a whole cluster on at its scheduler; workers have it from there."""
    if not isinstance(server, Worker):
        await preload.dask_setup(server)


def dask_teardown(server: Any) -> None:
    """Save what this process has counted, before it goes."""
    save_counts()
