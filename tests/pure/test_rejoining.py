"""A process that comes back to an arena is the member that it was, as long as views of it still look into it."""

from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np
import pytest

from dask_shm_plugin import membership

KEEPER = """
import sys
from dask_shm_plugin import membership, rendezvous
rendezvous.NAME_PREFIX = sys.argv[1]
assert membership.join("test", "nanny", "there") is not None
print("here", flush=True)
sys.stdin.read()
membership.leave("test", "nanny", "there")
"""


@pytest.fixture
def arena(prefix):
    """An arena that another process keeps alive, too."""
    arena = membership.join("test", "worker", "here", capacity=lambda: 1 << 24)
    keeper = subprocess.Popen([sys.executable, "-c", KEEPER, prefix], stdin=-1, stdout=-1, text=True)
    assert keeper.stdout.readline() == "here\n"
    yield arena
    gc.collect()
    membership.leave("test", "worker", "here")
    keeper.communicate()
    assert keeper.returncode == 0


def share(arena, value):
    """Publish an array and return a view of the shared copy."""
    with arena.draft(value.nbytes) as draft:
        draft.write(0, memoryview(value).cast("B"))
        with draft.seal() as block:
            return np.frombuffer(block.view(0, value.nbytes), dtype=value.dtype)


def test_who_comes_back_while_views_live_is_the_same_member(arena):
    """Two memberships of one process would not keep each other from the table: their locks are one."""
    view = share(arena, np.arange(10_000))
    membership.leave("test", "worker", "here")
    assert not arena.has_left
    again = membership.join("test", "worker", "here")
    assert again is arena
    other = share(again, np.arange(10_000) + 1)
    assert again.stats().members == 2
    assert view[1] == 1
    assert other[1] == 2
    again.validate()


def test_who_comes_back_after_the_last_view_has_gone_is_a_new_member(arena):
    """The descriptor of the first time is closed before the second one is opened, or its locks would fall."""
    view = share(arena, np.arange(10_000))
    membership.leave("test", "worker", "here")
    del view
    gc.collect()
    arena.holdings.tidy()
    arena.finish_leaving()
    assert arena.has_left
    again = membership.join("test", "worker", "here")
    assert again is not arena
    assert again.arena_id == arena.arena_id
    assert again.stats().members == 2
    again.validate()
