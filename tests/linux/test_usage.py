"""The memory of a process by kind, and its shared memory that belongs to no arena."""

from __future__ import annotations

import mmap
import os
from multiprocessing import shared_memory
from pathlib import Path

import pytest
from other_processes import publish

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.linux import usage

MIB = 1 << 20


def test_private_memory_counts_as_anonymous() -> None:
    """It is counted as soon as it is written; a mapping of its own, since an allocator may reuse resident memory."""
    before, size = usage.read(), 32 * MIB
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = b"x" * size
        assert usage.read().anonymous - before.anonymous > 30 * MIB


def test_reading_the_memory_of_a_dead_process_raises() -> None:
    """A result of zero bytes would be wrong."""
    with pytest.raises(OSError, match="No such"):
        usage.read(1 << 30)


def test_blocks_of_the_arena_do_not_count_as_other_shared_memory() -> None:
    """They do not count however much of them this process has read."""
    before, arena = usage.other_shared(), Arena.create(16 * MIB)
    with publish(arena, bytes(8 * MIB)) as block:
        view = block.view(0, 8 * MIB)
        assert sum(view[::4096]) == 0
        assert usage.read().shared >= 8 * MIB
        assert usage.other_shared() == before
        del view
    arena.close()


@pytest.mark.parametrize("kind", ["SharedMemory", "anonymous", "file"])
def test_the_users_own_shared_memory_is_counted(kind: str) -> None:
    """It may be ``multiprocessing.SharedMemory``, an anonymous shared mapping, or a mapped file on a tmpfs."""
    before, size = usage.other_shared(), 8 * MIB
    if kind == "SharedMemory":
        memory = shared_memory.SharedMemory(create=True, size=size)
        memory.buf[:] = b"x" * size
    elif kind == "anonymous":
        memory = mmap.mmap(-1, size)
        memory[:] = b"x" * size
    else:
        # Another run of this test must not truncate the file while it is mapped here.
        path = Path(f"/dev/shm/of a user of dask-shm-plugin, {os.getpid()}")
        path.write_bytes(b"x" * size)
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), size)
        path.unlink()
        assert memory[::4096].count(b"x") == size // 4096
    assert abs(usage.other_shared() - before - size) < MIB
    memory.close()
    if kind == "SharedMemory":
        memory.unlink()
    assert abs(usage.other_shared() - before) < MIB
