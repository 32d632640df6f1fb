"""vineyard: blobs of a local server without remote access."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import vineyard


class Store:
    """The server's process and a client of it."""

    def __init__(self, folder: Path, capacity: int) -> None:
        self.whereabouts = str(folder / "socket")
        server = Path(vineyard.__file__).parent / "bdist" / "vineyardd"
        options = ["--socket", self.whereabouts, "--size", str(capacity), "--meta", "local", "--norpc"]
        self._process = subprocess.Popen(
            [str(server), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder
        )
        self._client = self._connect()

    def _connect(self) -> Any:
        deadline = time.monotonic() + 30
        while True:
            try:
                return vineyard.connect(self.whereabouts)
            except Exception:  # of several types, until the server listens
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def put(self, x: np.ndarray) -> Any:
        """Create a blob, copy, seal."""
        writer = self._client.create_blob(x.nbytes)
        np.copyto(np.frombuffer(memoryview(writer), dtype=x.dtype), x)
        return repr(writer.seal(self._client).id)

    def delete(self, name: Any) -> None:
        """Delete the blob."""
        self._client.delete(vineyard.ObjectID(name))

    def close(self) -> None:
        """End the server."""
        self._process.terminate()
        self._process.wait()


class Reader:
    """A client of the server."""

    def __init__(self, whereabouts: str) -> None:
        self._client = vineyard.connect(whereabouts)

    def attach(self, name: Any) -> np.ndarray:
        """Map the blob."""
        return np.frombuffer(memoryview(self._client.get_blob(vineyard.ObjectID(name))), dtype=np.float64)

    def detach(self) -> None:
        """Do nothing: the buffer went with the array."""
