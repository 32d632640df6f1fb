"""Values that contain their number, tasks that make, pass on, change and check them, and notes of the results.

A value is an array of bytes: its number, random bytes that follow from the number, and a checksum. Notes are lines of
one file to which all processes append, so that the notes of a killed process are not lost.
"""

from __future__ import annotations

import json
import os
import signal
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = "CHAOS_FOLDER"
"""The environment variable that names the folder of a run. It also marks the processes of the run."""
ROWS = 4
_NUMBER, _CHECKSUM = 8, 4
_SIZES = (64 << 10, 768 << 10)
LARGE = 9 << 20
"""A size from which published values have a second holder."""
_CHILD_LIFETIME_S = 0.7


def note(what: str, **fields: Any) -> None:
    """Append a line to the notes with a single write."""
    line = json.dumps({"what": what, "pid": os.getpid(), "at": round(time.time(), 3), **fields}) + "\n"
    descriptor = os.open(
        Path(os.environ[FOLDER], "notes"), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
    )
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------ values


def value(number: int, size: int = 0) -> np.ndarray:
    """Return the value of a number: always the same bytes, so that a task that runs again makes the same value."""
    random = np.random.default_rng(number)
    size = size or int(random.integers(*_SIZES))
    return stamp(random.integers(0, 256, size=_NUMBER + size + _CHECKSUM, dtype=np.uint8), number)


def stamp(array: np.ndarray, number: int) -> np.ndarray:
    """Write another number, and the checksum that goes with it, into an array."""
    array[:_NUMBER] = np.frombuffer(number.to_bytes(_NUMBER, "little"), dtype=np.uint8)
    checksum = zlib.crc32(array[:-_CHECKSUM].data)
    array[-_CHECKSUM:] = np.frombuffer(checksum.to_bytes(_CHECKSUM, "little"), dtype=np.uint8)
    return array


def is_right(array: Any, number: int, where: str) -> bool:
    """Return whether an array is the undamaged value of a number; if it is not, note that at once."""
    found = int.from_bytes(bytes(array[:_NUMBER]), "little")
    is_whole = zlib.crc32(array[:-_CHECKSUM].data) == int.from_bytes(bytes(array[-_CHECKSUM:]), "little")
    if found != number or not is_whole:
        note("wrong", where=where, wanted=number, found=found, whole=is_whole, type=type(array).__name__)
    return found == number and is_whole


def is_shared(array: np.ndarray) -> bool:
    """Return whether an array lies in shared memory. Without the plugin, no array does."""
    try:
        from dask_shm_plugin import is_shared
    except ImportError:
        return False
    return is_shared(array)


# ------------------------------------------------------------------------------------------------------------- tasks


def make(number: int, size: int = 0) -> np.ndarray:
    """Make a value."""
    note("made", number=number)
    return value(number, size)


def make_rows(number: int) -> np.ndarray:
    """Make some values of one size, as the rows of one array."""
    note("made", number=number)
    return np.stack([value(number + row, 128 << 10) for row in range(ROWS)])


def row_of(rows: np.ndarray, row: int) -> np.ndarray:
    """Return a view of one row."""
    return rows[row]


def make_nested(number: int) -> dict[str, Any]:
    """Make two values in one object."""
    note("made", number=number)
    return {"first": value(number), "more": [value(number + 1), number]}


def check_nested(nested: dict[str, Any], number: int) -> tuple[int, int]:
    """Check the result of :func:`make_nested`."""
    arrays = [nested["first"], nested["more"][0]]
    right = [is_right(array, number + n, "nested") for n, array in enumerate(arrays)]
    return sum(right), sum(map(is_shared, arrays))


def check(array: np.ndarray, number: int) -> tuple[int, int]:
    """Check a value; return 1 or 0 for whether it is right, and for whether it lies in shared memory."""
    return int(is_right(array, number, "worker")), int(is_shared(array))


def rewrite(array: np.ndarray, number: int) -> np.ndarray:
    """Change a value in place and return it."""
    return stamp(array if array.flags.writeable else array.copy(), number)


def check_in_child(array: np.ndarray, number: int) -> tuple[int, int]:
    """Check a value, first in a forked child: for some time, even if this process is killed meanwhile."""
    child = os.fork()
    if child == 0:
        try:
            until = time.monotonic() + _CHILD_LIFETIME_S
            while is_right(array, number, "forked child") and time.monotonic() < until:
                time.sleep(0.05)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return check(array, number)


def die_once(marker: str) -> None:
    """End this process abruptly, but only the first time that the task runs."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.write(os.open(marker, os.O_WRONLY), str(os.getpid()).encode())
    os._exit(1)


def print_stacks_on_signal() -> None:
    """Let SIGUSR1 print the stacks of all threads."""
    import faulthandler

    faulthandler.register(signal.SIGUSR1, all_threads=True)


def dask_setup(server: Any) -> None:
    """Prepare a process that was started with ``--preload tasks``."""
    print_stacks_on_signal()
