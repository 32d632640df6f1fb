"""What is really registered: small classes that travel by value and import this package where they arrive.

A node without the package, or with one that cannot start, must go on as before. So nothing here refers to the package
at import, and no ``setup`` raises.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import cloudpickle
from distributed.diagnostics.plugin import NannyPlugin, SchedulerPlugin, WorkerPlugin

NAME = "dask-shm"


def dumps(item: Any) -> bytes:
    """Pickle something of this module by value."""
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(item))
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def _half(module: str, name: str, options: dict[str, Any]) -> Any:
    """Return the real plugin, or None with a warning."""
    import importlib

    try:
        return getattr(importlib.import_module(f"dask_shm_plugin.{module}"), name)(**options)
    except Exception as error:
        logging.getLogger("dask_shm_plugin").warning(
            "Sharing is off in this process: %s: %s. Install the same dask_shm_plugin everywhere.",
            type(error).__name__,
            error,
        )
        return None


class NannyStub(NannyPlugin):
    """Becomes a ``SharedMemoryNanny`` where the package is."""

    name = "dask-shm"

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.half: Any = None

    async def setup(self, nanny: Any) -> None:
        """Become the real half, and set it up."""
        self.half = _half("nanny", "SharedMemoryNanny", self.options)
        if self.half is not None:
            await self.half.setup(nanny)

    async def teardown(self, nanny: Any) -> None:
        """Pass on."""
        if self.half is not None:
            await self.half.teardown(nanny)


class WorkerStub(WorkerPlugin):
    """Becomes a ``SharedMemoryWorker`` where the package is."""

    name = "dask-shm"

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.half: Any = None

    async def setup(self, worker: Any) -> None:
        """Become the real half, and set it up."""
        self.half = _half("worker", "SharedMemoryWorker", self.options)
        if self.half is not None:
            await self.half.setup(worker)

    async def teardown(self, worker: Any) -> None:
        """Pass on."""
        if self.half is not None:
            await self.half.teardown(worker)

    def transition(self, key: Any, start: str, finish: str, **kwargs: Any) -> None:
        """Pass on."""
        if self.half is not None:
            self.half.transition(key, start, finish, **kwargs)


class SchedulerStub(SchedulerPlugin):
    """Installs the other two on present and future nannies and workers. Needs no package at the scheduler."""

    name = "dask-shm"

    def __init__(self, nanny: bytes, worker: bytes) -> None:
        self.nanny, self.worker = nanny, worker

    async def start(self, scheduler: Any) -> None:
        """Install both halves."""
        # A second registration takes the place of the first, without Dask's warning about it.
        scheduler.plugins.pop(self.name, None)
        await install(scheduler, self.name, self.nanny, self.worker)


async def install(scheduler: Any, name: str, nanny: bytes, worker: bytes) -> None:
    """Register both halves; nannies first, so that their arena is there when the workers look for it."""
    import logging

    for register, plugin in (
        (scheduler.register_nanny_plugin, nanny),
        (scheduler.register_worker_plugin, worker),
    ):
        try:
            await register(None, plugin, name, idempotent=False)
        except Exception:
            # Somebody closed while being told; the plugin stays registered for all others.
            logging.getLogger("dask_shm_plugin").info("not everybody could be told", exc_info=True)


def report(dask_worker: Any) -> dict[str, Any] | None:
    """Return what a worker has to say about its arena; runs on workers."""
    plugin = dask_worker.plugins.get("dask-shm")
    half = getattr(plugin, "half", plugin)
    said: dict[str, Any] | None = half.report() if half is not None else None
    return said


async def remove(dask_worker: Any) -> None:
    """Switch a worker off that was switched on by a preload; runs on workers."""
    if "dask-shm" not in dask_worker.plugins:
        return
    await dask_worker.plugin_remove("dask-shm")
    if dask_worker.nanny:
        async with dask_worker.rpc(dask_worker.nanny) as nanny:
            await nanny.run(function=dumps(drop_from_nanny), wait=True)


async def drop_from_nanny(dask_worker: Any) -> None:
    """Switch a nanny off; runs on nannies, which Dask also calls by that name."""
    if "dask-shm" in dask_worker.plugins:
        await dask_worker.plugin_remove("dask-shm")
