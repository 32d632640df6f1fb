"""What nanny, worker and client have in common: becoming a member, and saying once why not."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from dask_shm_plugin import handles, limits, membership, seams
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.config import Options
from dask_shm_plugin.exceptions import SharedMemoryError, SwitchedOff
from dask_shm_plugin.notices import warn_once
from dask_shm_plugin.threads import in_thread

logger = logging.getLogger("dask_shm_plugin")
_shown_by_dask = logging.getLogger("distributed.shm")
"""Under this name Dask's own configuration shows what is said at level INFO, as it does for nannies and workers."""


class _Plan:
    """How large an arena shall be, and why, if one has to be made."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self.chosen: str | None = None

    def capacity(self) -> int:
        """Return the capacity of a new arena."""
        limit, left = limits.tightest(), limits.least_left()
        self.chosen = (
            f"shm.capacity is {self._options.capacity!r}; the limit is {limit.size} bytes ({limit.name}); "
            f"now {left.size} bytes can be had ({left.name})"
        )
        return self._options.capacity_here()


class Role:
    """One role of this process in one cluster.

    Parameters
    ----------
    kind
        "nanny", "worker" or "client".
    scheduler
        The rpc to the scheduler, which knows the cluster's name.
    address
        Where the role listens.
    options
        The settings.
    """

    def __init__(self, kind: str, scheduler: Any, address: str, options: Options) -> None:
        self.kind, self.address, self.options = kind, address, options
        self._scheduler = scheduler
        self.cluster: str | None = None
        self.may_join_later = False
        """Whether what kept this role out may pass."""
        self.kept_out_by: str | None = None
        """The reason, as counters name it, why this role is in no arena although it tried."""

    async def join(self, *, create: bool) -> Arena | None:
        """Join the arena of this node, or make it; return None when there is none or it cannot be used."""
        reason = seams.why_not()
        if reason:
            warn_once(f"Sharing is off: {reason}")
            return None
        try:
            if self.cluster is None:
                self.cluster = await seams.cluster_of(self._scheduler)
            arena = await in_thread(self._join, self.cluster, create=create)
            # Until then, what kept it out before is what keeps it out.
            self.may_join_later, self.kept_out_by = False, None
            return arena
        except SharedMemoryError as error:
            self.may_join_later, self.kept_out_by = not isinstance(error, SwitchedOff), error.reason
            warn_once(f"Sharing is off in this process: {error}")
        except Exception as error:
            self.may_join_later, self.kept_out_by = False, SharedMemoryError.reason
            warn_once(f"Sharing is off in this process: {type(error).__name__}: {error}")
            logger.debug("could not join", exc_info=True)
        return None

    def _join(self, cluster: str, *, create: bool) -> Arena | None:
        if self.options.capacity_here() == 0:
            raise SwitchedOff("shm.capacity is zero")
        plan = _Plan(self.options)
        capacity = plan.capacity if create else None
        arena = membership.join(cluster, self.kind, self.address, capacity=capacity, warm=self.options.warm, owner=self)
        if arena is not None:
            handles.set_views(arena.arena_id, self.options.views)
            if plan.chosen is not None:
                kind = arena.segment.kind
                _shown_by_dask.info("made an arena for %d bytes (%s): %s", arena.capacity, kind, plan.chosen)
        return arena

    def report(self, arena: Arena, counters: dict[str, Any]) -> dict[str, Any]:
        """Return what this process did, and what the arena holds unless somebody who stands still has its lock."""
        report: dict[str, Any] = {
            "arena": arena.arena_id.hex(),
            "process": f"{arena.member.slot}:{arena.member.incarnation}",
            "counters": counters,
        }
        with contextlib.suppress(SharedMemoryError, OSError):
            stats, left = arena.stats(), limits.least_left()
            free = stats.capacity - stats.used
            room, bound_by = min((free, "shm.capacity"), (max(0, left.size), left.name))
            report.update(stats._asdict(), room=room, bound_by=bound_by)
        return report

    async def withdraw(self) -> None:
        """Let others not find the role any more; the membership stays until :meth:`leave`."""
        if self.cluster is not None:
            await in_thread(membership.withdraw, self.cluster, self.kind, self.address)

    async def leave(self) -> None:
        """End the role."""
        if self.cluster is not None:
            await in_thread(membership.leave, self.cluster, self.kind, self.address, owner=self)
