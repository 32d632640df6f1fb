"""A value as Dask's own serialized frames, placed in blocks.

Whatever Dask can send, we can share, and what is rebuilt is what Dask would have rebuilt: the same functions see the
same frames, only that large ones are mapped instead of received.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from distributed.metrics import context_meter
from distributed.protocol.serialize import Serialize, serialize, to_serialize
from distributed.protocol.serialize import Serialized as DaskSerialized
from distributed.utils import ensure_memoryview

from dask_shm_plugin import outofband, views
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.block import Block, Descriptor
from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.exceptions import SharedMemoryError, Unshareable
from dask_shm_plugin.handles import Handle, Span, map_spans, packed
from dask_shm_plugin.layout import Row
from dask_shm_plugin.reach import address_of, bounds
from dask_shm_plugin.references import Hold
from dask_shm_plugin.segment import round_up
from dask_shm_plugin.threads import call_in

_ALIGNMENT = 64
_INLINE_FRAME = outofband.SMALL
_INLINE_TOTAL = 64 << 10
_MANY_FRAMES = 1000
_STREAM = 16 << 10
"""Bytes of a pickle stream that may say how a value is put together, and nothing of what it holds."""

_T = TypeVar("_T")

Header = dict[str, Any]
Frame = Any  # bytes, bytearray or memoryview: whatever a serializer gave


class Published:
    """A value in the arena: its handle, and the references that keep its blocks.

    Notes
    -----
    The references last as long as this object; whoever hands the handle over keeps it until the other side has
    resolved it.
    """

    def __init__(
        self, arena: Arena, handle: Handle, holds: list[Hold], copied: int, *, has_overlaps: bool = False
    ) -> None:
        self._arena = arena
        self.handle = handle
        self.copied = copied
        self.has_overlaps = has_overlaps
        """Whether parts of the value share memory, which those of a rebuilt one do not."""
        self._holds = holds
        self._pickled = pickle.dumps(handle)

    @property
    def message(self) -> DaskSerialized:
        """What is sent: the handle, pickled whatever serializers the connection prefers."""
        return DaskSerialized({"serializer": "pickle", "writeable": ()}, [self._pickled])

    @property
    def is_used_elsewhere(self) -> bool:
        """Whether any other member refers to one of its blocks; where this process keeps away from them, it is none of its."""
        with contextlib.suppress(SharedMemoryError):
            return any(self._arena.holders(hold.row) > 1 for hold in self._holds)
        return False

    def __repr__(self) -> str:
        return f"<Published {self.handle.size} bytes, {len(self._holds)} blocks>"


class Context(dict[str, Any]):
    """What a connection tells serializers, and whether one of them looked at more than the version of pickle.

    What depends on sender or recipient is no other recipient's: it is not shared.
    """

    is_personal = False

    def _note(self, name: object) -> None:
        self.is_personal |= name != "pickle-protocol"

    def __getitem__(self, name: str) -> Any:
        self._note(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Look at one item."""
        self._note(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self._note(name)
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        self._note(None)
        return super().__iter__()

    def __reversed__(self) -> Iterator[str]:
        self._note(None)
        return super().__reversed__()

    def __eq__(self, other: object) -> bool:
        self._note(None)
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # as a dict's

    def __setitem__(self, name: str, value: Any) -> None:
        self._note(None)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self._note(None)
        super().__delitem__(name)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Change it."""
        self._note(None)
        super().update(*args, **kwargs)

    def clear(self) -> None:
        """Change it."""
        self._note(None)
        super().clear()

    def __repr__(self) -> str:
        self._note(None)
        return super().__repr__()

    def pop(self, *args: Any) -> Any:
        """Change it."""
        self._note(None)
        return super().pop(*args)

    def popitem(self) -> tuple[str, Any]:
        """Change it."""
        self._note(None)
        return super().popitem()

    def setdefault(self, *args: Any) -> Any:
        """Change it."""
        self._note(None)
        return super().setdefault(*args)

    def keys(self) -> Any:
        """Look at everything."""
        self._note(None)
        return super().keys()

    def values(self) -> Any:
        """Look at everything."""
        self._note(None)
        return super().values()

    def items(self) -> Any:
        """Look at everything."""
        self._note(None)
        return super().items()


class Serialized(NamedTuple):
    """A value as Dask serializes it, once: whatever is sent of it, as a handle or as bytes, comes from this."""

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
            Anything.
        context
            What the connection tells serializers.

        Raises
        ------
        Exception
            It cannot be serialized: Dask shall say so.
        """
        noting = Context(context)
        with context_meter.meter("serialize"):
            header, frames = serialize(
                to_serialize(outofband.keep_out_of_band(value, _is_mapped)), on_error="raise", context=noting
            )
        size = sum(memoryview(frame).nbytes for frame in frames)
        return cls(header, list(frames), size, noting.is_personal)

    @property
    def in_band(self) -> int:
        """Bytes that whoever rebuilds the value has to copy: pickle streams, ``bytes``."""
        return sum(len(frame) for frame in self.frames if isinstance(frame, (bytes, bytearray)))

    @property
    def is_copied_by_readers(self) -> bool:
        """Whether a copy in the arena would come on top of those that its owner and each of its readers have."""
        return 2 * self.in_band > self.size

    @property
    def message(self) -> Serialize:
        """What is sent where the value goes as bytes; Dask splits and compresses it, and serializes nothing again."""
        return to_serialize(DaskSerialized(dict(self.header), list(self.frames)))


def serialize_each(values: Mapping[Any, object], context: Mapping[str, Any]) -> dict[Any, Serialized]:
    """Serialize values, apart from those that cannot be: Dask shall say so."""
    serialized = {}
    for key, value in values.items():
        with contextlib.suppress(Exception):
            serialized[key] = Serialized.of(value, context)
    return serialized


async def where_dask_would(is_offloaded: bool, function: Callable[..., _T], *args: Any) -> _T:
    """Call a function that serializes: on the event loop, or in the one thread that Dask has for what is large.

    Parameters
    ----------
    is_offloaded
        Whether Dask would use the thread; see :func:`seams.is_offloaded`.
    function, args
        What to call.
    """
    return await call_in(None, function, *args) if is_offloaded else function(*args)


_WELL_MEASURED = (int, float, complex, bool, str, bytes, bytearray, type(None))


def may_be_large(value: object, size: int, threshold: int) -> bool:
    """Tell, without serializing it, whether a value may reach the threshold; ``size`` is Dask's estimate."""
    return size >= threshold or not _is_well_measured(value)


def _is_well_measured(value: object) -> bool:
    if isinstance(value, (np.ndarray, np.generic)):
        return not value.dtype.hasobject
    kind = type(value)
    return kind in _WELL_MEASURED or kind.__module__.partition(".")[0] in ("pandas", "pyarrow")


@step("publish")
def publish(serialized: Serialized, arena: Arena) -> Published:
    """Put the large frames of a value into the arena, those that are not there yet.

    Raises
    ------
    SharedMemoryError
        With the reason why it cannot be shared; nothing is left behind.
    """
    if any(serialized.header.get("compression") or ()):
        raise Unshareable("the value's own serializer has compressed it")
    if len(serialized.frames) > _MANY_FRAMES and serialized.size < len(serialized.frames) * _INLINE_FRAME:
        raise Unshareable("it consists of very many small parts")
    header = packed(serialized.header)
    flat = [ensure_memoryview(frame) for frame in serialized.frames]
    blocks: dict[Row, Block] = {}
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
    handle = Handle.of(arena.arena_id, header, ordered, serialized.size, serialized.in_band)
    holds = [block.detach() for block in blocks.values()]
    return Published(arena, handle, holds, copied, has_overlaps=_have_overlaps(flat))


def still_holds(published: Published, serialized: Serialized, arena: Arena) -> bool:
    """Tell whether what was published is what Dask would send now: a task may have changed its input in place.

    A frame that lies in the arena must be unwritten; any other is compared with the shared copy, byte by byte.
    """
    handle = published.handle
    if len(serialized.frames) != len(handle.parts) or packed(serialized.header) != handle.header:
        return False
    flat = [ensure_memoryview(frame) for frame in serialized.frames]
    spans = [part for part in handle.parts if isinstance(part, Span)]
    mapped = map_spans(spans, arena)
    return all(
        _is_same(frame, mapped[part].pop(), part) if isinstance(part, Span) else frame == part
        for frame, part in zip(flat, handle.parts, strict=True)
    )


def _is_same(frame: memoryview, shared: memoryview, span: Span) -> bool:
    if frame.nbytes != span.length:
        return False
    address = address_of(frame)
    place = views.ATLAS.locate(address, frame.nbytes)
    if place is not None and (place.row, place.offset) == (span.row, span.offset):
        return not views.is_written(address, frame.nbytes)
    return bool(np.array_equal(np.frombuffer(frame, np.uint8), np.frombuffer(shared, np.uint8)))


def _already_there(
    frame: memoryview, arena: Arena, blocks: dict[Row, Block], undo: contextlib.ExitStack
) -> Span | None:
    """Recognise a frame that lies in the arena and still holds there what it holds here."""
    if frame.nbytes <= _INLINE_FRAME:
        return None
    address = address_of(frame)
    place = views.ATLAS.locate(address, frame.nbytes)
    if place is None or place.arena_id != arena.arena_id or views.is_written(address, frame.nbytes):
        return None
    if place.row not in blocks:
        blocks[place.row] = undo.enter_context(arena.attach_block(Descriptor(arena.arena_id, place.row)))
    return Span(place.row, place.offset, place.length)


def _small_ones(frames: list[memoryview], placed: Container[int]) -> dict[int, bytes]:
    """Choose the frames that travel in the handle: the smallest, or all that are left when only little is."""
    candidates = [number for number in range(len(frames)) if number not in placed]
    total = sum(frames[number].nbytes for number in candidates)
    if total > _INLINE_TOTAL or len(candidates) == len(frames):
        candidates = [number for number in candidates if frames[number].nbytes <= _INLINE_FRAME]
        empty = [number for number in candidates if not frames[number].nbytes]
        candidates = [*empty, *candidates[: _INLINE_TOTAL // _INLINE_FRAME]]
    return {number: bytes(frames[number]) for number in candidates}


def _copy(
    frames: list[memoryview],
    numbers: list[int],
    arena: Arena,
    blocks: dict[Row, Block],
    undo: contextlib.ExitStack,
) -> dict[int, Span]:
    """Copy frames into one new block."""
    ends = itertools.accumulate(round_up(frames[number].nbytes, _ALIGNMENT) for number in numbers)
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
    """Tell whether a value is mapped from an arena, but for small buffers and at most a hundredth of its bytes."""
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return _is_mapped(*bounds(value))
    serialized = Serialized.of(value, {})
    frames = [ensure_memoryview(frame) for frame in serialized.frames if not isinstance(frame, bytes)]
    large = [frame for frame in frames if frame.nbytes > _INLINE_FRAME]
    is_mapped = bool(large) and all(_is_mapped(address_of(frame), frame.nbytes) for frame in large)
    return is_mapped and serialized.in_band <= max(_STREAM, serialized.size // 100)


def _have_overlaps(frames: list[memoryview]) -> bool:
    places = sorted((address_of(frame), frame.nbytes) for frame in frames if frame.nbytes)
    return any(start + length > following for (start, length), (following, _) in itertools.pairwise(places))


def _is_mapped(address: int, length: int) -> bool:
    return views.ATLAS.locate(address, length) is not None
