"""The nanny's role: it creates the node's arena or joins it, and terminates its worker by private memory."""

from __future__ import annotations

from typing import Any

from distributed.diagnostics.plugin import NannyPlugin

from dask_shm_plugin import config
from dask_shm_plugin.accounting.meters import NannyMeter
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.roles.role import Joining, Role
from dask_shm_plugin.roles.switch import switch_off, switch_on


class SharedMemoryNanny(NannyPlugin):
    """Create the node's arena, or join it, for as long as the nanny runs; terminate the worker by its private memory.

    Parameters
    ----------
    capacity, threshold, publish, views, warm
        See :class:`SharedMemoryPlugin`. Settings that are not given come from Dask's configuration, namespace ``shm``.
    """

    name = "dask-shm"

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._role: Role | None = None
        self._joining: Joining | None = None
        self._meter: NannyMeter | None = None

    async def setup(self, nanny: Any) -> None:
        """Switch sharing on in a nanny; never raises."""
        await switch_on(nanny, self)

    async def teardown(self, nanny: Any) -> None:
        """Switch sharing off in a nanny; the arena lives as long as it has members."""
        await switch_off(nanny, self)

    async def start(self, nanny: Any) -> None:
        """Join the arena, now or as soon as that is possible."""
        role = Role("nanny", nanny.scheduler, nanny.address, config.options(self._options))
        self._joining = Joining(role, lambda arena: self._joined(nanny, role, arena))
        await self._joining.start()

    def _joined(self, nanny: Any, role: Role, arena: Arena) -> None:
        self._role, self._meter = role, NannyMeter(nanny, arena)

    async def stop(self) -> None:
        """Leave the arena, and put Dask's memory monitor back in place."""
        joining, role, meter = self._joining, self._role, self._meter
        self._joining = self._role = self._meter = None
        if joining is not None:
            joining.stop()
        if role is not None and meter is not None:
            meter.stop()
            await role.leave()
