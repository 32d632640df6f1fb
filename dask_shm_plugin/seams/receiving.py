"""List the private names of ``distributed`` by which a connection receives into memory of the arena.

If one of them has changed, messages are received as with stock Dask, and copied into the arena.
"""

from __future__ import annotations

import functools
import inspect

import distributed.comm.tcp

from dask_shm_plugin.seams.checks import Seam, moved, names, takes

SEAMS = (
    Seam(
        "distributed.comm.tcp.read_bytes_rw",
        "receives each large frame of a message from a stream into memory that it allocates",
        lambda: (
            inspect.iscoroutinefunction(distributed.comm.tcp.read_bytes_rw)
            and takes(distributed.comm.tcp.read_bytes_rw, "stream", "n")
            and names(distributed.comm.tcp.read_bytes_rw, "host_array", "read_into")
            and names(distributed.comm.tcp.TCP.read, "read_bytes_rw", "from_frames")
            and names(distributed.comm.tcp.TCP.write, "max_shard_size", "frame_split_size")
        ),
    ),
)


@functools.cache
def why_not() -> str | None:
    """Return the reason why connections cannot receive into the arena, or None."""
    return moved(SEAMS)
