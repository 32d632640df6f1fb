"""``--preload dask_shm_plugin``: what it means for a scheduler, a nanny, a worker or a client."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from distributed import Client, Nanny, Scheduler, Worker

from dask_shm_plugin import config, stub
from dask_shm_plugin.plugin import SharedMemoryPlugin

logger = logging.getLogger("dask_shm_plugin")


async def dask_setup(server: Any) -> None:
    """Switch on what was started with the preload; a scheduler switches the whole cluster on."""
    if isinstance(server, Scheduler):
        await server.register_scheduler_plugin(SharedMemoryPlugin(), idempotent=False)
    elif isinstance(server, Worker):
        if server.nanny:
            # Not awaited: the nanny answers nothing before its worker has started, which waits for us.
            telling = asyncio.create_task(_tell_nanny(server, str(server.nanny)))
            _TELLING.add(telling)
            telling.add_done_callback(_TELLING.discard)
        await server.plugin_add(stub.WorkerStub({}), name=stub.NAME)
    elif isinstance(server, Nanny):
        await server.plugin_add(stub.NannyStub({}), name=stub.NAME)
    elif isinstance(server, Client):
        from dask_shm_plugin.client import take_part

        await take_part(server, config.options({}))


async def _tell_nanny(worker: Worker, address: str) -> None:
    """Let the nanny share the keeping of the arena: ``--preload`` reaches only the worker process."""
    try:
        async with worker.rpc(address) as nanny:
            await nanny.plugin_add(plugin=stub.dumps(stub.NannyStub({})), name=stub.NAME)
    except Exception:
        logger.debug("the nanny at %s could not be told", address, exc_info=True)


_TELLING: set[asyncio.Task[None]] = set()
