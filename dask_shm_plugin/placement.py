"""Where the next block goes: pure, over offsets and lengths."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dask_shm_plugin.syscalls import LARGE

Offsets = npt.NDArray[np.int64]
_ALIGNED_FROM = 4 * LARGE


class Room:
    """The parts of an arena that are in use, and so the gaps between them.

    Parameters
    ----------
    taken
        Offset and length of the parts in use, shape (n, 2), bytes, in any order, without overlap.
    capacity
        Bytes that all blocks together may have.
    spread
        How many times the capacity there are offsets. A gap takes no memory, for the segment is sparse: so with more
        offsets than bytes, room is not lost to the gaps between blocks.
    """

    def __init__(self, taken: npt.NDArray[np.uint64], capacity: int, spread: int = 1) -> None:
        self._left = capacity - int(np.sum(taken[:, 1]))
        # Each gap lies between the end at its place and the start at its place: before the first part, and behind the last.
        self._starts, self._ends = _edges(taken, spread * capacity)

    def place(self, length: int) -> int | None:
        """Return the offset for a block of ``length`` bytes, or None when it would be too much or no gap is long enough.

        The lowest gap wins, because what is low and free is warm: pages are given back from the top. What takes some large
        pages begins where one does, if there is such a place.
        """
        if length > self._left:
            return None
        aligned = self._lowest(-(-self._ends // LARGE) * LARGE, length) if length >= _ALIGNED_FROM else None
        return self._lowest(self._ends, length) if aligned is None else aligned

    def _lowest(self, begins: Offsets, length: int) -> int | None:
        fits = self._starts - begins >= length
        lowest = int(fits.argmax())
        return int(begins[lowest]) if fits[lowest] else None

    @property
    def left(self) -> int:
        """Bytes that further blocks may have."""
        return self._left

    def has(self, offset: int, length: int) -> bool:
        """Tell whether nobody has anything of a part."""
        gap = int(self._starts.searchsorted(offset, side="right"))
        return gap < len(self._ends) and bool(self._ends[gap] <= offset and offset + length <= self._starts[gap])

    def take(self, offset: int, length: int) -> None:
        """Put a part, which is free, in use."""
        gap = int(self._starts.searchsorted(offset, side="right"))
        self._starts = _inserted(self._starts, gap, offset)
        self._ends = _inserted(self._ends, gap + 1, offset + length)
        self._left -= length

    def give(self, offset: int, length: int) -> None:
        """Undo :meth:`take`."""
        gap = int(self._starts.searchsorted(offset))
        self._starts = _without(self._starts, gap)
        self._ends = _without(self._ends, gap + 1)
        self._left += length


def gaps(taken: npt.NDArray[np.uint64], span: int) -> Offsets:
    """Return offset and length of the free parts among some offsets, by offset.

    Parameters
    ----------
    taken
        Offset and length of the parts in use, shape (n, 2), bytes, in any order, without overlap.
    span
        Where the offsets end, in bytes.

    Returns
    -------
    ndarray
        Shape (m, 2), bytes; no empty gap.
    """
    starts, ends = _edges(taken, span)
    lengths = starts - ends
    return np.stack((ends, lengths), axis=1)[lengths > 0]


def _inserted(among: Offsets, at: int, offset: int) -> Offsets:
    # ``np.insert`` takes ten times as long where there are few.
    result = np.empty(len(among) + 1, np.int64)
    result[:at], result[at], result[at + 1 :] = among[:at], offset, among[at:]
    return result


def _without(among: Offsets, at: int) -> Offsets:
    return np.concatenate((among[:at], among[at + 1 :]))


def _edges(taken: npt.NDArray[np.uint64], span: int) -> tuple[Offsets, Offsets]:
    order = np.argsort(taken[:, 0])
    starts = taken[order, 0].astype(np.int64)
    ends = starts + taken[order, 1].astype(np.int64)
    return np.append(starts, span), np.concatenate((np.zeros(1, np.int64), ends))
