"""A process that rejoins an arena is the same member as before as long as it has views of it."""

from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np
import pytest

from dask_shm_plugin.node import membership

KEEPER = """
import sys
from dask_shm_plugin.node import membership, rendezvous
rendezvous.NAME_PREFIX = sys.argv[1]
assert membership.join("test", "nanny", "there") is not None
print("here", flush=True)
sys.stdin.read()
membership.leave("test", "nanny", "there")
"""


@pytest.fixture
def arena(prefix):
    """Join an arena that another process keeps alive, too."""
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


def test_a_process_that_rejoins_while_its_views_live_is_the_same_member(arena):
    """Two memberships would not exclude each other from the table: record locks belong to the process."""
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


def test_a_process_that_rejoins_after_its_last_view_is_gone_is_a_new_member(arena):
    """The first descriptor is closed before the second is opened: closing it later would drop the new locks."""
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
