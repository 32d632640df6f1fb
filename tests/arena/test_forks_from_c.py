"""A child that C code forks, without Python's hooks, takes nothing from its parent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from other_processes import JOIN

#: A program that forks in C; the child checks the arena when it is told to, and ends in one of three ways.
FORK = """
import ctypes, gc, os, sys
from other_processes import publish
from dask_shm_plugin.linux import segment
from dask_shm_plugin.node import membership, rendezvous
from dask_shm_plugin.exceptions import ArenaUnavailable

segment.NAME_PREFIX = rendezvous.NAME_PREFIX = sys.argv[1]
cluster, how = sys.argv[2:]
{join}
with publish(arena, bytes([7]) * 8192) as block:
    view = block.view(0, 8192)
    read, write = os.pipe()
    if (child := ctypes.PyDLL(None).fork()) == 0:
        os.read(read, 1)
        assert bytes(view) == bytes([7]) * 8192
        for what in (lambda: arena.draft(1), lambda: arena.view(block.descriptor, 0, 1), arena.validate):
            try:
                what()
            except ArenaUnavailable:
                continue
            os._exit(1)
        view[:] = bytes(8192)
        if how == "killed":
            os.kill(os.getpid(), 9)
        if how == "at once":
            os._exit(0)
        membership.leave(cluster, "worker", f"tcp://{os.getppid()}")
        del view
        gc.collect()
        sys.exit(0)
    publish(arena, bytes([8]) * 8192).close()
    os.write(write, b"x")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (-9 if how == "killed" else 0), status
    assert bytes(view) == bytes([7]) * 8192
    publish(arena, bytes([9]) * 8192).close()
    arena.validate()
    arena.inspect()
    assert arena.stats().members == 1
    assert membership._by_cluster[cluster].meeting.can_be_found
    print("all is well")
"""


@pytest.mark.parametrize("how", ["killed", "at once", "as a program does"])
def test_a_child_forked_in_c_leaves_its_parent_alone(how: str, prefix: str) -> None:
    """The child can read its views and is refused all else; however it ends, its parent stays a member."""
    done = subprocess.run(
        [sys.executable, "-c", FORK.replace("{join}", JOIN), prefix, "forked in c", how],
        cwd=Path(__file__).parents[1] / "support",
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.stdout == "all is well\n"
