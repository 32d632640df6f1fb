"""One start of one peer, in the peer's own environment; run by ``__main__``.

Takes the peer's class, "times" or "memory", a folder, a folder in shared memory, the file for the result, the number of
warm rounds, and sizes.
"""

from __future__ import annotations

import contextlib
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
from readers import reader

READERS = 4
# LMDB frees nothing that a transaction can use before the next but one, and a store wants room for its own.
SPARE = 4


def copy(target: np.ndarray, source: np.ndarray) -> float:
    """Return the time of a copy into memory whose pages exist."""
    start = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - start


def one_round(store: Any, other: Any, x: np.ndarray, target: np.ndarray, number: int) -> dict[str, float]:
    """Put, attach, read, detach and delete a value, beside a copy of it; the one that comes first alternates."""
    x[0] = number
    memcpy = copy(target, x) if number % 2 else 0.0
    start = time.perf_counter()
    name = store.put(x)
    put = time.perf_counter() - start
    memcpy = memcpy or copy(target, x)
    is_whole = number == 0
    answer = other.attach(name, is_whole)
    if answer.total != machine.read_pages(x) or (is_whole and answer.checksum != zlib.crc32(x)):
        raise AssertionError("the reader got a wrong value")
    other.detach()
    store.delete(name)
    return {"memcpy": memcpy, "put": put, "attach": answer.attach, "read": answer.read}


def times(store: Any, whereabouts: Any, rounds: int, sizes: list[int]) -> dict[str, Any]:
    """Run some rounds at every size; the first of each goes into pages that this size has not used before."""
    result = {}
    with reader(store, whereabouts) as other:
        for size in sizes:
            x = machine.make(size, size)
            target = np.full_like(x, 1.0)
            result[str(size)] = [one_round(store, other, x, target, number) for number in range(rounds + 1)]
    return result


def memory(store: Any, whereabouts: Any, size: int, shared: int) -> dict[str, int]:
    """Return the growth of shared and private memory when one value is put, and attached and read by some readers."""
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(reader(store, whereabouts)) for _ in range(READERS)]
        x = machine.make(size, size)
        before = machine.private(machine.family(os.getpid()))
        name = store.put(x)
        for other in readers:
            assert other.attach(name, False).total == machine.read_pages(x), "wrong values"
        private = machine.private(machine.family(os.getpid())) - before
        figures = {"shared": machine.shared() - shared, "private": private}
        for other in readers:
            other.detach()
        store.delete(name)
    return figures


def main() -> None:
    """Measure one start."""
    kind, mode, folder, shm, output, rounds = sys.argv[1:7]
    sizes = [int(size) for size in sys.argv[7:]]
    shared = machine.shared()
    module, _, name = kind.partition(".")
    store = getattr(importlib.import_module(module), name)()
    # Values in files are in shared memory; sockets and logs are not.
    place = Path(shm if getattr(store, "in_files", False) else folder)
    whereabouts = store.start(place, SPARE * max(sizes) + (128 << 20))
    try:
        if mode == "times":
            result = times(store, whereabouts, int(rounds), sizes)
        else:
            result = memory(store, whereabouts, max(sizes), shared)
    finally:
        store.stop()
    Path(output).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
