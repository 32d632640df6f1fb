"""Handles travel instead of values: a handle names a value's frames in the arena, and becomes the value when unpickled.

Unpickling a handle never raises because of shared memory. It returns the value, or an object with the reason why not.
The requesting process then repeats its request, for bytes.

A handle carries a checksum of its fields: a handle that was changed on its way is refused. The checksum is no
protection against malice, and need not be. Handles arrive in Dask's own messages, which are pickles: a process that
can send these can run any code.
"""

from __future__ import annotations

import asyncio
import dataclasses
import struct
import threading
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import msgpack
from distributed.metrics import context_meter
from distributed.protocol.serialize import deserialize, msgpack_decode_default, msgpack_encode_default
from distributed.protocol.utils import msgpack_opts

from dask_shm_plugin import notices
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.block import Descriptor
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import ArenaUnavailable, HandleDamaged, MappingRefused, SharedMemoryError, forget_values
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.node import membership
from dask_shm_plugin.table.layout import BlockId
from dask_shm_plugin.values.versions import VERSION_BYTES, VERSIONS, digest_of

_DEFERRED_FROM_BYTES = 4 << 20
"""Maximum number of bytes to copy on an event loop. A handle with more becomes a :class:`Deferred`."""


_MAX_KNOWN = 256


class Span(NamedTuple):
    """The place of a frame in a block; offset and length in bytes."""

    row: BlockId
    offset: int
    length: int


@dataclasses.dataclass(frozen=True)
class Handle:
    """A message that travels instead of a value: it *becomes* the value when it is unpickled.

    Attributes
    ----------
    arena_id
        The arena in which the spans lie.
    header
        Dask's header of the serialized value, :func:`packed`.
    parts
        The frames, in order: the bytes of a small frame, the place of a large one.
    size
        Bytes of all frames.
    in_band
        Bytes of those frames that are copied when the value is rebuilt: pickle streams, ``bytes``, ``bytearray``.
    version
        The version of the value, see `versions`.
    checksum
        CRC-32 of all other fields.

    Notes
    -----
    Plain data that owns nothing. The sender must hold references to the blocks until the receiver has unpickled the
    handle. If the blocks are released earlier, the receiver gets an :class:`Unresolved`.
    """

    arena_id: bytes
    header: bytes
    parts: tuple[bytes | Span, ...]
    size: int
    in_band: int
    version: bytes
    checksum: int

    @classmethod
    def of(
        cls,
        arena_id: bytes,
        header: bytes,
        parts: tuple[bytes | Span, ...],
        size: int,
        in_band: int,
        version: bytes | None = None,
    ) -> Handle:
        """Return a handle with its checksum; without a version, it gets the one that is known for its frames."""
        place = _place(arena_id, header, parts)
        if version is None:
            version = VERSIONS.of(place)
        else:
            VERSIONS.note(place, version)
        fields = arena_id, header, parts, size, in_band, version
        return cls(*fields, _checksum(*fields))

    @property
    def is_from_afar(self) -> bool:
        """Whether the value was published on another node before it came to this arena."""
        return self.version != _place(self.arena_id, self.header, self.parts)

    def of_version(self, version: bytes) -> Handle:
        """Return the handle with another version, which is remembered for its frames."""
        return self.of(self.arena_id, self.header, self.parts, self.size, self.in_band, version)

    def note_version(self) -> None:
        """Remember the version: the value keeps it when this process publishes it again."""
        VERSIONS.note(_place(self.arena_id, self.header, self.parts), self.version)
        KNOWN.note(self)

    @property
    def blocks(self) -> frozenset[BlockId]:
        """The blocks in which frames lie."""
        return frozenset(part.row for part in self.parts if isinstance(part, Span))

    def insist_whole(self) -> None:
        """Check that the handle is as :meth:`of` made it.

        Raises
        ------
        HandleDamaged
            The checksum does not match, or a field has a wrong type or an impossible value.
        """
        try:
            fields = self.arena_id, self.header, self.parts, self.size, self.in_band, self.version
            is_whole = self.checksum == _checksum(*fields)
        except (TypeError, ValueError, OverflowError, struct.error):
            is_whole = False
        if not is_whole:
            raise HandleDamaged("a handle was changed on its way")

    def to_bytes(self) -> bytes:
        """Return all fields but the id of the arena as bytes, for :meth:`from_bytes`."""
        parts = [part if isinstance(part, bytes) else [*part.row, part.offset, part.length] for part in self.parts]
        fields = self.header, parts, self.size, self.in_band, self.version, self.checksum
        return bytes(msgpack.dumps(fields, use_bin_type=True))

    @classmethod
    def from_bytes(cls, arena_id: bytes, data: bytes) -> Handle:
        """Return the handle that :meth:`to_bytes` has packed; its checksum is not checked here."""
        header, parts, size, in_band, version, checksum = msgpack.loads(data)
        placed = (p if isinstance(p, bytes) else Span(BlockId(p[0], p[1]), p[2], p[3]) for p in parts)
        return cls(arena_id, header, tuple(placed), size, in_band, version, checksum)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _receive, tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def _place(arena_id: bytes, header: bytes, parts: tuple[bytes | Span, ...]) -> bytes:
    """Return a digest that tells the frames of a handle from those of all others, in any arena."""
    placed = (part if isinstance(part, bytes) else repr((*part.row, *part[1:])).encode() for part in parts)
    kinds = bytes(isinstance(part, Span) for part in parts)
    return digest_of(arena_id, header, kinds, *placed)


def _checksum(
    arena_id: bytes, header: bytes, parts: tuple[bytes | Span, ...], size: int, in_band: int, version: bytes
) -> int:
    """Return the CRC-32 of a handle's fields; raise if one has a wrong type or an impossible value."""
    if len(version) != VERSION_BYTES:
        raise ValueError("a version of another length")
    checksum = zlib.crc32(version, zlib.crc32(header, zlib.crc32(arena_id)))
    numbers = [size, in_band]
    for part in parts:
        if isinstance(part, Span):
            numbers += [*part.row, part.offset, part.length]
        else:
            numbers.append(len(part))
            checksum = zlib.crc32(part, checksum)
    return zlib.crc32(struct.pack(f"<{len(numbers)}Q", *numbers), checksum)


class _KnownHandles:
    """The last handles that this process has made or received, by their arena and blocks; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[bytes, frozenset[BlockId]], Handle] = OrderedDict()

    def note(self, handle: Handle) -> None:
        """Note a handle."""
        with self._lock:
            self._kept[handle.arena_id, handle.blocks] = handle
            self._kept.move_to_end((handle.arena_id, handle.blocks))
            if len(self._kept) > _MAX_KNOWN:
                self._kept.popitem(last=False)

    def like(self, handle: Handle) -> Handle | None:
        """Return the handle that is known for the same blocks, or None."""
        return self._kept.get((handle.arena_id, handle.blocks))


KNOWN = _KnownHandles()


@dataclasses.dataclass(frozen=True)
class Unresolved:
    """The result of unpickling a handle that cannot be resolved; the requesting process asks again, for bytes."""

    reason: str
    size: int = 0


@dataclasses.dataclass(frozen=True)
class Deferred:
    """The result of unpickling a handle on an event loop if rebuilding takes long: a thread has to do that."""

    handle: Handle


@dataclasses.dataclass(frozen=True)
class Failed:
    """The result of unpickling a handle if the value's own deserializer raises, as it would without the plugin."""

    error: Exception


class NotRebuilt(Exception):
    """A value's own deserializer has failed, as it would without the plugin; ``args[0]`` is its exception."""


def packed(header: dict[str, Any]) -> bytes:
    """Return a header packed by msgpack, as Dask sends it.

    Packing can change a value: the keys of a dict travel in the header, and msgpack turns an ``IntEnum`` into an
    ``int``.
    """
    return bytes(msgpack.dumps(header, default=msgpack_encode_default, use_bin_type=True))


def unpacked(header: bytes) -> Any:
    """Undo :func:`packed`; each call returns a new header, because some of Dask's deserializers modify it."""
    return msgpack.loads(header, object_hook=msgpack_decode_default, use_list=False, **msgpack_opts)


Take = Callable[[Arena, Descriptor, int, int], memoryview]
"""Gets a part of a block: ``Arena.view`` maps it, ``Arena.read`` copies it."""


@step("resolve")
def resolve(handle: Handle, *, writeable: bool = True, take: Take = Arena.view) -> Any:
    """Rebuild the value of a handle over mappings that are made for it.

    Parameters
    ----------
    handle
        The handle.
    writeable
        Whether the value's buffers may be writeable; if not, all of them are read-only.
    take
        Maps or copies the parts of blocks.

    Raises
    ------
    SharedMemoryError
        A block is gone or cannot be mapped, this process is not a member of the arena, or the handle was changed.
    Exception
        The value's own deserializer has failed.
    """
    handle.insist_whole()
    arena = membership.find(handle.arena_id)
    if arena is None:
        raise ArenaUnavailable("this process is not a member of the arena")
    mapped = map_spans([part for part in handle.parts if isinstance(part, Span)], arena, take)
    frames = [mapped[part].pop() if isinstance(part, Span) else memoryview(bytearray(part)) for part in handle.parts]
    header = unpacked(handle.header)
    if not writeable:
        header, frames = _read_only(header), [frame.toreadonly() for frame in frames]
    return deserialize(header, frames)


def map_spans(spans: list[Span], arena: Arena, take: Take = Arena.view) -> dict[Span, list[memoryview]]:
    """Map every span and return one view per occurrence.

    Spans that overlap get different mappings, because Dask would have sent independent copies.
    """
    mapped: dict[Span, list[memoryview]] = defaultdict(list)
    for row in {span.row for span in spans}:
        for group in _without_overlap(sorted(span for span in spans if span.row == row)):
            start = group[0].offset
            view = _taken(take, arena, row, start, group[-1].offset + group[-1].length - start)
            for span in group:
                mapped[span].append(view[span.offset - start : span.offset - start + span.length])
    return mapped


def _taken(take: Take, arena: Arena, row: BlockId, offset: int, length: int) -> memoryview:
    try:
        return take(arena, Descriptor(arena.arena_id, row), offset, length)
    except ValueError as error:
        raise HandleDamaged(f"a handle names bytes outside its block: {error}") from error


def _without_overlap(spans: list[Span]) -> list[list[Span]]:
    groups: list[list[Span]] = []
    for span in spans:
        fitting = next((g for g in groups if g[-1].offset + g[-1].length <= span.offset), None)
        if fitting is None:
            groups.append([span])
        else:
            fitting.append(span)
    return groups


def _read_only(header: Any) -> Any:
    """Return a copy of a header in which every buffer is marked as read-only."""
    if isinstance(header, (list, tuple)):
        return type(header)(_read_only(item) for item in header)
    if not isinstance(header, dict):
        return header
    return {
        key: type(value)(flag and False for flag in value) if key == "writeable" else _read_only(value)
        for key, value in header.items()
    }


def _receive(*fields: Any) -> Any:
    """Unpickle a handle; never raises because of shared memory."""
    try:
        handle = Handle(*fields)
        handle.insist_whole()
    except TypeError:
        return Unresolved("version")
    except HandleDamaged as error:
        return Unresolved(error.reason)
    return receive(handle)


def receive(handle: Handle) -> Any:
    """Return a handle's value, an :class:`Unresolved`, a :class:`Failed` or, on an event loop, a :class:`Deferred`."""
    is_on_loop = asyncio._get_running_loop() is not None
    if is_on_loop and handle.in_band > _DEFERRED_FROM_BYTES:
        return Deferred(handle)
    return rebuild(handle, may_defer=is_on_loop)


def rebuild(handle: Handle, *, may_defer: bool = False) -> Any:
    """Return the value of a handle, an :class:`Unresolved` or a :class:`Failed`.

    With ``may_defer``, return a :class:`Deferred` if the value cannot be mapped and would have to be copied.
    """
    arena = membership.find(handle.arena_id)
    is_writeable = arena is None or arena.has_writeable_views
    try:
        with context_meter.meter("deserialize"):
            return _mapped_or_copied(handle, writeable=is_writeable, may_defer=may_defer)
    except SharedMemoryError as error:
        return Unresolved(error.reason, handle.size)
    except Exception as error:
        forget_values(error)
        # Read-only views: the deserializer may have failed because it writes to a buffer. Bytes would be writeable.
        return Failed(error) if is_writeable else Unresolved("deserializer", handle.size)


def _mapped_or_copied(handle: Handle, *, writeable: bool, may_defer: bool) -> Any:
    try:
        value = resolve(handle, writeable=writeable)
    except MappingRefused as error:
        if may_defer:
            return Deferred(handle)
        notices.refused(error, handle.size)
        return resolve(handle, writeable=writeable, take=Arena.read)
    handle.note_version()
    COUNTERS.count("attached", handle.size)
    return value
