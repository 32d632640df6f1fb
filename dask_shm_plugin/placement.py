"""Where the next block goes: a pure function."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def gaps(taken: npt.NDArray[np.uint64], capacity: int) -> npt.NDArray[np.int64]:
    """Return offset and length of the free parts of an arena, by offset.

    Parameters
    ----------
    taken
        Offset and length of the parts in use, shape (n, 2), bytes, in any order, without overlap.
    capacity
        Bytes of the arena.

    Returns
    -------
    ndarray
        Shape (m, 2), bytes; no empty gap.
    """
    order = np.argsort(taken[:, 0])
    starts = taken[order, 0].astype(np.int64)
    ends = starts + taken[order, 1].astype(np.int64)
    offsets = np.concatenate(([0], ends))
    lengths = np.concatenate((starts, [capacity])) - offsets
    return np.stack((offsets, lengths), axis=1)[lengths > 0]


def place(taken: npt.NDArray[np.uint64], capacity: int, length: int) -> int | None:
    """Return the offset for a block of ``length`` bytes, or None when no gap is long enough.

    The tightest gap wins, and of equals the lowest: what was freed last is low and warm, and large gaps stay large.
    """
    free = gaps(taken, capacity)
    fitting = free[free[:, 1] >= length]
    if len(fitting) == 0:
        return None
    return int(fitting[np.argmin(fitting[:, 1]), 0])
