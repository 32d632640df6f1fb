"""A role that could not join tries again: a place may become vacant, a file system may be emptied."""

from __future__ import annotations

from collections.abc import Callable

from tornado.ioloop import PeriodicCallback

from dask_shm_plugin.arena import Arena
from dask_shm_plugin.role import Role

_EVERY = 5.0


class Joining:
    """The attempts of one role, until it has joined or :meth:`stop`.

    Parameters
    ----------
    role
        Who wants to join.
    joined
        Called with the arena.

    Notes
    -----
    Lives on the event loop of the role.
    """

    def __init__(self, role: Role, joined: Callable[[Arena], None]) -> None:
        self._role, self._joined = role, joined
        self._again = PeriodicCallback(self._try, _EVERY * 1000)
        self._is_over = False

    async def start(self) -> None:
        """Try at once, and again as long as what keeps the role out may pass."""
        await self._try()
        if self._role.may_join_later and not self._is_over:
            self._again.start()

    async def _try(self) -> None:
        arena = await self._role.join(create=True)
        if self._is_over:
            if arena is not None:
                await self._role.leave()
            return
        if arena is not None or not self._role.may_join_later:
            self._is_over = True
            self._again.stop()
        if arena is not None:
            self._joined(arena)

    def stop(self) -> None:
        """Give up; harmless when the role has joined."""
        self._is_over = True
        self._again.stop()

    def __repr__(self) -> str:
        return f"<Joining of a {self._role.kind}, {'over' if self._is_over else 'not yet'}>"
