"""Stores whose values other processes attach by name."""

# ruff: noqa: D102  (the methods are described in Store)

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np

FOR_GOOD = 1e12
"""Seconds for which an arena keeps freed pages."""


class Store:
    """A peer: in one process it holds values, in others it reads them. Each has an environment with its package."""

    package = ""
    in_files = False
    """Whether values are files in the folder, which is then in shared memory."""

    def __init__(self) -> None:
        self.module = importlib.import_module(self.package)
        self.numbers = itertools.count()

    def start(self, folder: Path, capacity: int) -> Any:
        """Begin to hold values, and return the argument of :meth:`join`."""
        self.folder = folder

    def put(self, x: np.ndarray) -> Any:
        """Copy an array into the store, and return the name by which it can be attached."""
        raise NotImplementedError

    def delete(self, name: Any) -> None:
        """Delete a value, and return when its memory can be used again."""
        raise NotImplementedError

    def stop(self) -> None:
        """End the store, of which all values have been deleted."""

    def join(self, whereabouts: Any) -> None:
        """Begin to read, in another process."""

    def attach(self, name: Any) -> np.ndarray:
        """Return a value without a copy."""
        raise NotImplementedError

    def detach(self) -> None:
        """Release a value whose array is gone."""


class Arena(Store):
    """The arena of this package, without Dask, which keeps all freed pages warm."""

    package = "dask_shm_plugin.arena.arena"

    def start(self, folder: Path, capacity: int) -> Any:
        self.arena, self.blocks = self.module.Arena.create(capacity, warm=FOR_GOOD), {}
        return self.arena.segment.whereabouts, self.arena.arena_id, FOR_GOOD

    def put(self, x: np.ndarray) -> Any:
        with self.arena.draft(x.nbytes) as draft:
            draft.write(0, memoryview(x))
            block = draft.seal()
        name = (block.descriptor, x.nbytes)
        self.blocks[name] = block
        return name

    def delete(self, name: Any) -> None:
        self.blocks.pop(name).close()
        self.arena.holdings.tidy()

    def stop(self) -> None:
        self.arena.close()

    def join(self, whereabouts: Any) -> None:
        self.arena = self.module.Arena.attach(*whereabouts)

    def attach(self, name: Any) -> np.ndarray:
        descriptor, size = name
        return np.frombuffer(self.arena.view(descriptor, 0, size), dtype=np.float64)

    def detach(self) -> None:
        self.arena.holdings.tidy()


class Segments(Store):
    """``multiprocessing.shared_memory``: a named segment for each value; a killed store is known by its folder's name."""

    package = "multiprocessing.shared_memory"

    def start(self, folder: Path, capacity: int) -> None:
        self.prefix, self.segments = folder.name, {}

    def put(self, x: np.ndarray) -> Any:
        segment = SharedMemory(f"{self.prefix}-{next(self.numbers)}", create=True, size=x.nbytes)
        np.copyto(np.ndarray(x.shape, x.dtype, segment.buf), x)
        name = (segment.name, x.size)
        self.segments[name] = segment
        return name

    def delete(self, name: Any) -> None:
        segment = self.segments.pop(name)
        segment.close()
        segment.unlink()

    def attach(self, name: Any) -> np.ndarray:
        self.segment = SharedMemory(name[0])
        return np.ndarray(name[1], np.float64, self.segment.buf)

    def detach(self) -> None:
        self.segment.close()


class Joblib(Store):
    """joblib's memory mapping: a file in /dev/shm for each value."""

    package = "joblib"
    in_files = True

    def put(self, x: np.ndarray) -> str:
        path = str(self.folder / f"{next(self.numbers)}.pkl")
        self.module.dump(x, path)
        return path

    def delete(self, name: str) -> None:
        Path(name).unlink()

    def attach(self, name: str) -> np.ndarray:
        return self.module.load(name, mmap_mode="r")


class Lmdb(Store):
    """A database in /dev/shm that is written through its mapping and never synchronised."""

    package = "lmdb"
    in_files = True

    def start(self, folder: Path, capacity: int) -> Any:
        path, options = str(folder / "data"), {"sync": False, "metasync": False, "map_async": True}
        self.environment = self.module.open(path, map_size=capacity, writemap=True, **options)
        return path, capacity

    def put(self, x: np.ndarray) -> bytes:
        name = b"%d" % next(self.numbers)
        with self.environment.begin(write=True, buffers=True) as transaction:
            transaction.put(name, memoryview(x).cast("B"))
        return name

    def delete(self, name: bytes) -> None:
        with self.environment.begin(write=True) as transaction:
            transaction.delete(name)
        # Pages are free for the next transaction but one.
        with self.environment.begin(write=True) as transaction:
            transaction.put(b"-", name)

    def stop(self) -> None:
        self.environment.close()

    def join(self, whereabouts: Any) -> None:
        path, size = whereabouts
        self.environment = self.module.open(path, map_size=size, readonly=True)

    def attach(self, name: bytes) -> np.ndarray:
        self.transaction = self.environment.begin(buffers=True)
        return np.frombuffer(self.transaction.get(name), dtype=np.float64)

    def detach(self) -> None:
        self.transaction.abort()


class Server(Store):
    """A store with a server process."""

    def serve(self, folder: Path, *command: str | Path | int) -> None:
        """Start the server."""
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(list(map(str, command)), cwd=folder, **quiet)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


class Plasma(Server):
    """Arrow Plasma, whose last release was pyarrow 11; its server copies in threads of its own."""

    package = "pyarrow.plasma"

    def start(self, folder: Path, capacity: int) -> str:
        import pyarrow

        socket = str(folder / "socket")
        self.serve(folder, Path(sys.executable).parent / "plasma_store", "-m", capacity, "-s", socket)
        self.client, self.buffer = self.module.connect(socket, num_retries=100), pyarrow.py_buffer
        return socket

    def put(self, x: np.ndarray) -> Any:
        return self.client.put_raw_buffer(self.buffer(x)).binary()

    def delete(self, name: Any) -> None:
        self.client.delete([self.module.ObjectID(name)])

    def join(self, whereabouts: str) -> None:
        self.client = self.module.connect(whereabouts)

    def attach(self, name: Any) -> np.ndarray:
        [buffer] = self.client.get_buffers([self.module.ObjectID(name)])
        return np.frombuffer(buffer, dtype=np.float64)


class Vineyard(Server):
    """Blobs of a local server without remote access."""

    package = "vineyard"

    def start(self, folder: Path, capacity: int) -> str:
        socket, server = str(folder / "socket"), Path(self.module.__file__).parent / "bdist" / "vineyardd"
        self.serve(folder, server, "--socket", socket, "--size", capacity, "--meta", "local", "--norpc")
        deadline = time.monotonic() + 30
        while not hasattr(self, "client"):
            try:
                self.join(socket)
            except Exception:  # of several types, until the server listens
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        return socket

    def put(self, x: np.ndarray) -> Any:
        writer = self.client.create_blob(x.nbytes)
        np.copyto(np.frombuffer(memoryview(writer), dtype=x.dtype), x)
        return repr(writer.seal(self.client).id)

    def delete(self, name: Any) -> None:
        self.client.delete(self.module.ObjectID(name))

    def join(self, whereabouts: str) -> None:
        self.client = self.module.connect(whereabouts)

    def attach(self, name: Any) -> np.ndarray:
        return np.frombuffer(memoryview(self.client.get_blob(self.module.ObjectID(name))), dtype=np.float64)
