"""The client's role: ``scatter`` writes into the node's arena, and ``gather`` maps values from it."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import distributed.client
from distributed import Client

from dask_shm_plugin import metrics
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.births import switch as births
from dask_shm_plugin.config import Options
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.monitor.clients import ClientCounters
from dask_shm_plugin.node import membership, rendezvous
from dask_shm_plugin.roles.role import Role
from dask_shm_plugin.seams.replacement import Replacement, SharedReplacement
from dask_shm_plugin.transfer import fetch
from dask_shm_plugin.transfer.scatter import Data, ScatterSender
from dask_shm_plugin.values.handles import NotRebuilt

logger = logging.getLogger("dask_shm_plugin")


class SharedMemoryClient:
    """Makes a client take part in sharing, from :meth:`start` to :meth:`stop`.

    Parameters
    ----------
    client
        A running client.
    options
        The settings.

    Attributes
    ----------
    is_leaving
        Whether it is about to be stopped, so that no other client follows it any more.

    Notes
    -----
    To be used on the client's event loop. While there is no arena on this node, values are sent as with stock Dask.
    Each ``scatter`` and ``gather`` looks for the arena again, which takes one look for a file.
    """

    def __init__(self, client: Client, options: Options) -> None:
        self.client, self.options, self.is_leaving = client, options, False
        self._scheduler: Any = client.scheduler
        self._role = Role("client", client.scheduler, client.id, options)
        self._arena: Arena | None = None
        self._births_lock = threading.Lock()
        self._has_births = False
        self._counted_before = COUNTERS.snapshot()
        self._counters = ClientCounters(client.scheduler)

    async def start(self) -> None:
        """Replace the client's calls of the scheduler, and join the arena if there is one."""
        self._scatter_before = Replacement(self._scheduler, "scatter", self._scatter)
        self._sender = ScatterSender(self.client, self._scatter_before.old, self.options.threshold)
        self._gather_before = Replacement(self._scheduler, "gather", self._gather)
        self._close_before = Replacement(self.client, "_close", self._close)
        _HALVES.add(self)
        for replacement in _OF_PROCESS:
            replacement.begin()
        await self._find_arena()

    async def stop(self) -> None:
        """Put Dask's functions back in place and leave the arena; values that are still in use stay valid."""
        if self not in _HALVES:
            return
        _HALVES.discard(self)
        for shared in _OF_PROCESS:
            shared.end()
        for replacement in (self._scatter_before, self._gather_before, self._close_before):
            replacement.undo()
        self._sender.close()
        self._counters.stop()
        with self._births_lock:
            if self._has_births and self._arena is not None:
                births.switch_off(self._arena)
            self._has_births, self._arena = False, None
        await self._role.leave()

    async def settled(self) -> None:
        """Wait until no handle of this client is on its way to a worker."""
        await self._sender.settled()

    @property
    def address(self) -> str:
        """The address of the scheduler."""
        return str(self._scheduler.address)

    @property
    def is_remote(self) -> bool:
        """Whether messages to the scheduler are serialized, by Dask's default serializers."""
        return not self.address.startswith("inproc://") and not self.client.rpc.serializers

    def report(self) -> dict[str, Any] | None:
        """Return the state of the arena and the counters of this process, or None if there is no arena."""
        if self._arena is None:
            return None
        return self._role.report(self._arena, metrics.since(self._counted_before))

    @contextlib.contextmanager
    def born(self) -> Iterator[None]:
        """Let the arrays that are made in this block be born in the arena, if there is one; for the user's threads."""
        if self._arena is None and not self.client.asynchronous:
            self.client.sync(self._find_arena)
        with self._births_lock:
            if self._arena is not None and not self._has_births:
                reason = births.switch_on(self._arena, None, self.options.warm, has_worker=False)
                self._has_births = reason is None
                logger.debug("arrays of a client are born in the arena: %s", reason or "yes")
        with births.block() if self._has_births else contextlib.nullcontext():
            yield

    async def _find_arena(self) -> Arena | None:
        if self._arena is None and self.is_remote and self in _HALVES:
            cluster = self._role.cluster
            if cluster is None or membership.of_cluster(cluster) or rendezvous.exists(rendezvous.name_for(cluster)):
                self._arena = await self._role.join(create=False)
                if self not in _HALVES:  # stopped meanwhile
                    self._arena = None
                    await self._role.leave()
        return self._arena

    @functools.wraps(Client._close)  # Python's warning about a client that was never closed contains this name
    async def _close(self, *args: Any, **kwargs: Any) -> Any:
        # Dask's own close comes first: if the event loop ends meanwhile, the client knows already that it is closed.
        try:
            return await self._close_before.old(*args, **kwargs)
        finally:
            try:
                await self.stop()
            except Exception:
                logger.debug("could not leave", exc_info=True)

    # -- gather

    async def _gather(self, keys: Any, **kwargs: Any) -> Any:
        gather = self._gather_before.old
        arena = None if kwargs.get("serializers") else await self._find_arena()
        if arena is None:
            return await gather(keys=keys, **kwargs)

        def ask(keys: Any, serializers: list[str]) -> Any:
            return gather(keys=keys, **{**kwargs, "serializers": serializers})

        try:
            return await fetch.ask_until_usable(ask, keys, fetch.askers())
        finally:
            self._counters.tell_soon(arena)

    # -- scatter

    @contextlib.contextmanager
    def _moving(self) -> Iterator[None]:
        """A scatter is in flight; after it, the scheduler is told the counters."""
        try:
            with self._sender.in_flight():
                yield
        finally:
            if self._arena is not None:
                self._counters.tell_soon(self._arena)

    async def _scatter(self, data: Data, workers: Any = None, broadcast: bool | int = False, **kwargs: Any) -> Any:
        with self._moving():
            arena = await self._find_arena()
            if arena is not None and self._sender.has_large(data):
                request = await self._sender.prepare(arena, data, workers, kwargs)
                data = request.data
                if request.published and request.targets.members:
                    try:
                        return await self._sender.deliver(request, broadcast)
                    except NotRebuilt as error:
                        raise error.args[0] from None
                    except Exception:
                        logger.debug("a scatter is repeated with bytes", exc_info=True)
            elif broadcast is True and self.is_remote and self._sender.has_large(data):
                try:
                    keys = await self._sender.broadcast_from_outside(data, workers, kwargs)
                    if keys is not None:
                        return keys
                except Exception:
                    logger.debug("a broadcast is repeated as Dask does it", exc_info=True)
        return await self._scatter_before.old(data=data, workers=workers, broadcast=broadcast, **kwargs)

    async def scatter_directly(self, workers: Any, data: Data, rpc: Any) -> Any:
        """Run in place of ``scatter_to_workers``, which sends from the client to each worker."""
        with self._moving():
            arena = await self._find_arena()
            if arena is not None and self._sender.has_large(data):
                data, rpc = await self._sender.rpc_with_handles(arena, data, rpc)
            return await DIRECT_SCATTERS.old(workers, data, rpc)


async def take_part(client: Client, options: Options) -> None:
    """Make a client take part in sharing; if it does already, replace its settings."""
    half = half_of(client)
    if half is not None:
        await half.stop()
    await SharedMemoryClient(client, options).start()


async def stop_taking_part(client: Client) -> None:
    """Let no client of this process take part that uses the scheduler of a client.

    Those on the same event loop have left when this returns, and none of their handles is on its way to a worker.
    Those on others leave as soon as their event loops run: these may be waiting for this one.
    """
    halves = _at_scheduler_of(client)
    for half in halves:
        half.is_leaving = True
    for half in halves:
        loop: Any = half.client.loop
        if loop is client.loop:
            await half.stop()
            await half.settled()
        else:
            loop.add_callback(half.stop)


def _at_scheduler_of(client: Client) -> list[SharedMemoryClient]:
    scheduler: Any = client.scheduler
    return [half for half in list(_HALVES) if half.address == scheduler.address]


async def _follow(client: Client) -> None:
    """Let a client take part if another one of this process does, in the same cluster."""
    if half_of(client) is None:
        halves = _at_scheduler_of(client)
        half = next((half for half in halves if half.is_remote and not half.is_leaving), None)
        if half is not None:
            await take_part(client, half.options)


def _followed_by(name: str) -> Any:
    """Return a replacement for a method of all clients, which begins by :func:`_follow`."""

    @functools.wraps(getattr(Client, name))
    async def method(self: Client, *args: Any, **kwargs: Any) -> Any:
        try:
            await _follow(self)
        except Exception:
            logger.debug("a client does not take part", exc_info=True)
        return await replacement.old(self, *args, **kwargs)

    replacement = SharedReplacement(Client, name, method)
    return replacement


def half_of(client: Client) -> SharedMemoryClient | None:
    """Return the object that makes a client take part, or None if the client does not."""
    return next((half for half in list(_HALVES) if half.client is client), None)


async def _scatter_to_workers(workers: Any, data: Data, rpc: Any) -> Any:
    half = next((half for half in list(_HALVES) if half.client.rpc is rpc), None)
    if half is None:
        return await DIRECT_SCATTERS.old(workers, data, rpc)
    return await half.scatter_directly(workers, data, rpc)


_HALVES: weakref.WeakSet[SharedMemoryClient] = weakref.WeakSet()
"""The active ones. The replaced calls of a client keep its object alive, so both are collected together."""

DIRECT_SCATTERS = SharedReplacement(distributed.client, "scatter_to_workers", _scatter_to_workers)
_OF_PROCESS = fetch.REQUESTS, DIRECT_SCATTERS, _followed_by("_gather"), _followed_by("_scatter")
"""In place while any client of this process takes part."""
