"""Switch sharing on by ``--preload dask_shm_plugin``, in a scheduler, nanny, worker or client."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from distributed import Client, Nanny, Scheduler, Worker

from dask_shm_plugin import config, stub
from dask_shm_plugin.plugin import SharedMemoryPlugin

logger = logging.getLogger("dask_shm_plugin")


async def dask_setup(server: Any) -> None:
    """Switch sharing on in the process that Dask started with the preload; a scheduler switches on the whole cluster.

    Parameters
    ----------
    server : Scheduler, Nanny, Worker or Client
        The object that Dask passes to a preload. A worker also switches its nanny on, and the scheduler's part; a nanny
        lets its workers preload the package.
    """
    if isinstance(server, Scheduler):
        await server.register_scheduler_plugin(SharedMemoryPlugin(), idempotent=False)
    elif isinstance(server, Worker):
        if server.nanny:
            # Not awaited, to avoid a deadlock: the nanny answers only after its worker has started, and the worker's
            # start waits for this function.
            telling = asyncio.create_task(_tell_nanny(server, str(server.nanny)))
            _TELLING.add(telling)
            telling.add_done_callback(_TELLING.discard)
        await _tell_scheduler(server)
        await server.plugin_add(stub.WorkerStub({}), name=stub.NAME)
    elif isinstance(server, Nanny):
        await server.plugin_add(stub.NannyStub({}), name=stub.NAME)
        _preload_in_workers(server)
    elif isinstance(server, Client):
        from dask_shm_plugin.roles.client import take_part

        await take_part(server, config.options({}))


def _preload_in_workers(nanny: Nanny) -> None:
    names = [nanny.preload] if isinstance(nanny.preload, str) else list(nanny.preload)
    if __package__ not in names:
        nanny.preload = [*names, __package__]
        if nanny.preload_argv and not isinstance(nanny.preload_argv[0], str):  # one list for each preload
            nanny.preload_argv = [*nanny.preload_argv, []]


async def _tell_nanny(worker: Worker, address: str) -> None:
    """Make the nanny a member of the arena, too: ``--preload`` reaches only the worker process."""
    try:
        async with worker.rpc(address) as nanny:
            await nanny.plugin_add(plugin=stub.dumps(stub.NannyStub({})), name=stub.NAME)
    except Exception:
        logger.debug("could not switch sharing on in the nanny at %s", address, exc_info=True)


async def _tell_scheduler(worker: Worker) -> None:
    """Let the scheduler place tasks by the place of their inputs."""
    try:
        await worker.scheduler.run_function(function=stub.dumps(stub.begin_scheduling))
    except Exception:
        logger.debug("the scheduler places tasks as without the plugin", exc_info=True)


_TELLING: set[asyncio.Task[None]] = set()
