"""A process's memory by kind, and what it shares that is none of ours."""

from __future__ import annotations

import mmap
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
import pytest
from other_processes import publish

from dask_shm_plugin import footprint
from dask_shm_plugin.arena import Arena

MIB = 1 << 20


def test_private_memory_is_anonymous() -> None:
    """What is allocated and touched is counted at once."""
    before = footprint.read()
    kept = np.ones(4 * MIB)
    assert footprint.read().anonymous - before.anonymous > 30 * MIB
    del kept


def test_a_process_that_is_gone_is_an_error() -> None:
    """And none of zero bytes."""
    with pytest.raises(OSError, match="No such"):
        footprint.read(1 << 30)


def test_blocks_of_the_arena_are_not_among_the_rest(arena: Arena) -> None:
    """However much of them was read."""
    before = footprint.other_shared()
    with publish(arena, bytes(MIB // 2)) as block:
        view = block.view(0, MIB // 2)
        assert sum(view[::4096]) == 0
        assert footprint.other_shared() == before
        del view


@pytest.mark.parametrize("kind", ["SharedMemory", "anonymous", "file"])
def test_what_a_user_shares_is_found(kind: str) -> None:
    """Memory of multiprocessing, of a shared mapping, of a file on a tmpfs."""
    before, size = footprint.other_shared(), 8 * MIB
    if kind == "SharedMemory":
        memory = shared_memory.SharedMemory(create=True, size=size)
        memory.buf[:] = b"x" * size
    elif kind == "anonymous":
        memory = mmap.mmap(-1, size)
        memory[:] = b"x" * size
    else:
        path = Path("/dev/shm/of a user of dask-shm-plugin")
        path.write_bytes(b"x" * size)
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), size)
        path.unlink()
        assert memory[::4096].count(b"x") == size // 4096
    assert abs(footprint.other_shared() - before - size) < MIB
    memory.close()
    if kind == "SharedMemory":
        memory.unlink()
    assert abs(footprint.other_shared() - before) < MIB
