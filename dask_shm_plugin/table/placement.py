"""The place of the next block: a pure computation over offsets and lengths."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dask_shm_plugin.units import LARGE

Offsets = npt.NDArray[np.int64]
_ALIGNED_FROM = 4 * LARGE


class Room:
    """The parts of an arena that are in use, and the gaps between them.

    Parameters
    ----------
    taken
        Offset and length of the parts in use, shape (n, 2), bytes, in any order, without overlap.
    capacity
        Bytes that all blocks together may take.
    spread
        Offsets span this many times the capacity. The segment is sparse, so a gap takes no memory. With more offsets
        than bytes, free capacity is not lost to fragmentation.
    """

    def __init__(self, taken: npt.NDArray[np.uint64], capacity: int, spread: int = 1) -> None:
        self._left = capacity - int(np.sum(taken[:, 1]))
        # Gap i, which may be empty, is from _ends[i] to _starts[i]: the first precedes, the last follows all parts.
        self._starts, self._ends = _edges(taken, spread * capacity)

    def place(self, length: int) -> int | None:
        """Return the offset for ``length`` bytes, or None if too little capacity is left or no gap is long enough.

        The lowest gap wins, because free space at low offsets is warm: pages are given back from the top. A block that
        is at least four large pages long starts at a large page, if there is such a place.
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
        """Bytes that further blocks may take."""
        return self._left

    def has(self, offset: int, length: int) -> bool:
        """Tell whether a part is entirely free."""
        gap = int(self._starts.searchsorted(offset, side="right"))
        return gap < len(self._ends) and bool(self._ends[gap] <= offset and offset + length <= self._starts[gap])

    def take(self, offset: int, length: int) -> None:
        """Mark a part, which must be free, as in use."""
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
    """Return the gaps between the parts in use, sorted by offset.

    Parameters
    ----------
    taken
        Offset and length of the parts in use, shape (n, 2), bytes, in any order, without overlap.
    span
        The end of the offsets, in bytes.

    Returns
    -------
    ndarray
        Offset and length of each gap, shape (m, 2), bytes. Empty gaps are left out.
    """
    starts, ends = _edges(taken, span)
    lengths = starts - ends
    return np.stack((ends, lengths), axis=1)[lengths > 0]


def _inserted(among: Offsets, at: int, offset: int) -> Offsets:
    # ``np.insert`` takes ten times as long for a short array.
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
