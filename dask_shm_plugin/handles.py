"""What travels instead of a value: where its frames lie in the arena. Unpickled, it becomes the value.

Whatever happens to a handle on its way, unpickling never raises on account of shared memory: it gives the value, or
something that says why not, and whoever made the request asks again for bytes.

A handle carries a checksum of itself, so that one that was changed on its way is refused, whatever was changed. It comes
with Dask's own messages, which are pickles: whoever can send those needs no handle to do harm.
"""

from __future__ import annotations

import asyncio
import dataclasses
import struct
import zlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import msgpack
from distributed.metrics import context_meter
from distributed.protocol.serialize import deserialize, msgpack_decode_default, msgpack_encode_default
from distributed.protocol.utils import msgpack_opts

from dask_shm_plugin import membership, notices
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.block import Descriptor
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import (
    ArenaUnavailable,
    HandleDamaged,
    MappingRefused,
    SharedMemoryError,
    forget_values,
)
from dask_shm_plugin.layout import Row
from dask_shm_plugin.metrics import COUNTERS

_AT_ONCE = 4 << 20
"""Bytes that may be copied on an event loop."""


class Span(NamedTuple):
    """A frame that lies in a block."""

    row: Row
    offset: int
    length: int


@dataclasses.dataclass(frozen=True)
class Handle:
    """What travels instead of a value: it *becomes* the value when it is unpickled.

    Attributes
    ----------
    arena_id
        The arena in which the spans lie.
    header
        Dask's header of the serialized value, :func:`packed`.
    parts
        The frames, in order: the bytes of a small one, the place of a large one.
    size
        Bytes of all frames.
    in_band
        Bytes of frames that rebuilding copies: pickle streams, ``bytes``.
    checksum
        Of all of these.

    Notes
    -----
    Plain data that owns nothing. Whoever sends it must hold references to its blocks until the receiver has
    unpickled it; otherwise the receiver gets an :class:`Unresolved`.
    """

    arena_id: bytes
    header: bytes
    parts: tuple[bytes | Span, ...]
    size: int
    in_band: int
    checksum: int

    @classmethod
    def of(cls, arena_id: bytes, header: bytes, parts: tuple[bytes | Span, ...], size: int, in_band: int) -> Handle:
        """Make a handle that will be known to be whole."""
        return cls(arena_id, header, parts, size, in_band, _checksum(arena_id, header, parts, size, in_band))

    def insist_whole(self) -> None:
        """Insist that this is what was made by :meth:`of`, and that it makes sense.

        Raises
        ------
        HandleDamaged
            It is not.
        """
        try:
            is_whole = self.checksum == _checksum(self.arena_id, self.header, self.parts, self.size, self.in_band)
        except (TypeError, ValueError, OverflowError, struct.error):
            is_whole = False
        if not is_whole:
            raise HandleDamaged("a handle was changed on its way")

    def to_bytes(self) -> bytes:
        """Return what :meth:`from_bytes` makes the handle of, in the same arena."""
        parts = [part if isinstance(part, bytes) else [*part.row, part.offset, part.length] for part in self.parts]
        return bytes(msgpack.dumps([self.header, parts, self.size, self.in_band, self.checksum], use_bin_type=True))

    @classmethod
    def from_bytes(cls, arena_id: bytes, data: bytes) -> Handle:
        """Undo :meth:`to_bytes`."""
        header, parts, size, in_band, checksum = msgpack.loads(data)
        placed = (p if isinstance(p, bytes) else Span(Row(p[0], p[1]), p[2], p[3]) for p in parts)
        return cls(arena_id, header, tuple(placed), size, in_band, checksum)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _receive, tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def _checksum(arena_id: bytes, header: bytes, parts: tuple[bytes | Span, ...], size: int, in_band: int) -> int:
    """Add a handle up; raise where a field is not of its kind or cannot be."""
    checksum = zlib.crc32(header, zlib.crc32(arena_id))
    numbers = [size, in_band]
    for part in parts:
        if isinstance(part, Span):
            numbers += [*part.row, part.offset, part.length]
        else:
            numbers.append(len(part))
            checksum = zlib.crc32(part, checksum)
    return zlib.crc32(struct.pack(f"<{len(numbers)}Q", *numbers), checksum)


@dataclasses.dataclass(frozen=True)
class Unresolved:
    """What a handle becomes when it cannot become its value; whoever made the request asks again for bytes."""

    reason: str
    size: int = 0


@dataclasses.dataclass(frozen=True)
class Deferred:
    """What a handle becomes on an event loop when rebuilding takes time; whoever made the request does that elsewhere."""

    handle: Handle


@dataclasses.dataclass(frozen=True)
class Failed:
    """What a handle becomes when the value's own deserializer raises: the same that it would have raised without us."""

    error: Exception


class NotRebuilt(Exception):
    """A value's own deserializer has failed, as it would have without us; ``args[0]`` is what it has raised."""


def packed(header: dict[str, Any]) -> bytes:
    """Return a header as Dask sends it: the keys of a dict travel there, and msgpack makes an ``int`` of an ``IntEnum``."""
    return bytes(msgpack.dumps(header, default=msgpack_encode_default, use_bin_type=True))


def unpacked(header: bytes) -> Any:
    """Undo :func:`packed`. A new one each time, for some of Dask's deserializers take a header apart."""
    return msgpack.loads(header, object_hook=msgpack_decode_default, use_list=False, **msgpack_opts)


Take = Callable[[Arena, Descriptor, int, int], memoryview]
"""How bytes of a block are had: ``Arena.view`` maps them, ``Arena.read`` copies them."""


@step("resolve")
def resolve(handle: Handle, *, writeable: bool = True, take: Take = Arena.view) -> Any:
    """Rebuild the value of a handle over mappings of its own.

    Raises
    ------
    SharedMemoryError
        A block is gone, or cannot be mapped, or this process is not in that arena, or the handle was changed.
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
    """Map every span; those that overlap in different mappings, for Dask would have sent independent copies."""
    mapped: dict[Span, list[memoryview]] = defaultdict(list)
    for row in {span.row for span in spans}:
        for group in _without_overlap(sorted(span for span in spans if span.row == row)):
            start = group[0].offset
            view = _taken(take, arena, row, start, group[-1].offset + group[-1].length - start)
            for span in group:
                mapped[span].append(view[span.offset - start : span.offset - start + span.length])
    return mapped


def _taken(take: Take, arena: Arena, row: Row, offset: int, length: int) -> memoryview:
    try:
        return take(arena, Descriptor(arena.arena_id, row), offset, length)
    except ValueError as error:
        raise HandleDamaged(f"a handle names what is in no block: {error}") from error


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
    """Return a header that says of every buffer that it was read-only."""
    if isinstance(header, (list, tuple)):
        return type(header)(_read_only(item) for item in header)
    if not isinstance(header, dict):
        return header
    return {
        key: type(value)(flag and False for flag in value) if key == "writeable" else _read_only(value)
        for key, value in header.items()
    }


_views: dict[bytes, str] = {}


def set_views(arena_id: bytes, how: str) -> None:
    """Choose whether this process's views are "copy-on-write" or "read-only"."""
    _views[arena_id] = how


def _receive(*fields: Any) -> Any:
    """Unpickle a handle: never raises on account of shared memory."""
    try:
        handle = Handle(*fields)
        handle.insist_whole()
    except TypeError:
        return Unresolved("version")
    except HandleDamaged as error:
        return Unresolved(error.reason)
    return arrive(handle)


def arrive(handle: Handle) -> Any:
    """Return the value of a handle, or an :class:`Unresolved`, or on an event loop a :class:`Deferred`."""
    is_on_loop = asyncio._get_running_loop() is not None
    if is_on_loop and handle.in_band > _AT_ONCE:
        return Deferred(handle)
    return become(handle, may_defer=is_on_loop)


def become(handle: Handle, *, may_defer: bool = False) -> Any:
    """Return the value of a handle, or an :class:`Unresolved`, or a :class:`Failed`; a :class:`Deferred` where it may be one."""
    is_writeable = _views.get(handle.arena_id) != "read-only"
    try:
        with context_meter.meter("deserialize"):
            return _mapped_or_copied(handle, writeable=is_writeable, may_defer=may_defer)
    except SharedMemoryError as error:
        return Unresolved(error.reason, handle.size)
    except Exception as error:
        forget_values(error)
        # A deserializer that wants to write shall have bytes to which it may.
        return Failed(error) if is_writeable else Unresolved("deserializer", handle.size)


def _mapped_or_copied(handle: Handle, *, writeable: bool, may_defer: bool) -> Any:
    try:
        value = resolve(handle, writeable=writeable)
    except MappingRefused as error:
        if may_defer:
            return Deferred(handle)
        notices.refused(error, handle.size)
        return resolve(handle, writeable=writeable, take=Arena.read)
    COUNTERS.count("attached", handle.size)
    return value
