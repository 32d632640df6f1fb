"""Parcels travel to other nodes instead of values: the frames of a value as they lie in an arena, and their version.

The receiver puts the frames into its own arena before it makes the value from them. So the value is deserialized
once, as it would be without the plugin.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import pickle
import secrets
import struct
from typing import Any

from distributed.protocol.serialize import Serialize, deserialize, to_serialize
from distributed.protocol.serialize import Serialized as DaskSerialized

from dask_shm_plugin import notices
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.receptions import Reception
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.node import membership
from dask_shm_plugin.values import handles, out_of_band
from dask_shm_plugin.values.codec import Published, Serialized, place
from dask_shm_plugin.values.handles import Span, map_spans, packed, unpacked
from dask_shm_plugin.values.versions import VERSION_BYTES

logger = logging.getLogger("dask_shm_plugin")


@dataclasses.dataclass(frozen=True)
class Parcel:
    """The frames of a value, on their way to another node.

    Attributes
    ----------
    header, in_band, version
        As in the handle of the value.
    frames
        All frames of the value.
    """

    header: bytes
    in_band: int
    version: bytes
    frames: list[Any]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        flat = [memoryview(frame) for frame in self.frames]
        is_large = [frame.nbytes > out_of_band.SMALL for frame in flat]
        frames = [pickle.PickleBuffer(one) if large else bytes(one) for one, large in zip(flat, is_large, strict=True)]
        announced = announcement([frame.nbytes for frame in itertools.compress(flat, is_large)])
        return _unpacked, (self.header, self.in_band, self.version, pickle.PickleBuffer(announced), frames)

    @property
    def size(self) -> int:
        """Bytes of all frames."""
        return sum(memoryview(frame).nbytes for frame in self.frames)

    def value(self) -> Any:
        """Make the value from the frames as they were received; those that may not be written are copied."""
        flat = [memoryview(frame) for frame in self.frames]
        return deserialize(unpacked(self.header), [memoryview(bytearray(f)) if f.readonly else f for f in flat])

    def landed(self, arena: Arena | None) -> tuple[Published | None, Any]:
        """Return the value, and that in the arena if possible; the value's own deserializer may raise."""
        try:
            if arena is not None:
                published = self.land(arena)
                value = handles.resolve(published.handle, writeable=arena.has_writeable_views)
                published.handle.note_version()
                COUNTERS.count("landed", published.handle.size)
                return published, value
        except (SharedMemoryError, OSError, MemoryError) as error:
            notices.refused(error, self.size)
        except Exception:
            logger.debug("a value does not land, or its deserializer fails", exc_info=True)
        return None, self.value()

    @step("land")
    def land(self, arena: Arena) -> Published:
        """Put the frames into an arena: those that were received into it stay where they are, the others are copied.

        Raises
        ------
        SharedMemoryError
            There is no room.
        """
        published = place(self.header, self.frames, self.size, self.in_band, arena, self.version)
        if not published.copied:
            COUNTERS.count("received", published.handle.size)
        return published


def _unpacked(header: bytes, in_band: int, version: bytes, announced: object, frames: list[Any]) -> Parcel:
    """Return the parcel that was sent. What it holds of an arena must not be written any more."""
    flat = [memoryview(frame) for frame in frames]
    return Parcel(
        header, in_band, version, [frame if Reception.of(frame) is None else frame.toreadonly() for frame in flat]
    )


class _ScatterParcel(Parcel):
    """A parcel that becomes its value when it is unpickled: whoever receives it, it must not be stored as it is."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _arrive, super().__reduce_ex__(protocol)[1]


def _arrive(*fields: Any) -> Any:
    """Return the value of a parcel, in the arena of this process if there is one and it has room."""
    arenas = membership.all_arenas()
    return _unpacked(*fields).landed(arenas[0] if len(arenas) == 1 else None)[1]


_MAGIC = bytes.fromhex("40d67a3290d39f23880932a7ab587a9a")
_COUNT = struct.Struct("<Q16s")


def announcement(lengths: list[int]) -> bytearray:
    """Return the frame that precedes the large frames of a parcel in a message: their lengths.

    It is no ``bytes``, so that Dask's connection receives the frames behind it into memory of their own.
    """
    return bytearray(struct.pack(f"<{len(lengths)}Q", *lengths) + _COUNT.pack(len(lengths), _MAGIC))


def announced(data: memoryview) -> list[int]:
    """Return the lengths of the frames that follow, if some received bytes end with an announcement of any."""
    if len(data) < _COUNT.size or data[-len(_MAGIC) :] != _MAGIC:
        return []
    count, _ = _COUNT.unpack(data[-_COUNT.size :])
    begin = len(data) - _COUNT.size - 8 * count
    return list(struct.unpack(f"<{count}Q", data[begin : -_COUNT.size])) if begin >= 0 else []


def message_of(published: Published, arena: Arena) -> Serialize:
    """Return the message that carries a published value to another node; Dask splits and compresses its frames.

    Parameters
    ----------
    published
        The value. The caller keeps it until the message was sent.
    arena
        The arena in which it lies.

    Raises
    ------
    SharedMemoryError
        A block cannot be mapped.
    """
    handle = published.handle
    mapped = map_spans([part for part in handle.parts if isinstance(part, Span)], arena)
    frames = [mapped[part].pop() if isinstance(part, Span) else part for part in handle.parts]
    return _message(Parcel(handle.header, handle.in_band, handle.version, frames))


def scatter_message_of(serialized: Serialized) -> Serialize:
    """Return the message that carries a value to a worker that is a member of an arena, but not of ours."""
    version = secrets.token_bytes(VERSION_BYTES)
    return _message(_ScatterParcel(packed(serialized.header), serialized.in_band, version, serialized.frames))


def _message(parcel: Parcel) -> Serialize:
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(parcel, protocol=5, buffer_callback=buffers.append)
    # The receiver gets memory that it may write to: it makes the value from that, if its arena has no room.
    header = {"serializer": "pickle", "writeable": (True,) * len(buffers)}
    return to_serialize(DaskSerialized(header, [stream, *(buffer.raw() for buffer in buffers)]))
