"""Receive the large frames of a parcel straight into the arena, so that landing seals them instead of copying them.

The small part of a message ends with an announcement of the large frames that follow. Connections other than
``tcp://`` and ``tls://``, compressed frames, and all other messages are received as with stock Dask.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import distributed.comm.tcp
import numpy as np
import numpy.typing as npt
from distributed.protocol.utils import host_array

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.receptions import Reception
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.notices import warn_once
from dask_shm_plugin.seams import receiving as seams
from dask_shm_plugin.seams.replacement import SharedReplacement
from dask_shm_plugin.threads import call_in
from dask_shm_plugin.units import round_up
from dask_shm_plugin.values.parcels import announced

logger = logging.getLogger("dask_shm_plugin")

_MIN_BYTES = 1 << 20
"""Smaller parcels are copied: that takes less time than a call in a thread."""
_FIRST_STEP_BYTES, _MAX_STEP_BYTES = 8 << 20, 64 << 20
"""Bytes of pages that are made at a time, while the bytes before them are received: twice as many each time."""
_ALIGNMENT_BYTES = 64
_REFUSALS = SharedMemoryError, OSError, MemoryError, RuntimeError
"""There is no room in the arena, no memory, or no thread."""


class Receiving:
    """Lets the connections of this process receive into an arena, from its creation to :meth:`stop`.

    Parameters
    ----------
    arena
        The arena of a worker.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.threads = ThreadPoolExecutor(1, thread_name_prefix="dask-shm-receive")
        self._is_on = not (reason := seams.why_not())
        if self._is_on:
            _ACTIVE.append(self)
            _READ.begin()
        else:
            warn_once(f"Values of other nodes are received into private memory, and then copied: {reason}")

    def stop(self) -> None:
        """Receive nothing more into the arena; messages that are under way still are."""
        if self._is_on:
            self._is_on = False
            with contextlib.suppress(ValueError):  # in a forked child
                _ACTIVE.remove(self)
            _READ.end()
        self.threads.shutdown(wait=False)


class _Incoming:
    """The large frames of one parcel, as they follow each other on a connection.

    Notes
    -----
    Dask's connection keeps the frames until the message is complete, and drops them if it breaks off. So this refers to
    their memory only weakly.

    Attributes
    ----------
    has_failed
        Whether there was no memory for some bytes.
    """

    def __init__(self, lengths: list[int]) -> None:
        places = itertools.accumulate((round_up(length, _ALIGNMENT_BYTES) for length in lengths), initial=0)
        *self._places, self._size = places
        self._lengths, self._frame, self._done = lengths, 0, 0
        self._memory: weakref.ref[npt.NDArray[np.uint8]] | None = None
        self._ahead: asyncio.Future[int | None] | None = None
        self._ready, self._step, self.has_failed = 0, _FIRST_STEP_BYTES, False

    def next(self, n: int) -> int | None:
        """Return where the next ``n`` bytes go: a frame, or a shard of one; None if they cannot be that.

        After a compressed frame nothing is placed any more: a user's array may follow, which must not lie here.
        """
        if self.is_over:
            return None
        left = self._lengths[self._frame] - self._done
        if n != left and not n == distributed.comm.tcp.TCP.max_shard_size < left:
            return None
        place = self._places[self._frame] + self._done
        self._done += n
        if self._done == self._lengths[self._frame]:
            self._frame, self._done = self._frame + 1, 0
        return place

    @property
    def is_over(self) -> bool:
        """Whether all frames have got a place."""
        return self._frame == len(self._lengths)

    async def memory(self) -> npt.NDArray[np.uint8] | None:
        """Return the memory for all frames; None if there is no room for them."""
        if self.has_failed:
            return None
        if self._memory is not None:
            return self._memory()
        self.has_failed = True
        if self._size < _MIN_BYTES or len({id(one.arena) for one in _ACTIVE}) != 1:
            return None
        receiving = _ACTIVE[0]
        try:
            memory = np.asarray(await call_in(receiving.threads, receiving.arena.receptions.open, self._size))
        except _REFUSALS as error:
            _note_refusal(self._size, error)
            return None
        self._memory, self._threads, self.has_failed = weakref.ref(memory), receiving.threads, False
        return memory

    async def wait_for_pages(self, memory: npt.NDArray[np.uint8], at: int) -> int | None:
        """Wait until bytes can be received at an offset in the memory; return the end of these, or None if they cannot.

        The next pages are made meanwhile, in a thread.
        """
        while not self.has_failed and self._ready <= at:
            made = await (self._ahead or self._make_pages(memory))
            if made is None:
                self.has_failed = True
            else:
                self._ready = made
                self._ahead = asyncio.ensure_future(self._make_pages(memory)) if made < self._size else None
        return None if self.has_failed else self._ready

    def give_up(self, memory: npt.NDArray[np.uint8]) -> None:
        """Give the draft up, for the message has broken off: the closed stream keeps the memory until Python finds a cycle.

        That is done after the pages that are being made, and after Dask has closed the stream, so nothing is received
        there any more.
        """
        try:
            self._threads.submit(cast("Reception", memory.base).give_up)
        except RuntimeError:  # the worker shares no more
            logger.debug("a draft is given up later", exc_info=True)

    async def _make_pages(self, memory: npt.NDArray[np.uint8]) -> int | None:
        end = min(self._ready + self._step, self._size)
        self._step = min(2 * self._step, _MAX_STEP_BYTES)
        try:
            await call_in(self._threads, cast("Reception", memory.base).make_pages, end)
        except _REFUSALS as error:
            _note_refusal(self._size, error)
            return None
        return end


def _note_refusal(size: int, error: Exception) -> None:
    logger.debug("%d bytes are received into private memory: %s", size, str(error))


_ACTIVE: list[Receiving] = []
_INCOMING: weakref.WeakKeyDictionary[Any, _Incoming] = weakref.WeakKeyDictionary()


async def _read_bytes_rw(stream: Any, n: int) -> memoryview:
    incoming = _INCOMING.pop(stream, None)
    place = incoming.next(n) if incoming is not None else None
    if incoming is not None and place is not None:
        memory = await incoming.memory()
        if memory is not None:
            if not incoming.is_over:
                _INCOMING[stream] = incoming
            return await _receive(stream, incoming, memory, place, n)
    data: memoryview = await _READ.old(stream, n)
    if lengths := announced(data):
        _INCOMING[stream] = _Incoming(lengths)
    return data


@step("receive")
async def _receive(stream: Any, incoming: _Incoming, memory: npt.NDArray[np.uint8], place: int, n: int) -> memoryview:
    """Receive ``n`` bytes into memory of the arena, or into private memory if pages cannot be made."""
    data, done = memory.data[place : place + n], 0
    try:
        while done < n:
            end = await incoming.wait_for_pages(memory, place + done)
            if end is None:
                private: memoryview = host_array(n)
                private[:done], data, end = data[:done], private, place + n
            part = data[done : min(end - place, done + _MAX_STEP_BYTES)]
            await stream.read_into(part)
            done += len(part)
    except BaseException:
        incoming.give_up(memory)
        raise
    if incoming.is_over and not incoming.has_failed:
        cast("Reception", memory.base).is_complete = True
    return data


_READ = SharedReplacement(distributed.comm.tcp, "read_bytes_rw", _read_bytes_rw)


def _forget_parent() -> None:
    """Let a forked child receive as with stock Dask: the arena and the thread are its parent's."""
    _ACTIVE.clear()
    _INCOMING.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
