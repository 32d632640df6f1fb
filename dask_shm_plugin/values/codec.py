"""Represent a value as Dask's own serialized frames, and place the large ones in blocks.

Values of every type that Dask can send can be shared, apart from those that :func:`publish` refuses. They are rebuilt
as Dask would rebuild them: the same functions get the same frames, but large frames are mapped instead of received.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from distributed.metrics import context_meter
from distributed.protocol.serialize import Serialize, serialize, to_serialize
from distributed.protocol.serialize import Serialized as DaskSerialized
from distributed.utils import ensure_memoryview

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.block import Block, Descriptor
from dask_shm_plugin.arena.receptions import Reception
from dask_shm_plugin.arena.references import Hold
from dask_shm_plugin.births import switch as births
from dask_shm_plugin.births.nursery import Sealed
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import SharedMemoryError, Unshareable
from dask_shm_plugin.linux import pagemap
from dask_shm_plugin.mapping import atlas
from dask_shm_plugin.table.layout import BlockId
from dask_shm_plugin.threads import call_in
from dask_shm_plugin.units import round_up
from dask_shm_plugin.values import adoption, aliases, out_of_band
from dask_shm_plugin.values.buffers import address_of, bounds
from dask_shm_plugin.values.context import Context
from dask_shm_plugin.values.handles import KNOWN, Handle, Span, map_spans, packed, resolve

_ALIGNMENT_BYTES = 64
_INLINE_FRAME_BYTES = out_of_band.SMALL
_INLINE_TOTAL_BYTES = 64 << 10
_MAX_SMALL_FRAMES = 1000
_PIECE_BYTES = 256 << 10
_STREAM_BYTES = 16 << 10
"""A pickle stream of up to this many bytes counts as the structure of a value, and not as its contents."""

_T = TypeVar("_T")

Header = dict[str, Any]
Frame = Any  # bytes, bytearray or memoryview, as the serializer returned it


class Published:
    """A value in the arena: its handle, and the references that keep its blocks.

    Attributes
    ----------
    handle
        Names the value's frames.
    copied
        Bytes that were copied into the arena to publish the value; 0 if all of its large frames lay there before.

    Notes
    -----
    The references last as long as this object. A process that sends the handle keeps this object until the receiver has
    resolved the handle.
    """

    def __init__(
        self, arena: Arena, handle: Handle, holds: list[Hold], copied: int, *, has_overlaps: bool = False
    ) -> None:
        self._arena = arena
        self.handle = handle
        self.copied = copied
        self.has_overlaps = has_overlaps
        """Whether parts of the value share memory. The parts of a rebuilt value do not."""
        self._holds = holds

    @classmethod
    def of_handle(cls, handle: Handle, arena: Arena) -> Published:
        """Return the published value of a handle, with references of this process.

        Raises
        ------
        SharedMemoryError
            A block is gone.
        """
        rows = {part.row for part in handle.parts if isinstance(part, Span)}
        with contextlib.ExitStack() as undo:
            blocks = [undo.enter_context(arena.attach_block(Descriptor(arena.arena_id, row))) for row in rows]
            undo.pop_all()
        return cls(arena, handle, [block.detach() for block in blocks], 0)

    @property
    def message(self) -> DaskSerialized:
        """The message to send: the handle, pickled whichever serializers the connection prefers."""
        return DaskSerialized({"serializer": "pickle", "writeable": ()}, [pickle.dumps(self.handle)])

    @property
    def blocks(self) -> dict[BlockId, int]:
        """The blocks of the value, with the bytes of its frames in each."""
        found = dict.fromkeys((hold.row for hold in self._holds), 0)
        for part in self.handle.parts:
            if isinstance(part, Span):
                found[part.row] += part.length
        return found

    @property
    def is_used_elsewhere(self) -> bool:
        """Whether any other member refers to one of its blocks; False if the arena is damaged or was left."""
        with contextlib.suppress(SharedMemoryError):
            return any(self._arena.allocator.holders(hold.row) > 1 for hold in self._holds)
        return False

    def __repr__(self) -> str:
        return f"<Published {self.handle.size} bytes, {len(self._holds)} blocks>"


class Serialized(NamedTuple):
    """A value as Dask serializes it, once: both a handle and a message of bytes are made from it.

    Attributes
    ----------
    header, frames
        As Dask's ``serialize`` returns them.
    size
        Bytes of all frames.
    is_personal
        Whether a serializer read the context of the connection, see :class:`Context`.
    """

    header: Header
    frames: list[Frame]
    size: int
    is_personal: bool

    @classmethod
    def of(cls, value: object, context: Mapping[str, Any]) -> Serialized:
        """Serialize a value as a connection would.

        Parameters
        ----------
        value
            Any value.
        context
            The context that the connection passes to serializers.

        Raises
        ------
        Exception
            The value cannot be serialized. Callers then let Dask serialize it, so that Dask raises the error.
        """
        noting = Context(context)
        with context_meter.meter("serialize"):
            header, frames = serialize(
                to_serialize(out_of_band.keep_out_of_band(value, _is_mapped)), on_error="raise", context=noting
            )
        size = sum(memoryview(frame).nbytes for frame in frames)
        return cls(header, list(frames), size, noting.is_personal)

    @property
    def in_band(self) -> int:
        """Bytes that a reader has to copy to rebuild the value: pickle streams, ``bytes`` and ``bytearray``."""
        return sum(len(frame) for frame in self.frames if isinstance(frame, (bytes, bytearray)))

    @property
    def is_copied_by_readers(self) -> bool:
        """Whether readers copy more than half of the bytes: a copy in the arena would come on top of all of theirs."""
        return 2 * self.in_band > self.size

    @property
    def message(self) -> Serialize:
        """The message to send instead of a handle: Dask splits and compresses its frames, but serializes nothing."""
        return to_serialize(DaskSerialized(dict(self.header), list(self.frames)))


def serialize_each(values: Mapping[Any, object], context: Mapping[str, Any]) -> dict[Any, Serialized]:
    """Serialize values; leave out those that cannot be serialized, so that Dask raises the error."""
    serialized = {}
    for key, value in values.items():
        with contextlib.suppress(Exception):
            serialized[key] = Serialized.of(value, context)
    return serialized


async def where_dask_would(is_offloaded: bool, function: Callable[..., _T], *args: Any) -> _T:
    """Call a function that serializes where Dask would: on the event loop, or in Dask's one thread for large messages.

    Parameters
    ----------
    is_offloaded
        Whether Dask would use the thread; see :func:`requests.is_offloaded`.
    function, args
        The function and its arguments.
    """
    return await call_in(None, function, *args) if is_offloaded else function(*args)


_COLLECTIONS = (list, set, tuple, dict)
_WELL_MEASURED = (int, float, complex, bool, str, bytes, bytearray, type(None))


def may_be_large(value: object, size: int, threshold: int) -> bool:
    """Return whether a value may reach the threshold, without serializing it; ``size`` is Dask's estimate in bytes."""
    return size >= threshold or not _is_well_measured(value)


def is_of_small_items(value: Any, size: int) -> bool:
    """Return whether a value is a collection of very many small items; ``size`` is Dask's estimate in bytes.

    Dask serializes each item into frames of its own, with a header for each. Such a value is not shared. It must not
    even be serialized here: its headers, which Dask drops at once, take several times as much memory as the value.
    """
    count, visited, waiting = 0, 0, [value] if type(value) in _COLLECTIONS else []
    while waiting and visited < _MAX_SMALL_FRAMES:
        collection = waiting.pop()
        count, visited = count + len(collection), visited + 1
        if len(collection) <= _MAX_SMALL_FRAMES:
            items = collection.values() if type(collection) is dict else collection
            waiting.extend(item for item in items if type(item) in _COLLECTIONS)
    return count > _MAX_SMALL_FRAMES and size < count * _INLINE_FRAME_BYTES


def _is_well_measured(value: object) -> bool:
    if isinstance(value, (np.ndarray, np.generic)):
        return not value.dtype.hasobject
    kind = type(value)
    return kind in _WELL_MEASURED or kind.__module__.partition(".")[0] in ("pandas", "pyarrow")


@step("publish")
def publish(serialized: Serialized, arena: Arena) -> Published:
    """Copy those large frames of a value into the arena that do not lie there yet.

    Raises
    ------
    SharedMemoryError
        The value cannot be shared, for the given reason. No reference and no draft is left behind.
    """
    if any(serialized.header.get("compression") or ()):
        raise Unshareable("the value's own serializer has compressed it")
    if len(serialized.frames) > _MAX_SMALL_FRAMES and serialized.size < len(serialized.frames) * _INLINE_FRAME_BYTES:
        raise Unshareable("the value consists of very many small frames")
    published = place(packed(serialized.header), serialized.frames, serialized.size, serialized.in_band, arena)
    if published.copied:
        KNOWN.note(published.handle)
    else:
        _keep_version(published, arena)
    return published


def _keep_version(published: Published, arena: Arena) -> None:
    """Give a value that lay in the arena the version that it had before, if it is still the same.

    pickle writes the same DataFrame in more than one way, and the handle differs then. So the value that is known to
    lie in these blocks is rebuilt, which copies nothing, and written once more.
    """
    handle = published.handle
    known = KNOWN.like(handle)
    if known is None or known.version == handle.version:
        return
    with contextlib.suppress(Exception):
        value = resolve(known)
        # Only code of a library that is known to write equal values alike runs here, and no code of a user.
        if adoption.may_adopt(value) or aliases.is_defined_by(type(value), "pandas"):
            again = Serialized.of(value, {})
            other = place(packed(again.header), again.frames, again.size, again.in_band, arena).handle
            if (other.header, other.parts) == (handle.header, handle.parts):
                published.handle = handle.of_version(known.version)


def place(
    header: bytes, frames: list[Frame], size: int, in_band: int, arena: Arena, version: bytes | None = None
) -> Published:
    """Place the frames of a value in the arena; arguments as for :meth:`Handle.of`, which see."""
    flat = [ensure_memoryview(frame) for frame in frames]
    blocks: dict[BlockId, Block] = {}
    with contextlib.ExitStack() as undo:
        parts: dict[int, bytes | Span] = {}
        for number, frame in enumerate(flat):
            span = _already_there(frame, arena, blocks, undo)
            if span is not None:
                parts[number] = span
        parts |= _small_ones(flat, parts)
        missing = [number for number in range(len(flat)) if number not in parts]
        copied = sum(flat[number].nbytes for number in missing)
        if missing:
            parts |= _copy(flat, missing, arena, blocks, undo)
        undo.pop_all()
    ordered = tuple(parts[number] for number in range(len(flat)))
    handle = Handle.of(arena.arena_id, header, ordered, size, in_band, version)
    holds = [block.detach() for block in blocks.values()]
    return Published(arena, handle, holds, copied, has_overlaps=_have_overlaps(flat))


def still_holds(published: Published, serialized: Serialized, arena: Arena) -> bool:
    """Return whether a published value equals the one that Dask would send now: a task may have changed it in place.

    A frame that lies at its published place in the arena must be unwritten. Any other frame is compared with the shared
    copy, byte by byte.
    """
    handle = published.handle
    if len(serialized.frames) != len(handle.parts) or packed(serialized.header) != handle.header:
        return False
    flat = [ensure_memoryview(frame) for frame in serialized.frames]
    spans = [part for part in handle.parts if isinstance(part, Span)]
    mapped = map_spans(spans, arena)
    return all(
        _is_same(frame, mapped[part].pop(), part, arena) if isinstance(part, Span) else frame == part
        for frame, part in zip(flat, handle.parts, strict=True)
    )


def _is_same(frame: memoryview, shared: memoryview, span: Span, arena: Arena) -> bool:
    if frame.nbytes != span.length:
        return False
    address = address_of(frame)
    place = atlas.ATLAS.locate(address, frame.nbytes)
    if place is not None and place[:3] == (arena.arena_id, span.row, span.offset):
        return not pagemap.is_written(address, frame.nbytes)
    return _is_equal(np.frombuffer(frame, np.uint8), np.frombuffer(shared, np.uint8))


def _is_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Compare two arrays of bytes, in pieces: NumPy makes an array of the results, which then stays in the cache."""
    starts = range(0, len(a), _PIECE_BYTES)
    return all(np.array_equal(a[start : start + _PIECE_BYTES], b[start : start + _PIECE_BYTES]) for start in starts)


def _already_there(
    frame: memoryview, arena: Arena, blocks: dict[BlockId, Block], undo: contextlib.ExitStack
) -> Span | None:
    """Return the span of a large frame that lies in the arena, unwritten, or None; add its block to ``blocks``."""
    if frame.nbytes <= _INLINE_FRAME_BYTES:
        return None
    address = address_of(frame)
    received = Reception.of(frame)
    if received is not None and received.is_complete and received.arena_id == arena.arena_id:
        row = received.hold.row
        if row not in blocks:
            blocks[row] = undo.enter_context(received.seal())
        return Span(row, address - received.address, frame.nbytes)
    place = atlas.ATLAS.locate(address, frame.nbytes)
    is_new = False
    if place is None and (sealed := births.seal(address, frame.nbytes)):
        place, is_new = atlas.ATLAS.locate(address, frame.nbytes), sealed is Sealed.NOW
    if place is None or place.arena_id != arena.arena_id:
        return None
    # To ask the kernel takes milliseconds for 1 GiB. What was sealed just now need not be asked for.
    if not is_new and pagemap.is_written(address, frame.nbytes):
        return None
    if place.row not in blocks:
        blocks[place.row] = undo.enter_context(arena.attach_block(Descriptor(arena.arena_id, place.row)))
    return Span(place.row, place.offset, place.length)


def _small_ones(frames: list[memoryview], placed: Container[int]) -> dict[int, bytes]:
    """Choose the frames that travel in the handle.

    If some frames lie in the arena and the others have at most 64 KiB altogether, all others do. Otherwise all empty
    frames do, and the first 64 frames of up to 1 KiB.
    """
    candidates = [number for number in range(len(frames)) if number not in placed]
    total = sum(frames[number].nbytes for number in candidates)
    if total > _INLINE_TOTAL_BYTES or len(candidates) == len(frames):
        candidates = [number for number in candidates if frames[number].nbytes <= _INLINE_FRAME_BYTES]
        empty = [number for number in candidates if not frames[number].nbytes]
        candidates = [*empty, *candidates[: _INLINE_TOTAL_BYTES // _INLINE_FRAME_BYTES]]
    return {number: bytes(frames[number]) for number in candidates}


def _copy(
    frames: list[memoryview],
    numbers: list[int],
    arena: Arena,
    blocks: dict[BlockId, Block],
    undo: contextlib.ExitStack,
) -> dict[int, Span]:
    """Copy frames into one new block, each to a multiple of 64 bytes."""
    ends = itertools.accumulate(round_up(frames[number].nbytes, _ALIGNMENT_BYTES) for number in numbers)
    offsets = [0, *ends]
    with arena.draft(offsets.pop()) as draft:
        for number, offset in zip(numbers, offsets, strict=True):
            draft.write(offset, frames[number])
        block = undo.enter_context(draft.seal())
    blocks[block.row] = block
    return {
        number: Span(block.row, offset, frames[number].nbytes) for number, offset in zip(numbers, offsets, strict=True)
    }


def is_shared(value: object) -> bool:
    """Return whether a value is mapped from an arena, apart from small buffers and a small pickle stream.

    The stream and other bytes that readers copy may have 16 KiB or a hundredth of the value, whichever is more.
    """
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return _is_mapped(*bounds(value))
    serialized = Serialized.of(value, {})
    frames = [ensure_memoryview(frame) for frame in serialized.frames if not isinstance(frame, bytes)]
    large = [frame for frame in frames if frame.nbytes > _INLINE_FRAME_BYTES]
    is_mapped = bool(large) and all(_is_mapped(address_of(frame), frame.nbytes) for frame in large)
    return is_mapped and serialized.in_band <= max(_STREAM_BYTES, serialized.size // 100)


def _have_overlaps(frames: list[memoryview]) -> bool:
    places = sorted((address_of(frame), frame.nbytes) for frame in frames if frame.nbytes)
    return any(start + length > following for (start, length), (following, _) in itertools.pairwise(places))


def _is_mapped(address: int, length: int) -> bool:
    return atlas.ATLAS.locate(address, length) is not None
