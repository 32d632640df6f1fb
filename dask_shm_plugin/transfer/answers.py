"""Answer requests for data: members of the arena get handles, workers of other nodes parcels, all others bytes."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import weakref
from collections import OrderedDict
from typing import Any

from dask.utils import has_keyword

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import SharedMemoryError, Unshareable, forget_values
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.seams import requests
from dask_shm_plugin.seams.replacement import Replacement
from dask_shm_plugin.transfer import fetch
from dask_shm_plugin.transfer.between_nodes import NodeRequest
from dask_shm_plugin.transfer.entry import Ask
from dask_shm_plugin.transfer.flights import AnswerToMember, AnswerToNode, Flights, Recipient
from dask_shm_plugin.transfer.publisher import Publisher, Serialize
from dask_shm_plugin.values import codec
from dask_shm_plugin.values.codec import Published, Serialized

logger = logging.getLogger("dask_shm_plugin")

_MAX_REASONS = 256
"""Number of keys for which the reason is remembered why their values were sent."""


class Answers:
    """Takes the place of the handler ``Worker.get_data``, from its creation to :meth:`stop`.

    Parameters
    ----------
    worker
        A running worker.
    arena
        The arena of its process.
    publisher
        Publishes the worker's values.
    threshold
        Smallest value to share, in bytes.

    Notes
    -----
    To be used on the worker's event loop.
    """

    def __init__(self, worker: Any, arena: Arena, publisher: Publisher, threshold: int) -> None:
        self._worker, self._arena, self._publisher, self._threshold = worker, arena, publisher, threshold
        self._flights = Flights()
        self._reasons: OrderedDict[Any, str] = OrderedDict()
        self._before = Replacement(worker.handlers, "get_data", _handler_of(self, worker))

    def stop(self) -> None:
        """Put Dask's handler back in place."""
        self._before.undo()

    async def answer(self, comm: Any, keys: Any, serializers: list[str] | None = None, **options: Any) -> Any:
        """Handle a request for data in place of ``Worker.get_data``."""
        asked_by, serializers = requests.untag(serializers)
        by_reference = comm.peer_address.startswith("inproc://")
        recipient = None if by_reference else self._recipient(asked_by)
        if recipient is None:
            if not by_reference and requests.BYTES_PLEASE not in asked_by:
                self._count_as_sent(keys, fetch.why_no_member(asked_by))
            return await _call(self._before.old, comm, keys, serializers, options)
        ask = self._publisher.ask(list(filter(self.is_large, keys)))
        kept: list[Published] = []
        has_arrived = False
        try:
            comm = _AnswerComm(comm, self, ask, recipient, kept)
            answer = await _call(self._before.old, comm, keys, serializers, options)
            has_arrived = True
            return answer
        except Exception as error:
            forget_values(error)
            raise
        finally:
            recipient.over(has_arrived=has_arrived)
            kept.clear()
            self._publisher.answered(ask)

    def _recipient(self, asked_by: list[str]) -> Recipient | None:
        """Return the object that writes to the requesting process, or None if this gets bytes as without the plugin."""
        if fetch.is_member(self._arena, asked_by):
            return AnswerToMember()
        request = NodeRequest.among(asked_by)
        return None if request is None else AnswerToNode(self._flights, request, self._arena)

    def _count_as_sent(self, keys: Any, reason: str) -> None:
        for key in keys:
            if self.is_large(key):
                COUNTERS.count_sent(reason, self._size(key))
                self._reasons[key] = reason
                if len(self._reasons) > _MAX_REASONS:
                    self._reasons.popitem(last=False)

    def last_reason(self, key: Any) -> str | None:
        """Return the reason why the value of a key was last sent as bytes, if it is among the last that were."""
        return self._reasons.get(key)

    async def share(
        self, comm: Any, data: dict[Any, Any], keep: list[Published], recipient: Recipient
    ) -> dict[Any, Any]:
        """Return the data of an answer with the recipient's messages in place of the values that are shared.

        Parameters
        ----------
        comm
            The connection on which the answer is sent.
        data
            The wrapped values by key, as Dask would write them to the connection.
        keep
            The published values are appended to this list. The caller keeps it until the requesting process has
            resolved the handles.
        recipient
            Writes the message of each published value.
        """
        unknown = [key for key, wrapped in data.items() if self._may_be_large(key, wrapped.data)]
        small_items = [key for key in unknown if self.is_of_small_items(key, data[key].data)]
        if small_items:
            self._count_as_sent(small_items, Unshareable.reason)
            unknown = [key for key in unknown if key not in small_items]
        if not unknown:
            return data
        context, is_offloaded = requests.context_of(comm), requests.is_offloaded(comm, data)
        serialize = functools.partial(codec.where_dask_would, is_offloaded)
        # Most of these are small, and there may be thousands. So one call serializes all of them: an asyncio task for
        # each value took 25 of 90 µs per value (2 cores, November 2026).
        unmeasured = {key: data[key].data for key in unknown if not self.is_large(key)}
        serialized = await serialize(codec.serialize_each, unmeasured, context)
        sent = {key: one.message for key, one in serialized.items() if one.size < self._threshold}
        ways: dict[Any, Serialize] = {key: _as_it_is(one) for key, one in serialized.items() if key not in sent}
        for key in unknown:
            if key not in unmeasured:
                ways[key] = functools.partial(serialize, Serialized.of, data[key].data, context)
        shared = await asyncio.gather(*(self._share(key, data[key], way, keep, recipient) for key, way in ways.items()))
        return {**data, **sent, **dict(zip(ways, shared, strict=True))}

    def _may_be_large(self, key: Any, value: object) -> bool:
        is_actor = key in self._worker.state.actors
        return not is_actor and codec.may_be_large(value, self._size(key), self._threshold)

    async def _share(
        self, key: Any, wrapped: Any, serialize: Serialize, keep: list[Published], recipient: Recipient
    ) -> Any:
        try:
            published = await self._publisher.publish(key, wrapped.data, serialize, is_wanted=recipient.is_near)
            if isinstance(published, Published):
                keep.append(published)
                if not recipient.is_near:
                    self._publisher.sent_away(key, published)
                message, reason = recipient.message_for(published)
                if reason is not None:
                    self._count_as_sent([key], reason)
                return message
        except Exception:
            logger.debug("the value of %r is sent as Dask would send it", key, exc_info=True)
            COUNTERS.count_sent(SharedMemoryError.reason, self._size(key))
            return wrapped
        if not recipient.is_near:
            self._count_as_sent([key], "not-co-located")
        return published.message

    def is_large(self, key: Any) -> bool:
        """Return whether Dask's measure of a value reaches the threshold, and the key is not an actor."""
        # Inline, because each result is asked for it.
        task = self._worker.state.tasks.get(key)
        return task is not None and (task.nbytes or 0) >= self._threshold and key not in self._worker.state.actors

    def is_of_small_items(self, key: Any, value: object) -> bool:
        """Return whether the value of a key is a collection of very many small items, which are not shared."""
        return codec.is_of_small_items(value, self._size(key))

    def _size(self, key: Any) -> int:
        task = self._worker.state.tasks.get(key)
        return (task.nbytes or 0) if task else 0


def _handler_of(answers: Answers, worker: Any) -> Any:
    """Return the handler of requests for data, which refers to ``answers`` weakly.

    Dask (2026.8.0) keeps each handler that it has ever called in the caches of ``iscoroutinefunction`` and
    ``has_keyword``.
    """
    reference, before = weakref.ref(answers), worker.handlers["get_data"]

    async def get_data(comm: Any, keys: Any, serializers: list[str] | None = None, **options: Any) -> Any:
        answers = reference()
        if answers is None:
            return await _call(before, comm, keys, requests.untag(serializers)[1], options)
        return await answers.answer(comm, keys, serializers, **options)

    return get_data


async def _call(handler: Any, comm: Any, keys: Any, serializers: list[str] | None, options: dict[str, Any]) -> Any:
    """Call a handler as Dask does: all arguments by name, and ``serializers`` only if the handler takes them."""
    # `has_keyword` keeps its argument in a cache. So it gets the plain function and not a bound method with its object.
    if serializers is not None and has_keyword(getattr(handler, "__func__", handler), "serializers"):
        options = {**options, "serializers": serializers}
    answer = handler(comm, keys=keys, **options)
    return await answer if inspect.isawaitable(answer) else answer


def _as_it_is(serialized: Serialized) -> Serialize:
    async def given() -> Serialized:
        return serialized

    return given


class _AnswerComm:
    """Wraps the connection of one request: ``write`` replaces large values by handles."""

    def __init__(self, comm: Any, answers: Answers, ask: Ask, recipient: Recipient, kept: list[Published]) -> None:
        self._comm, self._answers, self._ask, self._recipient, self._kept = comm, answers, ask, recipient, kept

    @step("answer")
    async def write(self, message: Any, *args: Any, **kwargs: Any) -> Any:
        # Dask has awaited nothing since the request came. So each value was read once since then, for this answer.
        self._ask.has_read()
        if message.get("status") == "OK":
            try:
                data = await self._answers.share(self._comm, message["data"], self._kept, self._recipient)
            except Exception:
                logger.debug("an answer is sent as Dask would send it", exc_info=True)
            else:
                message = {**message, "data": data}
        return await self._comm.write(message, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)
