"""Send scattered values to workers: those that can map a value get its handle, all others get bytes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from dask.sizeof import sizeof

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.scheduling.telling import tell
from dask_shm_plugin.seams import requests
from dask_shm_plugin.threads import call_in
from dask_shm_plugin.transfer import rounds
from dask_shm_plugin.transfer.publishing import publish_or_count
from dask_shm_plugin.values import codec, parcels
from dask_shm_plugin.values.codec import Published, Serialized
from dask_shm_plugin.values.handles import NotRebuilt

logger = logging.getLogger("dask_shm_plugin")

Data = dict[Any, Any]

_REPLICATE_TIMEOUT_S = 10.0
"""Timeout (s) for replication; it takes milliseconds unless a worker has died."""


class Targets(NamedTuple):
    """Addresses of the running workers that a scatter may use: members of the arena, and workers that need bytes."""

    members: list[str]
    others: list[str]


class ScatterRequest(NamedTuple):
    """One scatter: its values as Dask would send them, those that are published, its targets and further arguments.

    Attributes
    ----------
    arena_id
        The id of the arena, in hexadecimal digits.
    """

    arena_id: str
    data: Data
    published: dict[Any, Published]
    targets: Targets
    options: dict[str, Any]

    @property
    def handles(self) -> Data:
        """The values, with handles in place of those that are published."""
        return _with_handles(self.data, self.published)


class ScatterSender:
    """Sends the scatters of one client.

    Parameters
    ----------
    client
        A running client.
    scatter
        Dask's own call of the scheduler's ``scatter``.
    threshold
        Smallest value to share, in bytes of its serialized frames.

    Notes
    -----
    To be used on the client's event loop. A thread copies the values.
    """

    def __init__(self, client: Any, scatter: Callable[..., Any], threshold: int) -> None:
        self._client, self._scheduler, self._scatter, self._threshold = client, client.scheduler, scatter, threshold
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="dask-shm-scatter")
        self._under_way: set[asyncio.Future[None]] = set()
        self._turns = itertools.count()

    def close(self) -> None:
        """End the copying thread as soon as it is idle."""
        self._threads.shutdown(wait=False)

    @contextlib.contextmanager
    def in_flight(self) -> Iterator[None]:
        """Make :meth:`settled` wait for the end of this context."""
        over = asyncio.get_running_loop().create_future()
        self._under_way.add(over)
        try:
            yield
        finally:
            self._under_way.discard(over)
            over.set_result(None)

    async def settled(self) -> None:
        """Wait until no handle of this client is on its way to a worker."""
        if self._under_way:
            await asyncio.wait(self._under_way)

    def has_large(self, data: Data) -> bool:
        """Return whether any of the wrapped values may be large enough to be shared."""
        return any(self._may_be_large(wrapped.data) for wrapped in data.values())

    # -- through the scheduler

    async def prepare(self, arena: Arena, data: Data, workers: Any, options: dict[str, Any]) -> ScatterRequest:
        """Determine the workers that the data may go to, and publish the data if any of them can map it.

        Parameters
        ----------
        arena
            The arena of this process.
        data
            The wrapped values by key.
        workers
            Addresses that the user has named, or None.
        options
            Further arguments of the scheduler's ``scatter``.
        """
        if workers is None and worker_addresses(arena):
            # Asking the scheduler takes time, too, so both are done at once.
            targets, (data, published) = await asyncio.gather(self._targets(arena, workers), self.publish(arena, data))
        else:
            targets = await self._targets(arena, workers)
            data, published = await self.publish(arena, data) if targets.members else (data, {})
        return ScatterRequest(arena.arena_id.hex(), data, published, targets, options)

    async def deliver(self, request: ScatterRequest, broadcast: bool | int) -> list[Any]:
        """Send each value to one worker, to all workers, or to a number of workers; return the keys.

        Parameters
        ----------
        request
            The scatter, from :meth:`prepare`.
        broadcast
            False for one worker per value, True for all workers, or the number of workers.

        Raises
        ------
        NotRebuilt
            The deserializer of a value has failed, as it would with bytes.
        Exception
            The attempt has failed: the values are to be sent as bytes.
        """
        # The scheduler goes on with a scatter after the client has timed out. The blocks must stay until the scheduler
        # has answered. So the attempt, which holds them, is not cancelled.
        attempt = asyncio.create_task(self._attempt(request, broadcast))
        attempt.add_done_callback(_consume)
        try:
            return await asyncio.shield(attempt)
        except Exception as error:
            # The scheduler passes an error of a worker on as a plain exception with the same text.
            refused, _, said = str(error).partition(f"{NotRebuilt.__name__}(")
            if said and not refused:
                raise NotRebuilt(Exception(said[:-1])) from None
            raise

    async def _attempt(self, request: ScatterRequest, broadcast: bool | int) -> list[Any]:
        with self.in_flight():
            return await self._hand_over(request, broadcast)

    @step("hand over")
    async def _hand_over(self, request: ScatterRequest, broadcast: bool | int) -> list[Any]:
        """Send each value to one worker, to all workers, or to a number of workers; return the keys."""
        if broadcast:
            await self._broadcast(request, broadcast)
        else:
            await self._distribute(request)
        return list(request.data)

    async def _broadcast(self, request: ScatterRequest, broadcast: bool | int) -> None:
        (members, others), keys = request.targets, list(request.data)
        everyone = broadcast is True
        n = len(members) if everyone else min(int(broadcast), len(members))
        await self._scatter_handles(request, request.handles)
        if n > 1:
            await self._let_members_have(keys, n, members)
        if others and (everyone or broadcast > len(members)):
            chosen = others if everyone else others[: broadcast - len(members)]
            arenas = await rounds.arenas_of(self._scheduler, chosen)
            await rounds.replicate(self._scheduler, keys, arenas, [])

    async def _scatter_handles(self, request: ScatterRequest, data: Data) -> None:
        """Send each value to one member, and tell the scheduler which of them lie in the arena."""
        await self._scatter(data=data, workers=request.targets.members, broadcast=False, **request.options)
        # Before the values get further replicas: the scheduler takes replicas of other values to be copies.
        sizes = {key: one.handle.size for key, one in request.published.items() if key in data}
        await tell(self._scheduler, request.arena_id, sizes)

    async def _let_members_have(self, keys: list[Any], n: int, members: list[str]) -> None:
        """Let ``n`` members map the values now; the others map them when they need them.

        Dask replicates in a tree of workers to spare the network. Here each round of the tree would take time and send
        no data, so there is only one round.
        """
        having = asyncio.ensure_future(
            self._scheduler.replicate(keys=keys, n=n, workers=members, branching_factor=len(members))
        )
        having.add_done_callback(_consume)
        # If a worker dies meanwhile, `Scheduler.replicate` takes 30 s (distributed 2026.8.0 tries to connect again),
        # and its calls to all other workers wait for that. The scatter need not: the values are in the arena already.
        done, _ = await asyncio.wait([having], timeout=_REPLICATE_TIMEOUT_S)
        for one in done:
            one.result()

    async def broadcast_from_outside(self, data: Data, workers: Any, options: dict[str, Any]) -> list[Any] | None:
        """Send values from a client that is in no arena to all workers, and the bytes to each node once.

        Returns
        -------
        list or None
            The keys; None if no worker shares, or Dask has to decide what to do: nothing was sent then.
        """
        running = list(await self._scheduler.ncores_running(workers=workers))
        if workers is not None and len(running) < len(set(workers)):
            return None
        arenas = await rounds.arenas_of(self._scheduler, running)
        members = [worker for worker, arena_id in arenas.items() if arena_id is not None]
        if len(members) == len({arenas[worker] for worker in members}):
            return None
        first, keys = members[0], list(data)
        await self._scatter(data=await self._parcels(data), workers=[first], broadcast=False, **options)
        await rounds.replicate(self._scheduler, keys, arenas, [str(arenas[first])])
        return keys

    async def _parcels(self, data: Data) -> Data:
        """Return the data with large values as parcels, which land in the arena of the receiving worker."""
        serialized = await self._serialized(data)
        wanted = {
            key: parcels.scatter_message_of(one)
            for key, one in serialized.items()
            if one.size >= self._threshold and not (one.is_personal or one.is_copied_by_readers)
        }
        return data | wanted

    async def _distribute(self, request: ScatterRequest) -> None:
        """Assign the values to the workers in turn, as Dask does."""
        (members, others), handles = request.targets, request.handles
        everyone = members + others
        turn = {key: everyone[next(self._turns) % len(everyone)] for key in request.data}
        to_members = {key: handles[key] for key in request.data if turn[key] in members}
        to_others = {key: request.data[key] for key in request.data if turn[key] in others}
        if to_members:
            await self._scatter_handles(request, to_members)
        if to_others:
            await self._scatter(data=to_others, workers=others, broadcast=False, **request.options)

    async def _targets(self, arena: Arena, workers: Any) -> Targets:
        running = await self._scheduler.ncores_running(workers=workers)
        if workers is not None and len(running) < len(set(workers)):
            # Some of the named workers are missing or paused. Dask's own scatter decides how to handle that.
            return Targets([], [])
        members = worker_addresses(arena)
        return Targets([w for w in running if w in members], [w for w in running if w not in members])

    # -- from the client to each worker

    async def rpc_with_handles(self, arena: Arena, data: Data, rpc: Any) -> tuple[Data, Any]:
        """Return the data and the rpc for a direct scatter; the rpc sends handles to members."""
        members = worker_addresses(arena)
        data, published = await self.publish(arena, data) if members else (data, {})
        return data, DirectRpc(rpc, members, published) if published else rpc

    # -- publishing

    async def publish(self, arena: Arena, data: Data) -> tuple[Data, dict[Any, Published]]:
        """Serialize values that may be large, once, and publish the large ones.

        Returns
        -------
        tuple
            All data as Dask would send them as bytes, and the published values by key.
        """
        published: dict[Any, Published] = {}
        try:
            serialized = await self._serialized(data)
            data = {**data, **{key: one.message for key, one in serialized.items()}}
            wanted = {
                key: one for key, one in serialized.items() if one.size >= self._threshold and not one.is_personal
            }
            if wanted:
                published = await call_in(self._threads, _publish_each, wanted, arena)
        except Exception:
            # Dask raises any error that is due to the data, when it sends them as bytes.
            logger.debug("a scatter goes as bytes", exc_info=True)
        return data, published

    async def _serialized(self, data: Data) -> dict[Any, Serialized]:
        """Serialize values that may be large."""
        large = {key: wrapped.data for key, wrapped in data.items() if self._may_be_large(wrapped.data)}
        comm = self._client.scheduler_comm.comm
        return await codec.where_dask_would(
            requests.is_offloaded(comm, data), codec.serialize_each, large, requests.context_of(comm)
        )

    def _may_be_large(self, value: object) -> bool:
        size = sizeof(value)
        return codec.may_be_large(value, size, self._threshold) and not codec.is_of_small_items(value, size)


class DirectRpc:
    """The client's rpc, for one direct scatter: members get handles, and bytes if they cannot use the handles."""

    def __init__(self, rpc: Any, members: set[str], published: dict[Any, Published]) -> None:
        self._rpc, self._members, self._published = rpc, members, published

    def __call__(self, address: str) -> Any:
        """Return the rpc of one worker."""
        call = self._rpc(address)
        return _DirectCall(call, self._published) if address in self._members else call


class _DirectCall:
    def __init__(self, call: Any, published: dict[Any, Published]) -> None:
        self._call, self._published = call, published

    async def update_data(self, data: Data) -> Any:
        try:
            return await self._call.update_data(data=_with_handles(data, self._published))
        except NotRebuilt as error:
            raise error.args[0] from None
        except Exception:
            logger.debug("a direct scatter is repeated with bytes", exc_info=True)
        return await self._call.update_data(data=data)

    async def close_rpc(self) -> None:
        await self._call.close_rpc()


def _consume(task: asyncio.Future[Any]) -> None:
    """Retrieve the exception of a task that may not be awaited any more, so that asyncio does not log it."""
    if not task.cancelled():
        task.exception()


def _with_handles(data: Data, published: dict[Any, Published]) -> Data:
    return {key: published[key].message if key in published else value for key, value in data.items()}


def _publish_each(serialized: dict[Any, Serialized], arena: Arena) -> dict[Any, Published]:
    published = {key: publish_or_count(one, arena) for key, one in serialized.items()}
    return {key: one for key, one in published.items() if one is not None}


def worker_addresses(arena: Arena) -> set[str]:
    """Return the addresses of the workers of an arena to which messages are serialized (all but ``inproc://``)."""
    try:
        roles = arena.roster.roles()
    except SharedMemoryError:
        return set()
    return {role.address for role in roles if role.kind == "worker" and not role.address.startswith("inproc://")}
