"""Join the arena on behalf of a nanny, worker or client; warn once with the reason if that fails."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

from tornado.ioloop import PeriodicCallback

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.config import Options
from dask_shm_plugin.exceptions import SharedMemoryError, SwitchedOff
from dask_shm_plugin.linux import limits
from dask_shm_plugin.node import membership
from dask_shm_plugin.notices import warn_once
from dask_shm_plugin.roles.capacity import CapacityPlan
from dask_shm_plugin.seams import checks, requests
from dask_shm_plugin.threads import in_thread

logger = logging.getLogger("dask_shm_plugin")
_RETRY_INTERVAL_S = 5.0
"""Seconds between two attempts to join."""

_shown_by_dask = logging.getLogger("distributed.shm")
"""Dask's own configuration shows messages of level INFO of this logger, as it does for nannies and workers."""


class Role:
    """One role of this process in one cluster.

    Parameters
    ----------
    kind
        "nanny", "worker" or "client".
    scheduler
        The rpc to the scheduler. Its id names the cluster.
    address
        The address at which the role listens; for a client, its id.
    options
        The settings.
    """

    def __init__(self, kind: str, scheduler: Any, address: str, options: Options) -> None:
        self.kind, self.address, self.options = kind, address, options
        self._scheduler = scheduler
        self.cluster: str | None = None
        self.may_join_later = False
        """Whether the reason that keeps this role out of the arena may pass."""
        self.kept_out_by: str | None = None
        """The reason, by its name in the counters, why the last attempt to join failed; None if none failed."""

    async def join(self, *, create: bool) -> Arena | None:
        """Join the arena of this node; return None if that is not possible.

        Parameters
        ----------
        create
            Whether to create the arena if there is none.
        """
        reason = checks.why_not()
        if reason:
            warn_once(f"Sharing is off: {reason}")
            return None
        try:
            if self.cluster is None:
                self.cluster = await requests.cluster_of(self._scheduler)
            arena = await in_thread(self._join, self.cluster, create=create)
            # Cleared only now: until an attempt has succeeded, the earlier reason is the present one.
            self.may_join_later, self.kept_out_by = False, None
            return arena
        except SharedMemoryError as error:
            self.may_join_later, self.kept_out_by = not isinstance(error, SwitchedOff), error.reason
            warn_once(f"Sharing is off in this process: {error}")
        except Exception as error:
            self.may_join_later, self.kept_out_by = False, SharedMemoryError.reason
            warn_once(f"Sharing is off in this process: {type(error).__name__}: {error}")
            logger.debug("could not join the arena", exc_info=True)
        return None

    def _join(self, cluster: str, *, create: bool) -> Arena | None:
        if self.options.capacity_here() == 0:
            raise SwitchedOff("shm.capacity is zero")
        plan = CapacityPlan(self.options)
        capacity = plan.capacity if create else None
        warm, is_share = self.options.warm, self.options.is_share
        arena = membership.join(
            cluster, self.kind, self.address, capacity=capacity, warm=warm, owner=self, is_share=is_share
        )
        if arena is not None:
            arena.has_writeable_views = self.options.views == "copy-on-write"
            if plan.chosen is not None:
                kind = arena.segment.kind
                _shown_by_dask.info("made an arena for %d bytes (%s): %s", arena.capacity, kind, plan.chosen)
        return arena

    def report(self, arena: Arena, counters: dict[str, Any]) -> dict[str, Any]:
        """Return the counters of this process, and the state of the arena.

        The state is left out if it cannot be read, for example because a stopped process holds the arena's lock.
        """
        report: dict[str, Any] = {
            "arena": arena.arena_id.hex(),
            "process": f"{arena.member.slot}:{arena.member.incarnation}",
            "counters": counters,
        }
        with contextlib.suppress(SharedMemoryError, OSError):
            stats, left = arena.stats(), limits.least_left()
            free = max(0, stats.capacity - stats.used)  # the capacity may have been divided
            room, bound_by = min((free, "shm.capacity"), (max(0, left.size), left.name))
            report.update(stats._asdict(), room=room, bound_by=bound_by)
        return report

    async def withdraw(self) -> None:
        """Remove the role from the arena's table, so that other members do not find it; the process stays a member."""
        if self.cluster is not None:
            await in_thread(membership.withdraw, self.cluster, self.kind, self.address)

    async def leave(self) -> None:
        """End the role; with its last role, the process leaves the arena."""
        if self.cluster is not None:
            await in_thread(membership.leave, self.cluster, self.kind, self.address, owner=self)


class Joining:
    """The attempts of one role to join, until it has joined or :meth:`stop` is called.

    Parameters
    ----------
    role
        The role that is to join.
    joined
        Called with the arena when the role has joined.

    Notes
    -----
    To be used on the event loop of the role.
    """

    def __init__(self, role: Role, joined: Callable[[Arena], None]) -> None:
        self._role, self._joined = role, joined
        self._again = PeriodicCallback(self._try, _RETRY_INTERVAL_S * 1000)
        self._is_over = False

    async def start(self) -> None:
        """Try at once, and then every 5 s as long as the reason that keeps the role out may pass."""
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
        """Stop trying; harmless if the role has joined."""
        self._is_over = True
        self._again.stop()

    def __repr__(self) -> str:
        return f"<Joining of a {self._role.kind}, {'over' if self._is_over else 'not yet'}>"
