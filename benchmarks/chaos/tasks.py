"""Values that say what they are, the tasks that make, pass on, change and check them, and notes of what was seen.

A value is bytes: its number in front, random contents that follow from the number, a checksum behind. Notes are lines
of one file to which all processes append, so that a process that is killed has said what it saw before.
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
"""The environment variable that names the folder of a run; by it, its processes are known."""
ROWS = 4
_NUMBER, _CHECKSUM = 8, 4
_SIZES = (64 << 10, 768 << 10)
_FORKED_LIVES = 0.7


def note(what: str, **fields: Any) -> None:
    """Append a line to the notes, in one piece."""
    line = json.dumps({"what": what, "pid": os.getpid(), **fields}) + "\n"
    descriptor = os.open(
        Path(os.environ[FOLDER], "notes"), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
    )
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------ values


def value(number: int, size: int = 0) -> np.ndarray:
    """Return the value of a number: always the same bytes, so that a task that runs again makes it again."""
    random = np.random.default_rng(number)
    size = size or int(random.integers(*_SIZES))
    return stamp(random.integers(0, 256, size=_NUMBER + size + _CHECKSUM, dtype=np.uint8), number)


def stamp(array: np.ndarray, number: int) -> np.ndarray:
    """Give an array another number, in place, and the checksum that goes with it."""
    array[:_NUMBER] = np.frombuffer(number.to_bytes(_NUMBER, "little"), dtype=np.uint8)
    checksum = zlib.crc32(array[:-_CHECKSUM].data)
    array[-_CHECKSUM:] = np.frombuffer(checksum.to_bytes(_CHECKSUM, "little"), dtype=np.uint8)
    return array


def is_right(array: Any, number: int, where: str) -> bool:
    """Tell whether this is the value of a number, unharmed; note it at once if it is not."""
    found = int.from_bytes(bytes(array[:_NUMBER]), "little")
    is_whole = zlib.crc32(array[:-_CHECKSUM].data) == int.from_bytes(bytes(array[-_CHECKSUM:]), "little")
    if found != number or not is_whole:
        note("wrong", where=where, wanted=number, found=found, whole=is_whole, type=type(array).__name__)
    return found == number and is_whole


def is_shared(array: np.ndarray) -> bool:
    """Tell whether an array lies in shared memory; without the plugin, none does."""
    try:
        from dask_shm_plugin import is_shared
    except ImportError:
        return False
    return is_shared(array)


# ------------------------------------------------------------------------------------------------------------- tasks


def make(number: int) -> np.ndarray:
    """Make a value."""
    note("made", number=number)
    return value(number)


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
    """Check what :func:`make_nested` made."""
    arrays = [nested["first"], nested["more"][0]]
    right = [is_right(array, number + n, "nested") for n, array in enumerate(arrays)]
    return sum(right), sum(map(is_shared, arrays))


def check(array: np.ndarray, number: int) -> tuple[int, int]:
    """Check a value; return how many were right, and how many of them lie in shared memory."""
    return int(is_right(array, number, "worker")), int(is_shared(array))


def rewrite(array: np.ndarray, number: int) -> np.ndarray:
    """Change a value in place and return it."""
    return stamp(array if array.flags.writeable else array.copy(), number)


def check_in_child(array: np.ndarray, number: int) -> tuple[int, int]:
    """Let a forked child look at inherited memory for some time, even if this process is killed meanwhile."""
    child = os.fork()
    if child == 0:
        try:
            until = time.monotonic() + _FORKED_LIVES
            while is_right(array, number, "forked child") and time.monotonic() < until:
                time.sleep(0.05)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return check(array, number)


def die_once(marker: str) -> None:
    """End this process without a word, the first time."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.write(os.open(marker, os.O_WRONLY), str(os.getpid()).encode())
    os._exit(1)


def stacks_on_signal() -> None:
    """Let SIGUSR1 print the stacks of all threads."""
    import faulthandler

    faulthandler.register(signal.SIGUSR1, all_threads=True)


def dask_setup(server: Any) -> None:
    """Prepare whatever was started with ``--preload tasks``."""
    stacks_on_signal()
