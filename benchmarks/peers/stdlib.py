"""``multiprocessing.shared_memory``: a named segment for each value."""

from __future__ import annotations

import itertools
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np


class Store:
    """Creates segments and removes them; the names say whose they are, should it be killed."""

    whereabouts = None

    def __init__(self, folder: Path, capacity: int) -> None:
        self._prefix, self._numbers = folder.name, itertools.count()
        self._segments: dict[Any, SharedMemory] = {}

    def put(self, x: np.ndarray) -> Any:
        """Create a segment and copy."""
        segment = SharedMemory(f"{self._prefix}-{next(self._numbers)}", create=True, size=x.nbytes)
        np.copyto(np.ndarray(x.shape, x.dtype, segment.buf), x)
        name = (segment.name, x.size)
        self._segments[name] = segment
        return name

    def delete(self, name: Any) -> None:
        """Remove the segment."""
        segment = self._segments.pop(name)
        segment.close()
        segment.unlink()

    def close(self) -> None:
        """Do nothing: all segments are gone."""


class Reader:
    """Attaches by name."""

    def __init__(self, whereabouts: None) -> None:
        self._segment: SharedMemory | None = None

    def attach(self, name: Any) -> np.ndarray:
        """Map the segment."""
        self._segment = SharedMemory(name[0])
        return np.ndarray(name[1], np.float64, self._segment.buf)

    def detach(self) -> None:
        """Unmap the segment."""
        assert self._segment is not None
        self._segment.close()
