"""The client's half: ``scatter`` writes into the arena of the node, ``gather`` maps from it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import distributed.client
from dask.sizeof import sizeof
from distributed import Client

from dask_shm_plugin import codec, fetch, membership, metrics, notices, rendezvous, seams
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.codec import Published, Serialized
from dask_shm_plugin.config import Options
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.handles import NotRebuilt
from dask_shm_plugin.handover import Courier, Data, DirectRpc, HandOver, Targets, consume
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.role import Role
from dask_shm_plugin.threads import call_in

logger = logging.getLogger("dask_shm_plugin")


class SharedMemoryClient:
    """What makes a client take part, from :meth:`start` to :meth:`stop`.

    Parameters
    ----------
    client
        A running client.
    options
        The settings.

    Notes
    -----
    Lives on the client's event loop. While there is no arena on this node, everything goes the usual way; it is looked
    for again at each ``scatter`` and ``gather``, which costs a look for a file.
    """

    def __init__(self, client: Client, options: Options) -> None:
        self.client, self._options = client, options
        self._scheduler: Any = client.scheduler
        self._role = Role("client", client.scheduler, client.id, options)
        self._arena: Arena | None = None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="dask-shm-scatter")
        self._under_way: set[asyncio.Future[None]] = set()
        self._counted_before = COUNTERS.snapshot()

    async def start(self) -> None:
        """Join the arena if there is one, and step in front of the client's calls."""
        self._scatter_before = seams.Replacement(self._scheduler, "scatter", self._scatter)
        self._courier = Courier(self.client, self._scatter_before.old)
        self._gather_before = seams.Replacement(self._scheduler, "gather", self._gather)
        self._close_before = seams.Replacement(self.client, "_close", self._close)
        _HALVES.add(self)
        fetch.REQUESTS.begin()
        DIRECT_SCATTERS.begin()
        await self._find_arena()

    async def stop(self) -> None:
        """Put everything back and leave the arena; values that live on stay valid."""
        if self not in _HALVES:
            return
        _HALVES.discard(self)
        DIRECT_SCATTERS.end()
        fetch.REQUESTS.end()
        for replacement in (self._scatter_before, self._gather_before, self._close_before):
            replacement.undo()
        self._threads.shutdown(wait=False)
        self._arena = None
        await self._role.leave()

    async def settled(self) -> None:
        """Wait until no handle of this client is on its way to a worker."""
        if self._under_way:
            await asyncio.wait(self._under_way)

    @contextlib.contextmanager
    def _handing_over(self) -> Iterator[None]:
        over = asyncio.get_running_loop().create_future()
        self._under_way.add(over)
        try:
            yield
        finally:
            self._under_way.discard(over)
            over.set_result(None)

    @property
    def is_remote(self) -> bool:
        """Whether messages to the scheduler are serialized, and in the usual way."""
        return not str(self._scheduler.address).startswith("inproc://") and not self.client.rpc.serializers

    def report(self) -> dict[str, Any] | None:
        """Return what the arena holds and what this process did, or None where there is no arena."""
        if self._arena is None:
            return None
        return self._role.report(self._arena, metrics.since(self._counted_before))

    async def _find_arena(self) -> Arena | None:
        if self._arena is None and self.is_remote and self in _HALVES:
            cluster = self._role.cluster
            if cluster is None or membership.of_cluster(cluster) or rendezvous.exists(rendezvous.name_for(cluster)):
                self._arena = await self._role.join(create=False)
                if self not in _HALVES:  # stopped meanwhile
                    self._arena = None
                    await self._role.leave()
        return self._arena

    @functools.wraps(Client._close)  # Python names it when a client is collected that nobody has closed
    async def _close(self, *args: Any, **kwargs: Any) -> Any:
        # Dask first: an event loop that ends meanwhile leaves a client that knows that it is closed.
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
        if kwargs.get("serializers") or await self._find_arena() is None:
            return await gather(keys=keys, **kwargs)
        response = await gather(keys=keys, **{**kwargs, "serializers": seams.tagged(fetch.askers())})
        if response["status"] != "OK":
            return response
        response = {**response, "data": await fetch.finish(response["data"])}
        fetch.insist_rebuilt(response["data"])
        missing = fetch.unusable(response["data"])
        if missing:
            again = await gather(keys=missing, **{**kwargs, "serializers": seams.tagged([fetch.BYTES_PLEASE])})
            if again["status"] != "OK":
                return again
            response["data"].update(again["data"])
        return response

    # -- scatter

    async def _scatter(self, data: Data, workers: Any = None, broadcast: bool | int = False, **kwargs: Any) -> Any:
        with self._handing_over():
            may_share = await self._find_arena() is not None and self._has_large(data)
            targets, (data, published) = (
                await self._prepare(data, workers) if may_share else (Targets([], []), (data, {}))
            )
            if published and targets.members:
                attempt = asyncio.create_task(self._attempt(HandOver(data, published, targets, kwargs), broadcast))
                attempt.add_done_callback(consume)
                try:
                    # The scheduler goes on with a scatter whose client has lost patience: until it has answered, the
                    # blocks must stay, so the attempt, which holds them, is not cancelled.
                    return await asyncio.shield(attempt)
                except Exception as error:
                    # The scheduler hands on what an error of a worker says, as an error of no special kind.
                    refused, _, said = str(error).partition(f"{NotRebuilt.__name__}(")
                    if said and not refused:
                        raise Exception(said[:-1]) from None
                    logger.debug("a scatter is repeated with bytes", exc_info=True)
        return await self._scatter_before.old(data=data, workers=workers, broadcast=broadcast, **kwargs)

    async def _prepare(self, data: Data, workers: Any) -> tuple[Targets, tuple[Data, dict[Any, Published]]]:
        """Find out whom the data may reach, and publish it if any of them can map it."""
        if workers is None and self._members():
            # To ask takes time, too: both at once.
            targets, prepared = await asyncio.gather(self._targets(workers), self._publish(data))
            return targets, prepared
        targets = await self._targets(workers)
        return targets, await self._publish(data) if targets.members else (data, {})

    async def _attempt(self, what: HandOver, broadcast: bool | int) -> Any:
        with self._handing_over():
            return await self._courier.deliver(what, broadcast)

    async def scatter_directly(self, workers: Any, data: Data, rpc: Any) -> Any:
        """Stand in for ``scatter_to_workers``, which sends from the client to each worker."""
        with self._handing_over():
            arena = await self._find_arena()
            members = self._members() if arena and self._has_large(data) else set()
            data, published = await self._publish(data) if members else (data, {})
            if published:
                rpc = DirectRpc(rpc, members, published)
            return await DIRECT_SCATTERS.old(workers, data, rpc)

    async def _publish(self, data: Data) -> tuple[Data, dict[Any, Published]]:
        """Serialize what may be large, once, and publish what is; return all data as bytes, and what is published."""
        scheduler: Any = self.client.scheduler_comm
        large = {key: wrapped.data for key, wrapped in data.items() if self._may_be_large(wrapped.data)}
        published: dict[Any, Published] = {}
        try:
            comm = scheduler.comm
            serialized = await codec.where_dask_would(
                seams.is_offloaded(comm, data), codec.serialize_each, large, seams.context_of(comm)
            )
            data = {**data, **{key: one.message for key, one in serialized.items()}}
            wanted = {
                key: one
                for key, one in serialized.items()
                if one.size >= self._options.threshold and not one.is_personal
            }
            if wanted and self._arena is not None:
                published = await call_in(self._threads, _publish_each, wanted, self._arena)
        except Exception:
            # Whatever is wrong with the data shall be said where Dask says it.
            logger.debug("a scatter goes as bytes", exc_info=True)
        return data, published

    def _has_large(self, data: Data) -> bool:
        return any(self._may_be_large(wrapped.data) for wrapped in data.values())

    def _may_be_large(self, value: object) -> bool:
        return codec.may_be_large(value, sizeof(value), self._options.threshold)

    def _members(self) -> set[str]:
        """Return the addresses of the workers that can map what this client has published."""
        try:
            roles = self._arena.roster.roles() if self._arena else []
        except SharedMemoryError:
            return set()
        return {role.address for role in roles if role.kind == "worker" and not role.address.startswith("inproc://")}

    async def _targets(self, workers: Any) -> Targets:
        running = await self._scheduler.ncores_running(workers=workers)
        if workers is not None and len(running) < len(set(workers)):
            # Some of those named are not there, or are paused: what is to be done then is Dask's to say.
            return Targets([], [])
        members = self._members()
        return Targets([w for w in running if w in members], [w for w in running if w not in members])


def _publish_each(serialized: dict[Any, Serialized], arena: Arena) -> dict[Any, Published]:
    published: dict[Any, Published] = {}
    for key, one in serialized.items():
        try:
            published[key] = codec.publish(one, arena)
        except (SharedMemoryError, OSError, MemoryError) as error:
            notices.refused(error, one.size)
        else:
            if published[key].copied:
                COUNTERS.count("published", published[key].copied)
    return published


async def take_part(client: Client, options: Options) -> None:
    """Let a client take part, with these settings from now on."""
    await stop_taking_part(client)
    await SharedMemoryClient(client, options).start()


async def stop_taking_part(client: Client) -> None:
    """Undo :func:`take_part`."""
    half = half_of(client)
    if half is not None:
        await half.stop()


def half_of(client: Client) -> SharedMemoryClient | None:
    """Return what makes a client take part, if it does."""
    return next((half for half in list(_HALVES) if half.client is client), None)


async def _scatter_to_workers(workers: Any, data: Data, rpc: Any) -> Any:
    half = next((half for half in list(_HALVES) if half.client.rpc is rpc), None)
    if half is None:
        return await DIRECT_SCATTERS.old(workers, data, rpc)
    return await half.scatter_directly(workers, data, rpc)


_HALVES: weakref.WeakSet[SharedMemoryClient] = weakref.WeakSet()
"""Those that are on. Each is kept by its client, in whose calls it stands; a client that is dropped takes it along."""

DIRECT_SCATTERS = seams.SharedReplacement(distributed.client, "scatter_to_workers", _scatter_to_workers)
"""In place while any client of this process takes part."""
