"""Switch shuffles through the arena on in a worker, if this version of distributed allows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.notices import warn_once

if TYPE_CHECKING:
    from dask_shm_plugin.shuffling.shuffles import Shuffles


def switch_on(worker: Any, arena: Arena) -> Shuffles | None:
    """Let a worker's shuffles use its arena; warn once with the reason, and return None, if that is not possible."""
    try:
        from dask_shm_plugin.seams import shuffle as seams
        from dask_shm_plugin.shuffling.shuffles import Shuffles

        reason = seams.why_not()
    except ImportError as error:
        reason = f"this version of distributed has moved a name ({error}); install a newer dask_shm_plugin"
    if reason:
        warn_once(f"Shuffles and rechunks are not shared: {reason}")
        return None
    return Shuffles(worker, arena)
