"""The worker's half: publishes results when they are asked for, and answers members of its arena with handles."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
import weakref
from typing import Any

from distributed.diagnostics.plugin import WorkerPlugin
from tornado.ioloop import PeriodicCallback

from dask_shm_plugin import codec, config, fetch, lineage, metrics, reach, seams
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.codec import Published
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.joining import Joining
from dask_shm_plugin.letting_go import let_go_when_closed
from dask_shm_plugin.meters import WorkerMeter
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.publisher import Publisher
from dask_shm_plugin.role import Role
from dask_shm_plugin.scatterguard import ScatterGuard
from dask_shm_plugin.seats import switch_off, switch_on

_PRUNE_EVERY = 5.0
_PATIENCE = 0.1
"""Seconds for which a scatter waits until what it has brought can be found."""

logger = logging.getLogger("dask_shm_plugin")


class SharedMemoryWorker(WorkerPlugin):
    """Publish this worker's large values and fetch those of its neighbours from the node's arena.

    Parameters
    ----------
    capacity, threshold, publish, views, warm
        See :class:`SharedMemoryPlugin`.
    """

    name = "dask-shm"

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._joining: Joining | None = None
        self._outsider: fetch.Outsider | None = None
        self._running: _Running | None = None

    async def setup(self, worker: Any) -> None:
        """Switch on; never raises."""
        await switch_on(worker, self)

    async def teardown(self, worker: Any) -> None:
        """Switch off; values that live on stay valid."""
        await switch_off(worker, self)

    async def start(self, worker: Any) -> None:
        """Join and take over the two handlers, now or when that becomes possible."""
        options = config.options(self._options)
        role = Role("worker", worker.scheduler, worker.contact_address or worker.address, options)
        self._joining = Joining(role, lambda arena: self._joined(worker, role, arena))
        await self._joining.start()
        if self._running is None and role.kept_out_by is not None:
            self._outsider = fetch.Outsider(lambda: role.kept_out_by)

    def _joined(self, worker: Any, role: Role, arena: Arena) -> None:
        self._running = _Running(worker, role, arena)
        self._end_outsider()

    def _end_outsider(self) -> None:
        outsider, self._outsider = self._outsider, None
        if outsider is not None:
            outsider.end()

    async def stop(self) -> None:
        """Put everything back."""
        joining, self._joining = self._joining, None
        if joining is not None:
            joining.stop()
        self._end_outsider()
        running, self._running = self._running, None
        if running is not None:
            await running.stop()

    def transition(self, key: Any, start: str, finish: str, **kwargs: Any) -> None:
        """Follow what the worker holds; called by Dask in the same moment."""
        if self._running is None:
            return
        if start == "memory":
            self._running.publisher.forget(key)
        elif finish == "memory" and start in ("executing", "long-running"):
            self._running.completed(key)
        elif finish == "executing":
            self._running.begins(key)

    def report(self) -> dict[str, Any] | None:
        """Return what the arena holds and what this process did, or None where sharing is off."""
        return self._running.report() if self._running else None


class _Running:
    """The half while it is on."""

    def __init__(self, worker: Any, role: Role, arena: Arena) -> None:
        self._worker, self._role, self._arena = worker, role, arena
        self.publisher = Publisher(
            arena, role.options.threshold, worker.data, role.address, self._inputs, self._is_alone
        )
        self._background: set[asyncio.Task[Any]] = set()
        self._get_data_before = seams.Replacement(worker.handlers, "get_data", _handler_of(self, worker))
        self._meter = WorkerMeter(worker, arena)
        self._scatter_guard = ScatterGuard.around(worker.handlers, arena, self._received)
        self._pruning = PeriodicCallback(self.publisher.prune, _PRUNE_EVERY * 1000)
        self._pruning.start()
        before = COUNTERS.snapshot()
        self._counted = lambda: metrics.since(before)
        worker.metrics["shm"] = lambda worker: self._counted()
        fetch.REQUESTS.begin()

    async def stop(self) -> None:
        # Dask (2026.8.0) tells a plugin that it removes nothing more: there must never be a moment when tasks begin that
        # the publisher does not hear of. So it closes before anything is awaited.
        self._get_data_before.undo()
        self._scatter_guard.retire()
        self._pruning.stop()
        self.publisher.close()
        let_go_when_closed(self._worker, self._arena.arena_id)
        try:
            # First nobody sends handles any more, then nobody resolves them.
            await self._role.withdraw()
        finally:
            if not self._has_clients():
                self._scatter_guard.undo()
            fetch.REQUESTS.end()
            self._worker.metrics.pop("shm", None)
            self._meter.stop()
            # It refers to this object, and to the values: whoever still answers sends bytes, and nobody waits for the
            # garbage collector.
            del self.publisher, self._pruning
            await self._role.leave()

    def _has_clients(self) -> bool:
        with contextlib.suppress(SharedMemoryError):
            return any(role.kind == "client" for role in self._arena.roster.roles())
        return False

    def completed(self, key: Any) -> None:
        """Publish the result of a task, if that is wanted at this moment."""
        if self._role.options.publish == "on-completion":
            value = seams.in_memory(self._worker.data, key)
            # What is not known to be large waits for a request: it might not even be possible to serialize it.
            if value is not None and self._size(key) >= self._role.options.threshold:
                self._publish_soon(key, value)

    async def _received(self, data: dict[Any, Any]) -> None:
        """List what was scattered and lies in the arena, so that nobody need ask for it."""
        shared = {
            key: value
            for key, value in data.items()
            if self._size(key) >= self._role.options.threshold and reach.rows_of(value, self._arena.arena_id)
        }
        # All other workers may be about to look for it: they are told as soon as this is done.
        if shared:
            await asyncio.wait([self._publish_soon(*item) for item in shared.items()], timeout=_PATIENCE)

    def _publish_soon(self, key: Any, value: object) -> asyncio.Task[None]:
        task = asyncio.create_task(self._publish_unasked(key, value))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def begins(self, key: Any) -> None:
        """Let nobody rely on the inputs of a task that begins: it may change them in place."""
        task = self._worker.state.tasks.get(key)
        if task is not None:
            self.publisher.task_begins(dependency.key for dependency in task.dependencies)

    def _inputs(self) -> set[Any]:
        inputs = [one for task in self._worker.state.all_running_tasks for one in task.dependencies]
        # A cancelled task runs on with what was released since, and which other keys have that object nobody knows.
        is_unknown = any(one.state != "memory" for one in inputs)
        return {one.key for one in inputs} | (set(self._worker.state.tasks) if is_unknown else set())

    def _is_alone(self, keys: frozenset[Any], value: object, is_apart: bool) -> bool:
        state, data = self._worker.state, self._worker.data
        tasks = [state.tasks[key] for key in keys if key in state.tasks]
        if not is_apart and any(task.dependencies for task in tasks):
            return False
        return lineage.is_alone(
            tasks, value, lambda key: state.actors[key] if key in state.actors else seams.in_memory(data, key)
        )

    async def _publish_unasked(self, key: Any, value: object) -> None:
        try:
            await self.publisher.publish(key, value, self._size(key))
        except Exception:
            logger.debug("%r is not published", key, exc_info=True)

    async def answer(self, comm: Any, keys: Any, who: str | None = None, serializers: list[str] | None = None) -> Any:
        """Stand in for ``Worker.get_data``."""
        asked_by, serializers = seams.untag(serializers)
        kept: list[Published] = []
        if fetch.is_member(self._arena, asked_by) and not comm.peer_address.startswith("inproc://"):
            comm = _HandingOver(comm, self, kept)
        elif fetch.BYTES_PLEASE not in asked_by:
            self._count_as_sent(keys, fetch.why_no_member(asked_by))
        try:
            return await self._get_data_before.old(comm, keys, who=who, serializers=serializers)
        except Exception as error:
            _let_go_of_values(error)
            raise
        finally:
            kept.clear()

    def _count_as_sent(self, keys: Any, reason: str) -> None:
        for key in keys:
            size = self._size(key)
            if size >= self._role.options.threshold:
                COUNTERS.count_sent(reason, size)

    async def share(self, data: dict[Any, Any], keep: list[Published]) -> dict[Any, Any]:
        """Return the data of an answer with handles in the place of what is shared."""
        unknown = [key for key, wrapped in data.items() if self._may_be_large(key, wrapped.data)]
        if not unknown:
            return data
        small = {key: self.publisher.small(key, data[key].data, self._size(key)) for key in unknown}
        large = [key for key, serialized in small.items() if serialized is None]
        shared = await asyncio.gather(*(self._share(key, data[key], keep) for key in large))
        return {**data, **small, **dict(zip(large, shared, strict=True))}

    def _may_be_large(self, key: Any, value: object) -> bool:
        is_actor = key in self._worker.state.actors
        return not is_actor and codec.may_be_large(value, self._size(key), self._role.options.threshold)

    async def _share(self, key: Any, wrapped: Any, keep: list[Published]) -> Any:
        try:
            published = await self.publisher.publish(key, wrapped.data, self._size(key))
        except Exception:
            logger.debug("%r goes as bytes", key, exc_info=True)
            COUNTERS.count_sent(SharedMemoryError.reason, self._size(key))
            return wrapped
        if published is None:
            return wrapped
        if not isinstance(published, Published):
            return published
        keep.append(published)
        return published.message

    def _size(self, key: Any) -> int:
        task = self._worker.state.tasks.get(key)
        return (task.nbytes or 0) if task else 0

    def report(self) -> dict[str, Any]:
        """Return what the arena holds and what this process did."""
        said = self._role.report(self._arena, self._counted())
        return {"worker": self._worker.address, "host": self._worker.ip, **said}


def _handler_of(running: _Running, worker: Any) -> Any:
    """Return what answers requests for data as long as the half is on.

    It refers to the half weakly, for Dask (2026.8.0) keeps every handler that it has ever called in caches that tell of
    functions whether they are coroutines, and what arguments they take (``iscoroutinefunction``, ``has_keyword``).
    """
    half, before = weakref.ref(running), worker.handlers["get_data"]

    async def get_data(comm: Any, keys: Any, who: str | None = None, serializers: list[str] | None = None) -> Any:
        running = half()
        answer = before if running is None else running.answer
        return await answer(comm, keys, who=who, serializers=serializers)

    return get_data


def _let_go_of_values(error: BaseException | None) -> None:
    """Clear the local variables behind an error of a hand-over.

    A worker's log keeps the records of its last 10,000 messages, this one with its traceback, and so the values that were
    on their way when the asker died (``DequeHandler`` in distributed/utils.py, 2026.8.0): their blocks would stay as
    long as the worker.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class _HandingOver:
    """The connection of one request: what is written to it goes as handles, and is kept until the asker has it."""

    def __init__(self, comm: Any, running: _Running, kept: list[Published]) -> None:
        self._comm, self._running, self._kept = comm, running, kept

    @step("answer")
    async def write(self, message: Any, serializers: list[str] | None = None) -> Any:
        if message.get("status") == "OK":
            try:
                message = {**message, "data": await self._running.share(message["data"], self._kept)}
            except Exception:
                logger.debug("an answer goes as bytes", exc_info=True)
        return await self._comm.write(message, serializers=serializers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)
