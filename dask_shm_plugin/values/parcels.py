"""Parcels travel to other nodes instead of values: the frames of a value as they lie in an arena, and their version.

The receiver puts the frames into its own arena before it makes the value from them. So the value is deserialized
once, as it would be without the plugin.
"""

from __future__ import annotations

import dataclasses
import logging
import pickle
import secrets
from typing import Any

from distributed.protocol.serialize import Serialize, deserialize, to_serialize
from distributed.protocol.serialize import Serialized as DaskSerialized

from dask_shm_plugin import notices
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.node import membership
from dask_shm_plugin.values import handles
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
        frames = [pickle.PickleBuffer(frame) for frame in self.frames]
        return Parcel, (self.header, self.in_band, self.version, frames)

    @property
    def size(self) -> int:
        """Bytes of all frames."""
        return sum(memoryview(frame).nbytes for frame in self.frames)

    def value(self) -> Any:
        """Make the value from the frames as they were received."""
        return deserialize(unpacked(self.header), list(self.frames))

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
        """Copy the frames into an arena.

        Raises
        ------
        SharedMemoryError
            There is no room.
        """
        return place(self.header, self.frames, self.size, self.in_band, arena, self.version)


class _ScatterParcel(Parcel):
    """A parcel that becomes its value when it is unpickled: whoever receives it, it must not be stored as it is."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _arrive, super().__reduce_ex__(protocol)[1]


def _arrive(*fields: Any) -> Any:
    """Return the value of a parcel, in the arena of this process if there is one and it has room."""
    arenas = membership.all_arenas()
    return Parcel(*fields).landed(arenas[0] if len(arenas) == 1 else None)[1]


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
