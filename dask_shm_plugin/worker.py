"""The worker's half: publishes results when they are asked for, and answers members of its arena with handles."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import weakref
from typing import Any

from dask.utils import has_keyword
from distributed.diagnostics.plugin import WorkerPlugin
from tornado.ioloop import PeriodicCallback

from dask_shm_plugin import codec, config, fetch, metrics, reach, seams
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.codec import Published, Serialized
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.entries import Ask
from dask_shm_plugin.exceptions import SharedMemoryError, forget_values
from dask_shm_plugin.joining import Joining
from dask_shm_plugin.letting_go import let_go_when_closed
from dask_shm_plugin.meters import WorkerMeter
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.publisher import Publisher, Serialize
from dask_shm_plugin.role import Role
from dask_shm_plugin.scatterguard import ScatterGuard
from dask_shm_plugin.seats import switch_off, switch_on
from dask_shm_plugin.worker_data import WorkerData

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
        if self._running is not None and finish == "memory" and start in ("executing", "long-running"):
            self._running.completed(key)

    def report(self) -> dict[str, Any] | None:
        """Return what the arena holds and what this process did, or None where sharing is off."""
        return self._running.report() if self._running else None


class _Running:
    """The half while it is on."""

    def __init__(self, worker: Any, role: Role, arena: Arena) -> None:
        self._worker, self._role, self._arena = worker, role, arena
        self._data = WorkerData.of(worker)
        self.publisher = Publisher(arena, role.options.threshold, self._data, role.address)
        self._get_data_before = seams.Replacement(worker.handlers, "get_data", _handler_of(self, worker))
        self._meter = WorkerMeter(worker, arena)
        self._scatter_guard = ScatterGuard.around(worker.handlers, arena, self._received)
        self._pruning = PeriodicCallback(self.prune, _PRUNE_EVERY * 1000)
        self._pruning.start()
        before = COUNTERS.snapshot()
        self._counted = lambda: metrics.since(before)
        worker.metrics["shm"] = lambda worker: self._counted()
        fetch.REQUESTS.begin()

    async def stop(self) -> None:
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
            del self._pruning  # which refers to this object: nobody waits for the garbage collector
            await self._role.leave()

    def _has_clients(self) -> bool:
        with contextlib.suppress(SharedMemoryError):
            return any(role.kind == "client" for role in self._arena.roster.roles())
        return False

    def completed(self, key: Any) -> None:
        """Publish the result of a task, if that is wanted at this moment."""
        # What is not known to be large waits for a request: it might not even be possible to serialize it.
        if self._role.options.publish == "on-completion" and self._is_large(key):
            self.publisher.offer(key, _serialize_unasked)

    async def _received(self, data: dict[Any, Any]) -> None:
        """List what was scattered and lies in the arena, so that nobody need ask for it."""
        shared = [key for key in data if self._is_large(key) and reach.rows_of(data[key], self._arena.arena_id)]
        # All other workers may be about to look for it: they are told as soon as this is done.
        if shared:
            # The message that brought a value has a reference to it.
            offers = [self.publisher.offer(key, _serialize_unasked, known=1) for key in shared]
            for offer in offers:
                offer.add_done_callback(functools.partial(_keep, data))  # until they are done
            await asyncio.wait(offers, timeout=_PATIENCE)

    def prune(self) -> None:
        """Let no value keep two copies for ever."""
        self.publisher.prune(_serialize_unasked)

    async def answer(self, comm: Any, keys: Any, serializers: list[str] | None = None, **options: Any) -> Any:
        """Stand in for ``Worker.get_data``."""
        asked_by, serializers = seams.untag(serializers)
        if not fetch.is_member(self._arena, asked_by) or comm.peer_address.startswith("inproc://"):
            if fetch.BYTES_PLEASE not in asked_by:
                self._count_as_sent(keys, fetch.why_no_member(asked_by))
            return await _call(self._get_data_before.old, comm, keys, serializers, options)
        ask = self.publisher.ask(list(filter(self._is_large, keys)))
        kept: list[Published] = []
        try:
            comm = _HandingOver(comm, self, ask, kept)
            return await _call(self._get_data_before.old, comm, keys, serializers, options)
        except Exception as error:
            forget_values(error)
            raise
        finally:
            kept.clear()
            self.publisher.answered(ask)

    def _count_as_sent(self, keys: Any, reason: str) -> None:
        for key in keys:
            if self._is_large(key):
                COUNTERS.count_sent(reason, self._size(key))

    async def share(self, comm: Any, data: dict[Any, Any], keep: list[Published]) -> dict[Any, Any]:
        """Return the data of an answer with handles in the place of what is shared.

        Parameters
        ----------
        comm
            The connection.
        data
            The values, as Dask would write them to it.
        keep
            Gets what is published: to be kept until the asker has resolved the handles.
        """
        unknown = [key for key, wrapped in data.items() if self._may_be_large(key, wrapped.data)]
        if not unknown:
            return data
        context, is_offloaded = seams.context_of(comm), seams.is_offloaded(comm, data)
        serialize = functools.partial(codec.where_dask_would, is_offloaded)
        # Most of these are small. A task for each of thousands would cost more than all the rest (25 of 90 us for each,
        # 2 cores, November 2026).
        unmeasured = {key: data[key].data for key in unknown if not self._is_large(key)}
        serialized = await serialize(codec.serialize_each, unmeasured, context)
        sent = {key: one.message for key, one in serialized.items() if one.size < self._role.options.threshold}
        ways: dict[Any, Serialize] = {key: _as_it_is(one) for key, one in serialized.items() if key not in sent}
        for key in unknown:
            if key not in unmeasured:
                ways[key] = functools.partial(serialize, Serialized.of, data[key].data, context)
        shared = await asyncio.gather(*(self._share(key, data[key], way, keep) for key, way in ways.items()))
        return {**data, **sent, **dict(zip(ways, shared, strict=True))}

    def _may_be_large(self, key: Any, value: object) -> bool:
        is_actor = key in self._worker.state.actors
        return not is_actor and codec.may_be_large(value, self._size(key), self._role.options.threshold)

    async def _share(self, key: Any, wrapped: Any, serialize: Serialize, keep: list[Published]) -> Any:
        try:
            published = await self.publisher.publish(key, wrapped.data, serialize)
        except Exception:
            logger.debug("%r goes as Dask sends it", key, exc_info=True)
            COUNTERS.count_sent(SharedMemoryError.reason, self._size(key))
            return wrapped
        if isinstance(published, Published):
            keep.append(published)
        return published.message

    def _is_large(self, key: Any) -> bool:
        """Tell whether Dask has measured a value as large enough to be shared, and it is no actor."""
        return self._size(key) >= self._role.options.threshold and key not in self._worker.state.actors

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

    async def get_data(comm: Any, keys: Any, serializers: list[str] | None = None, **options: Any) -> Any:
        running = half()
        if running is None:
            return await _call(before, comm, keys, seams.untag(serializers)[1], options)
        return await running.answer(comm, keys, serializers, **options)

    return get_data


async def _call(handler: Any, comm: Any, keys: Any, serializers: list[str] | None, options: dict[str, Any]) -> Any:
    """Call a handler as Dask does: everything by name, and serializers only where they are taken."""
    # Of the function, for the answer is kept, and what was asked about.
    if serializers is not None and has_keyword(getattr(handler, "__func__", handler), "serializers"):
        options = {**options, "serializers": serializers}
    answer = handler(comm, keys=keys, **options)
    return await answer if inspect.isawaitable(answer) else answer


def _keep(message: dict[Any, Any], done: object) -> None:
    """Keep a message until this is called."""


def _as_it_is(serialized: Serialized) -> Serialize:
    async def given() -> Serialized:
        return serialized

    return given


async def _serialize_unasked(value: object) -> Serialized:
    """Serialize a value before there is a connection to somebody who wants it."""
    return await codec.where_dask_would(True, Serialized.of, value, {})


class _HandingOver:
    """The connection of one request: what is written to it goes as handles, and is kept until the asker has it."""

    def __init__(self, comm: Any, running: _Running, ask: Ask, kept: list[Published]) -> None:
        self._comm, self._running, self._ask, self._kept = comm, running, ask, kept

    @step("answer")
    async def write(self, message: Any, *args: Any, **kwargs: Any) -> Any:
        # Nothing was awaited since the request came: the values were read for this answer, and once.
        self._ask.has_read()
        if message.get("status") == "OK":
            try:
                data = await self._running.share(self._comm, message["data"], self._kept)
            except Exception:
                logger.debug("an answer goes as Dask sends it", exc_info=True)
            else:
                message = {**message, "data": data}
        return await self._comm.write(message, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)
