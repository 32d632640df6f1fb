"""Where the next block goes: a pure function."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def gaps(taken: npt.NDArray[np.uint64], span: int) -> npt.NDArray[np.int64]:
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
    order = np.argsort(taken[:, 0])
    starts = taken[order, 0].astype(np.int64)
    ends = starts + taken[order, 1].astype(np.int64)
    offsets = np.concatenate(([0], ends))
    lengths = np.concatenate((starts, [span])) - offsets
    return np.stack((offsets, lengths), axis=1)[lengths > 0]


def place(taken: npt.NDArray[np.uint64], capacity: int, length: int, spread: int = 1) -> int | None:
    """Return the offset for a block of ``length`` bytes, or None when it would be too much or no gap is long enough.

    The lowest gap wins, because what is low and free is warm: pages are given back from the top.

    Parameters
    ----------
    taken
        Offset and length of the parts in use, shape (n, 2), bytes, in any order, without overlap.
    capacity
        Bytes that all blocks together may have.
    length
        Bytes of the block.
    spread
        How many times the capacity there are offsets. A gap takes no memory, for the segment is sparse: so with more
        offsets than bytes, room is not lost to the gaps between blocks.
    """
    if int(np.sum(taken[:, 1])) + length > capacity:
        return None
    free = gaps(taken, spread * capacity)
    fitting = free[free[:, 1] >= length]
    if len(fitting) == 0:
        return None
    return int(fitting[0, 0])
