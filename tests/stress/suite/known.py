"""Tests of `distributed` that may fail with the plugin, each with its reason.

Keys are patterns with the wildcards `*` and `?`; square brackets stand for themselves.
"""

from __future__ import annotations

_NOT_ASKED = "a value that is listed in the arena is found there, and its owner is not asked: "

_NOT_WRITTEN = "received shards are kept in memory, not in files: "

MAY_DIFFER: dict[str, str] = {
    "distributed/tests/test_worker.py::test_prefer_gather_from_local_address": (
        _NOT_ASKED + "the test looks for the transfer in the log of requests"
    ),
    "distributed/tests/test_worker.py::test_gather_dep_from_remote_workers_if_all_local_workers_are_busy": (
        _NOT_ASKED + "the test counts the workers that were asked and were too busy to answer"
    ),
    "distributed/tests/test_worker.py::test_get_data_cancelled_error": (
        _NOT_ASKED
        + "the test counts connections; the first answer was lost but has listed the value, so no second one is needed"
    ),
    "distributed/tests/test_utils_comm.py::test_gather_from_workers_busy": (
        _NOT_ASKED + "the test counts the requests; a worker that was told to ask again finds the value meanwhile"
    ),
    "distributed/tests/test_cancelled_state.py::test_worker_stream_died_during_comm": (
        _NOT_ASKED + "the test waits for the request, and closes the owner at that moment"
    ),
    "distributed/shuffle/tests/test_shuffle.py::test_meaningful_out_of_disk_error": (
        _NOT_WRITTEN + "the test lets every write to a file fail, and there is none"
    ),
    "distributed/shuffle/tests/test_shuffle.py::test_bad_disk": (
        _NOT_WRITTEN + "the test removes the folder of the files, and no file is written to it; "
        "with distributed.p2p.storage.buffer at one byte, it passes"
    ),
    "distributed/shuffle/tests/test_rechunk.py::test_rechunk_in_memory_shards_dont_share_buffer": (
        "the test looks for shards in Dask's buffer, and they are in their places in the outputs"
    ),
    "distributed/shuffle/tests/test_metrics.py::test_rechunk": _NOT_WRITTEN
    + "the test looks for the bytes read from disk",
    "distributed/shuffle/tests/test_metrics.py::test_dataframe": (
        _NOT_WRITTEN + "the test looks for the bytes read from disk"
    ),
    "distributed/tests/test_worker_memory.py::test_dict_data_if_no_spill_to_disk": (
        "the plugin wraps the data of a worker to notice reads, even without a spill buffer; the test expects a dict"
    ),
}
"""Tests that check behaviour which the plugin changes on purpose."""

BUGS: dict[str, str] = {
    "distributed/tests/test_utils_comm.py::test_gather_from_workers_serialization_error[unpickle]": (
        "when a value cannot be rebuilt, Dask's log record refers to a view of the arena, and keeps the block"
    ),
}
"""Known bugs. A fix must also remove the entry here: as long as it stays, a return of the bug is not noticed."""
