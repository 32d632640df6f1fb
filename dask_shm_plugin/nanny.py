"""The nanny's half: it creates the node's arena, owns it, and cleans up behind dead members."""

from __future__ import annotations

from typing import Any

from distributed.diagnostics.plugin import NannyPlugin

from dask_shm_plugin import config
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.joining import Joining
from dask_shm_plugin.meters import NannyMeter
from dask_shm_plugin.role import Role
from dask_shm_plugin.seats import switch_off, switch_on


class SharedMemoryNanny(NannyPlugin):
    """Create the node's arena, or join it, for as long as the nanny runs.

    Parameters
    ----------
    capacity, threshold, publish, views, warm
        See :class:`SharedMemoryPlugin`.
    """

    name = "dask-shm"

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._role: Role | None = None
        self._joining: Joining | None = None
        self._meter: NannyMeter | None = None

    async def setup(self, nanny: Any) -> None:
        """Switch on; never raises."""
        await switch_on(nanny, self)

    async def teardown(self, nanny: Any) -> None:
        """Switch off; the arena lives on as long as it has members."""
        await switch_off(nanny, self)

    async def start(self, nanny: Any) -> None:
        """Join, now or when that becomes possible."""
        role = Role("nanny", nanny.scheduler, nanny.address, config.options(self._options))
        self._joining = Joining(role, lambda arena: self._joined(nanny, role, arena))
        await self._joining.start()

    def _joined(self, nanny: Any, role: Role, arena: Arena) -> None:
        self._role, self._meter = role, NannyMeter(nanny, arena)

    async def stop(self) -> None:
        """Leave."""
        joining, role, meter = self._joining, self._role, self._meter
        self._joining = self._role = self._meter = None
        if joining is not None:
            joining.stop()
        if role is not None and meter is not None:
            meter.stop()
            await role.leave()
