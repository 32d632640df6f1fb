"""The private names of ``distributed.shuffle`` are unchanged, and a change leaves shuffles, and only these, to Dask."""

from __future__ import annotations

import logging
import sys

import dask.array as da
import numpy as np
import pytest
from distributed import Client, LocalCluster

from dask_shm_plugin import SharedMemoryPlugin, notices, stats
from dask_shm_plugin.seams import shuffle
from dask_shm_plugin.seams.checks import Seam
from dask_shm_plugin.shuffling import switch


@pytest.fixture(autouse=True)
def fresh_check():
    """Clear the result of the check, and the warnings, before and after each test."""
    shuffle.why_not.cache_clear()
    notices.warn_once.cache_clear()
    yield
    shuffle.why_not.cache_clear()


@pytest.mark.parametrize("seam", shuffle.SEAMS, ids=lambda seam: seam.name)
def test_each_seam_is_in_its_place(seam):
    """A failure means that a version of distributed has moved this seam: ``seams.shuffle`` must follow."""
    assert seam.holds()


def test_a_moved_seam_leaves_shuffles_to_dask_with_one_warning(monkeypatch, caplog):
    """Values are shared as before."""
    monkeypatch.setattr(shuffle, "SEAMS", (Seam("ShuffleRun.gone", "for the test", lambda: False),))
    with (
        caplog.at_level(logging.WARNING, logger="dask_shm_plugin"),
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(SharedMemoryPlugin(capacity="64 MiB"))
        x = da.from_array(np.arange(256.0).reshape(16, 16), (4, 16)).rechunk((16, 4), method="p2p")
        np.testing.assert_array_equal(x.compute(), np.arange(256.0).reshape(16, 16))
        assert [arena["shuffled"]["count"] for arena in stats(client).values()] == [0]
    messages = [record.message for record in caplog.records if "ShuffleRun.gone" in record.message]
    assert len(messages) == 1
    assert "Shuffles and rechunks are not shared" in messages[0]


def test_a_module_that_is_gone_counts_as_moved(monkeypatch, caplog):
    """The names are imported where they are first needed, so that nothing else fails."""
    monkeypatch.setitem(sys.modules, "dask_shm_plugin.shuffling.shuffles", None)
    with caplog.at_level(logging.WARNING, logger="dask_shm_plugin"):
        assert switch.switch_on(None, None) is None
    assert "moved" in caplog.text
