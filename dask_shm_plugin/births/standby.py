"""The chunk without pages that waits for the next large array of a block of the client."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.births import bounds
from dask_shm_plugin.births.library import Library
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.linux import limits

logger = logging.getLogger("dask_shm_plugin")

_WAIT_S = 10.0
"""How long a block waits at most for the chunk, or to hear that there is none: 2 ms unless the machine is very busy."""


class Standby:
    """Keeps one chunk on standby while a block of the client runs.

    Parameters
    ----------
    library, arena
        The C library and the arena.
    add
        Adds a chunk without pages, of a given length.

    Notes
    -----
    Any thread may run blocks. :meth:`keep` is called by the nursery's thread.
    """

    def __init__(self, library: Library, arena: Arena, add: Callable[[int], None]) -> None:
        self._library, self._arena, self._add = library, arena, add
        self._blocks: list[object] = []
        self._length = 0
        self._is_settled = threading.Event()

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """Keep a chunk on standby: the next array, of any length, is born even if it is the first of its length."""
        mark = object()
        self._is_settled.clear()
        self._blocks.append(mark)
        try:
            self._library.functions.born_wake()
            self._is_settled.wait(_WAIT_S)
            yield
        finally:
            self._blocks.remove(mark)
            self._library.functions.born_wake()

    @property
    def is_due(self) -> bool:
        """Whether a block runs, or the chunk is to be given back."""
        return bool(self._blocks) or self._library.stands_by()

    def keep(self, *, is_allowed: bool) -> None:
        """Have a chunk on standby, or none if that is not allowed, no block runs, or there is no room."""
        try:
            length = bounds.room_on_standby(self._arena) if is_allowed and self._blocks else 0
            # It is replaced when its pages might not be had any more.
            ends = not length or length < self._length / 4 or limits.head_room() < self._length
            is_there = self._library.stands_by(ends=ends)
            if length and not is_there:
                self._add(length)
                self._length = length
        except (SharedMemoryError, OSError):
            logger.debug("no chunk is on standby", exc_info=True)
        finally:
            self._is_settled.set()
