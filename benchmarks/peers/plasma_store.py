"""Arrow Plasma, whose last release was pyarrow 11."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import plasma


class Store:
    """The store's process and a client of it."""

    def __init__(self, folder: Path, capacity: int) -> None:
        self.whereabouts = str(folder / "socket")
        command = [str(Path(sys.executable).parent / "plasma_store"), "-m", str(capacity), "-s", self.whereabouts]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self._client = plasma.connect(self.whereabouts, num_retries=100)

    def put(self, x: np.ndarray) -> Any:
        """Put the bytes with the store's own copying threads."""
        return self._client.put_raw_buffer(pyarrow.py_buffer(x)).binary()

    def delete(self, name: Any) -> None:
        """Delete the object."""
        self._client.delete([plasma.ObjectID(name)])

    def close(self) -> None:
        """End the store."""
        self._process.terminate()
        self._process.wait()


class Reader:
    """A client of the store."""

    def __init__(self, whereabouts: str) -> None:
        self._client = plasma.connect(whereabouts)

    def attach(self, name: Any) -> np.ndarray:
        """Map the object."""
        [buffer] = self._client.get_buffers([plasma.ObjectID(name)])
        return np.frombuffer(buffer, dtype=np.float64)

    def detach(self) -> None:
        """Do nothing: the buffer went with the array."""
