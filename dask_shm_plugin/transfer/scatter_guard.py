"""Handle scatters at a worker: no handle that cannot be used here becomes a value."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from distributed.core import error_message

from dask_shm_plugin.exceptions import StaleBlock
from dask_shm_plugin.seams.replacement import Replacement
from dask_shm_plugin.transfer import arrivals
from dask_shm_plugin.values.handles import NotRebuilt

Received = Callable[[dict[Any, Any]], Awaitable[None]]
"""Called with the data of a scatter after the worker has stored them."""


async def ignore(data: dict[Any, Any]) -> None:
    """Do nothing with the data of a scatter."""


class ScatterGuard:
    """Takes the place of the handler ``Worker.update_data`` of one worker: no unusable handle must become a value.

    Notes
    -----
    It stays in place after the plugin was switched off if clients still take part, because one of their handles may be
    on its way.
    """

    @classmethod
    def around(cls, handlers: dict[str, Any], received: Received) -> ScatterGuard:
        """Return the guard of a worker, with this callback; create it if there is none."""
        present = handlers["update_data"]
        guard = present if isinstance(present, cls) else cls(handlers)
        guard.received = received
        return guard

    def __init__(self, handlers: dict[str, Any]) -> None:
        self.received: Received = ignore
        self._before = Replacement(handlers, "update_data", self)
        self.undo = self._before.undo

    def retire(self) -> None:
        """Go on refusing unusable handles, without a reference to the plugin."""
        self.received = ignore

    async def __call__(self, data: dict[Any, Any], **options: Any) -> Any:
        """Store the data of a scatter, or refuse all of them if any handle cannot be used here."""
        data = await arrivals.finish(data)
        try:
            arrivals.insist_rebuilt(data)
        except Exception as error:
            return error_message(NotRebuilt(error), status="uncaught-error")
        keys = arrivals.unusable(data)
        if keys:
            # Returned and not raised, so that no traceback is logged: the sender repeats the scatter with bytes.
            return error_message(StaleBlock(f"{keys} cannot be mapped here"), status="uncaught-error")
        # The worker gets a dict of its own. If it keeps that dict, it holds a reference to each value, and these are
        # counted.
        answer = self._before.old(data=dict(data), **options)
        answer = await answer if inspect.isawaitable(answer) else answer
        # The values are stored now: an error here must not make the scatter fail.
        with contextlib.suppress(Exception):
            await self.received(data)
        return answer

    @property
    def __name__(self) -> str:
        return "update_data"
