"""The handler of scatter at a worker: nothing becomes a value that is none, and the scheduler is told its share."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from distributed.core import error_message

from dask_shm_plugin import fetch, reach, seams
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.exceptions import StaleBlock
from dask_shm_plugin.handles import NotRebuilt

Received = Callable[[dict[Any, Any]], Awaitable[None]]
"""Called with what a scatter has brought."""


async def ignore(data: dict[Any, Any]) -> None:
    """Do nothing about it."""


class ScatterGuard:
    """Stands in front of the handler of one worker.

    Notes
    -----
    It outlives the plugin where other clients still take part, for a handle of theirs may be on its way.
    """

    @classmethod
    def around(cls, handlers: dict[str, Any], arena: Arena, received: Received) -> ScatterGuard:
        """Return the guard of a worker, set up if there is none."""
        present = handlers["update_data"]
        guard = present if isinstance(present, cls) else cls(handlers)
        guard._arena, guard.received = arena, received
        return guard

    def __init__(self, handlers: dict[str, Any]) -> None:
        self._arena: Arena | None = None
        self.received: Received = ignore
        self._before = seams.Replacement(handlers, "update_data", self)
        self.undo = self._before.undo

    def retire(self) -> None:
        """Go on refusing what is of no use, and keep nothing of the plugin for that."""
        self._arena, self.received = None, ignore

    async def __call__(self, data: dict[Any, Any], **options: Any) -> Any:
        """Take what a scatter brings, or refuse all of it where a handle is of no use here."""
        data = await fetch.finish(data)
        try:
            fetch.insist_rebuilt(data)
        except Exception as error:
            return error_message(NotRebuilt(error), status="uncaught-error")
        keys = fetch.unusable(data)
        if keys:
            # An answer, not an exception: the sender repeats with bytes, and nobody's log needs a traceback.
            return error_message(StaleBlock(f"{keys} cannot be mapped here"), status="uncaught-error")
        # A dict of its own: a worker that keeps it has a reference to each value, which counts.
        answer = self._before.old(data=dict(data), **options)
        answer = await answer if inspect.isawaitable(answer) else answer
        # The values are stored by now: whatever goes wrong here must not make the scatter fail.
        with contextlib.suppress(Exception):
            await self.received(data)
        return {**answer, "nbytes": {key: self._share(data[key], size) for key, size in answer["nbytes"].items()}}

    def _share(self, value: object, size: int) -> int:
        """Return what the scheduler is told: it refuses tasks whose inputs are larger than a worker's limit."""
        with contextlib.suppress(Exception):
            if self._arena is not None:
                shared = min(size, sum(reach.rows_of(value, self._arena.arena_id).values()))
                workers = sum(role.kind == "worker" for role in self._arena.roster.roles()) if shared else 1
                return size - shared + shared // max(1, workers)
        return size

    @property
    def __name__(self) -> str:
        return "update_data"
