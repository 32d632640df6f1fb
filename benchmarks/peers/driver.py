"""One start of one peer, in the peer's own environment; run by ``__main__``.

Takes the peer's module, "times" or "memory", a folder, a folder in shared memory, the file for the result, the number of
warm rounds, and sizes.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import machine
import numpy as np
from readers import Process

READERS = 4
# LMDB frees nothing that a transaction can use before the next but one, and a store wants room for its own.
SPARE = 4


def reader_of(store: Any, module: str) -> Any:
    """Start a process that reads: the peer's own way, if it has one."""
    return store.reader() if hasattr(store, "reader") else Process(module, store.whereabouts)


def copy(target: np.ndarray, source: np.ndarray) -> float:
    """Return the seconds of a copy into memory that exists."""
    start = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - start


def one_round(store: Any, reader: Any, x: np.ndarray, target: np.ndarray, number: int) -> dict[str, float]:
    """Put, attach, read, detach and delete a value, beside a copy of it; who goes first alternates."""
    x[0] = number
    memcpy = copy(target, x) if number % 2 else 0.0
    start = time.perf_counter()
    name = store.put(x)
    put = time.perf_counter() - start
    memcpy = memcpy or copy(target, x)
    is_whole = number == 0
    answer = reader.attach(name, is_whole)
    if answer.total != machine.read_pages(x) or (is_whole and answer.checksum != zlib.crc32(x)):
        raise AssertionError("the reader got a wrong value")
    start = time.perf_counter()
    machine.read_pages(x)
    own_read = time.perf_counter() - start
    reader.detach()
    store.delete(name)
    return {"memcpy": memcpy, "put": put, "attach": answer.attach, "read": answer.read, "own_read": own_read}


def times(store: Any, module: str, rounds: int, sizes: list[int]) -> dict[str, Any]:
    """Run some rounds at every size; the first of each goes into pages that this size has not used before."""
    reader, result = reader_of(store, module), {}
    for size in sizes:
        x = np.random.default_rng(size).random(size // 8)
        target = np.full_like(x, 1.0)
        result[str(size)] = [one_round(store, reader, x, target, number) for number in range(rounds + 1)]
    reader.close()
    return result


def memory(store: Any, module: str, size: int, shared: int) -> dict[str, int]:
    """Return what shared and private memory grow by when one value is put, and attached and read by some readers."""
    readers = [reader_of(store, module) for _ in range(READERS)]
    x = np.random.default_rng(size).random(size // 8)
    before = machine.private(machine.family(os.getpid()))
    name = store.put(x)
    for reader in readers:
        assert reader.attach(name, False).total == machine.read_pages(x), "wrong values"
    figures = {
        "size": size,
        "readers": READERS,
        "shared": machine.shared() - shared,
        "private": machine.private(machine.family(os.getpid())) - before,
    }
    for reader in readers:
        reader.detach()
    store.delete(name)
    for reader in readers:
        reader.close()
    return figures


def main() -> None:
    """Measure one start."""
    module, mode, folder, shm, output, rounds = sys.argv[1:7]
    sizes = [int(size) for size in sys.argv[7:]]
    shared = machine.shared()
    # What lies in files lies in shared memory; sockets and logs do not.
    in_files = module in ("joblib_files", "lmdb_file")
    store = importlib.import_module(module).Store(Path(shm if in_files else folder), SPARE * max(sizes) + (128 << 20))
    try:
        result = (
            times(store, module, int(rounds), sizes) if mode == "times" else memory(store, module, max(sizes), shared)
        )
    finally:
        store.close()
    Path(output).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
