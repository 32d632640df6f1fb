"""The shards of one input partition for one worker, in one block of the arena.

A parcel is pickled as the name of its block. Where it is unpickled, it becomes the shards themselves: views of the block,
as Dask would have received them. So the receiver needs no code of this package in its way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.block import Descriptor
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import ArenaUnavailable, SharedMemoryError
from dask_shm_plugin.node import membership
from dask_shm_plugin.seams.shuffle import P2PConsistencyError
from dask_shm_plugin.units import round_up

_ALIGNMENT = 64
Index = tuple[int, ...]
Shard = tuple[Index, tuple[Index, npt.NDArray[Any]]]
"""A part of an array: the index of its new chunk, its index within that chunk, and its elements."""


class ParcelLost(P2PConsistencyError):
    """A parcel cannot be opened where it has arrived; send its shards as bytes.

    It derives from an error that Dask returns to the sender without a log entry.
    """


class Parcel:
    """Shards in a block of the arena; the block is held until :meth:`close`, and by anything taken out of the parcel.

    Parameters
    ----------
    descriptor
        The name of the block.
    content
        The bytes of the block.
    arrange
        Makes the shards from these bytes, as views.

    Attributes
    ----------
    size
        Bytes of the shards.
    """

    __slots__ = ("__weakref__", "_arrange", "_content", "_descriptor", "size")

    def __init__(self, descriptor: Descriptor, content: memoryview, arrange: Callable[[memoryview], Any]) -> None:
        self._descriptor, self._arrange = descriptor, arrange
        self._content: memoryview | None = content
        self.size = content.nbytes

    def open(self) -> Any:
        """Return the shards, as read-only views of the block.

        Raises
        ------
        ParcelLost
            The parcel is closed.
        """
        content = self._content
        if content is None:
            raise ParcelLost("the parcel is closed: its shuffle has ended")
        return self._arrange(content)

    def close(self) -> None:
        """Drop the block."""
        self._content = None

    def as_sent(self) -> Any:
        """Return the shards as Dask sends them, in private memory: a serialized table as ``bytes``, or arrays."""
        shards = self.open()
        if isinstance(shards, memoryview):
            return bytes(shards)
        return [(chunk, (index, array.copy())) for chunk, (index, array) in shards]

    def __sizeof__(self) -> int:
        return self.size  # asked for by Dask's limit on what is waiting to be sent

    def __reduce__(self) -> Any:
        return _open, (self._descriptor, self._arrange)

    def __repr__(self) -> str:
        return f"<Parcel of {self.size} bytes, block {self._descriptor.row.index}>"


@step("open parcel")
def _open(descriptor: Descriptor, arrange: Callable[[memoryview], Any]) -> Any:
    try:
        arena = membership.find(descriptor.arena_id)
        if arena is None:
            raise ArenaUnavailable("this process has left the arena")
        return arrange(arena.attach_block(descriptor).borrow())
    except (SharedMemoryError, OSError) as error:
        raise ParcelLost(str(error)) from None


def is_plain(data: Any) -> bool:
    """Return whether the bytes of an array are all of it."""
    return type(data) is np.ndarray and not data.dtype.hasobject and data.dtype.itemsize > 0


def size_of(shards: list[Shard]) -> int:
    """Return the bytes that shards of an array take in a block."""
    return sum(round_up(array.nbytes, _ALIGNMENT) for _, (_, array) in shards)


@step("pack arrays")
def pack_arrays(arena: Arena, shards: list[Shard]) -> Parcel:
    """Copy shards of one plain array into a block.

    Raises
    ------
    SharedMemoryError
        The arena has no room, or cannot be used.
    """
    dtype = shards[0][1][1].dtype
    plan, offset = [], 0
    with arena.draft(size_of(shards)) as draft:
        room = draft.open()
        for chunk, (index, array) in shards:
            np.copyto(np.ndarray(array.shape, dtype, room, offset), array)
            plan.append((chunk, index, array.shape, offset))
            offset += round_up(array.nbytes, _ALIGNMENT)
        del room
        block = draft.seal()
    return Parcel(block.descriptor, block.borrow(), functools.partial(_arrays, dtype, plan))


def _arrays(dtype: Any, plan: list[tuple[Index, Index, Index, int]], content: memoryview) -> list[Shard]:
    return [(chunk, (index, np.ndarray(shape, dtype, content, offset))) for chunk, index, shape, offset in plan]


@step("pack table")
def pack_table(arena: Arena, table: Any, least: int) -> Parcel | None:
    """Serialize an Arrow table into a block, or return None if it takes fewer than ``least`` bytes.

    Raises
    ------
    SharedMemoryError
        The arena has no room, or cannot be used.
    """
    import pyarrow as pa

    sink = pa.MockOutputStream()
    _write_table(table, sink)
    if sink.size() < least:
        return None
    with arena.draft(sink.size()) as draft:
        with pa.FixedSizeBufferWriter(pa.py_buffer(draft.open())) as writer:
            _write_table(table, writer)
        del writer
        block = draft.seal()
    return Parcel(block.descriptor, block.borrow(), _whole)


def _write_table(table: Any, sink: Any) -> None:
    import pyarrow as pa

    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def _whole(content: memoryview) -> memoryview:
    return content
