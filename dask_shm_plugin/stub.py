"""The plugins that are registered with Dask: small classes, pickled by value, that import the package on arrival.

A node must work as before if it lacks the package or if the package cannot be imported there. So this module imports
nothing of the package, and no ``setup`` raises on that account.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import cloudpickle
from distributed.diagnostics.plugin import NannyPlugin, SchedulerPlugin, WorkerPlugin

NAME = "dask-shm"


def dumps(item: Any) -> bytes:
    """Pickle an object of this module by value, so that it can be unpickled without the package."""
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(item))
    finally:
        cloudpickle.unregister_pickle_by_value(module)


SCHEDULING = "dask-shm-scheduling"


def _half(name: str, options: dict[str, Any], otherwise: str = "Sharing is off in this process") -> Any:
    """Return a new instance of the real plugin class, or None after a warning if that fails."""
    import importlib

    try:
        return getattr(importlib.import_module("dask_shm_plugin"), name)(**options)
    except Exception as error:
        logging.getLogger("dask_shm_plugin").warning(
            "%s: %s: %s. Install the same dask_shm_plugin everywhere.",
            otherwise,
            type(error).__name__,
            error,
        )
        return None


class NannyStub(NannyPlugin):
    """Delegates to a ``SharedMemoryNanny`` where the package is installed, and does nothing elsewhere."""

    name = "dask-shm"

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.half: Any = None

    async def setup(self, nanny: Any) -> None:
        """Create the real plugin and set it up."""
        self.half = _half("SharedMemoryNanny", self.options)
        if self.half is not None:
            await self.half.setup(nanny)

    async def teardown(self, nanny: Any) -> None:
        """Tear the real plugin down."""
        if self.half is not None:
            await self.half.teardown(nanny)


_TO = frozenset(("memory", "error", "rescheduled"))
_FROM = frozenset(("memory", "error", "cancelled", "resumed"))
"""States of a task; the real plugin is told of transitions to one of the first, or from one of the second."""


class WorkerStub(WorkerPlugin):
    """Delegates to a ``SharedMemoryWorker`` where the package is installed, and does nothing elsewhere."""

    name = "dask-shm"

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.half: Any = None

    async def setup(self, worker: Any) -> None:
        """Create the real plugin and set it up."""
        self.half = _half("SharedMemoryWorker", self.options)
        if self.half is not None:
            await self.half.setup(worker)

    async def teardown(self, worker: Any) -> None:
        """Tear the real plugin down."""
        if self.half is not None:
            await self.half.teardown(worker)

    def transition(self, key: Any, start: str, finish: str, **kwargs: Any) -> None:
        """Forward a task's transition to or from memory, and that of a task that may have failed, to the real plugin."""
        # Each task makes about five transitions, and two of them matter.
        if self.half is not None and (finish in _TO or start in _FROM):
            self.half.transition(key, start, finish)


class OwnsScheduling(SchedulerPlugin):
    """Forwards to the scheduler's half: Dask calls each plugin in each transition of each task, so there is only one."""

    name = "dask-shm"
    half: Any = None
    _scheduler: Any = None

    async def begin(self, scheduler: Any, nanny: bytes, worker: bytes) -> None:
        """Register the other two stubs, and take over the scheduler's half."""
        # Removed first: Dask warns when a registration replaces a plugin of the same name.
        before = scheduler.plugins.pop(self.name, None)
        await begin_scheduling(scheduler)  # a plugin of its own hears what workers tell during the registration
        await install(scheduler, self.name, nanny, worker)
        self._scheduler = scheduler
        show(scheduler)
        self.half = scheduler.extensions.get(SCHEDULING)
        for name in (SCHEDULING, self.name):  # another client may have registered meanwhile
            scheduler.plugins.pop(name, None)
        if before is self:  # given to the scheduler's constructor, and not to be added after this
            scheduler.plugins[self.name] = self

    def log_event(self, topic: str, msg: Any) -> None:
        """Forward an event of the scheduler's log."""
        if self.half is not None:
            self.half.log_event(topic, msg)

    def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
        """Forward that a worker is gone."""
        if self.half is not None:
            self.half.remove_worker(scheduler, worker)

    async def close(self) -> None:
        """Put everything back in place: the scheduler closes."""
        if self.half is not None:
            self.half.stop()
        if self._scheduler is not None:
            hide(self._scheduler)


class SchedulerStub(OwnsScheduling):
    """Registers the other two stubs for all present and future nannies and workers.

    Without the package, the scheduler does no more than this.
    """

    def __init__(self, nanny: bytes, worker: bytes) -> None:
        self.nanny, self.worker = nanny, worker

    async def start(self, scheduler: Any) -> None:
        """Register both stubs with the scheduler that runs this plugin."""
        await self.begin(scheduler, self.nanny, self.worker)


async def install(scheduler: Any, name: str, nanny: bytes, worker: bytes) -> None:
    """Register both stubs with a scheduler, nannies first: their arena then exists when the workers look for it."""
    import logging

    for register, plugin in (
        (scheduler.register_nanny_plugin, nanny),
        (scheduler.register_worker_plugin, worker),
    ):
        try:
            await register(None, plugin, name, idempotent=False)
        except Exception:
            # A nanny or worker closed during the broadcast. The plugin stays registered for all others.
            logging.getLogger("dask_shm_plugin").info("the plugin did not reach every nanny or worker", exc_info=True)


async def begin_scheduling(dask_scheduler: Any) -> None:
    """Let a scheduler place tasks by the place of their inputs, if its process has the package; runs on the scheduler."""
    half = dask_scheduler.extensions.get(SCHEDULING)
    if half is None or not half.is_on:
        stop_scheduling(dask_scheduler)
        half = _half("SharedMemoryScheduler", {}, "Tasks are placed as without the plugin")
        if half is None:
            return
        dask_scheduler.extensions[SCHEDULING] = half
        await half.start(dask_scheduler)
    if getattr(dask_scheduler.plugins.get(NAME), "half", None) is not half:
        dask_scheduler.plugins[SCHEDULING] = half


def stop_scheduling(dask_scheduler: Any) -> None:
    """Undo :func:`begin_scheduling`; runs on the scheduler."""
    dask_scheduler.plugins.pop(SCHEDULING, None)
    half = dask_scheduler.extensions.pop(SCHEDULING, None)
    if half is not None:
        half.stop()


def report_of_scheduler(dask_scheduler: Any) -> dict[str, Any]:
    """Return the figures that a scheduler has for each arena; runs on the scheduler."""
    half = dask_scheduler.extensions.get(SCHEDULING)
    said: dict[str, Any] = half.report() if half is not None else {}
    return said


def show(scheduler: Any) -> None:
    """Show the arenas in the scheduler's dashboard and metrics, if the package is installed there."""
    import contextlib
    import importlib

    with contextlib.suppress(ImportError):
        importlib.import_module("dask_shm_plugin.monitor.scheduler").show(scheduler)


def hide(dask_scheduler: Any) -> None:
    """Undo :func:`show`; runs on the scheduler."""
    import sys

    monitor = sys.modules.get("dask_shm_plugin.monitor.scheduler")
    if monitor is not None:
        monitor.hide(dask_scheduler)


def report(dask_worker: Any) -> dict[str, Any] | None:
    """Return a worker's report about its arena, or None if it does not share; runs on the worker."""
    plugin = dask_worker.plugins.get("dask-shm")
    half = getattr(plugin, "half", plugin)
    said: dict[str, Any] | None = half.report() if half is not None else None
    return said


def explain(dask_worker: Any, key: Any) -> dict[str, str]:
    """Return a worker's explanation of one value; runs on the worker."""
    plugin = dask_worker.plugins.get("dask-shm")
    half = getattr(plugin, "half", plugin)
    if half is None:
        return {"state": "off", "why": "the plugin is not registered in this worker, or the package is missing there"}
    said: dict[str, str] = half.explain(key)
    return said


async def remove(dask_worker: Any) -> None:
    """Switch sharing off in a worker, and in its nanny, if a preload switched it on; runs on the worker."""
    if "dask-shm" not in dask_worker.plugins:
        return
    await dask_worker.plugin_remove("dask-shm")
    if dask_worker.nanny:
        async with dask_worker.rpc(dask_worker.nanny) as nanny:
            await nanny.run(function=dumps(drop_from_nanny), wait=True)


async def drop_from_nanny(dask_worker: Any) -> None:
    """Switch sharing off in a nanny; runs on the nanny, which ``run`` also passes as ``dask_worker``."""
    if "dask-shm" in dask_worker.plugins:
        await dask_worker.plugin_remove("dask-shm")
