"""Tests of `distributed` that may fail with the plugin, each with its reason.

Patterns as of the shell (`*`, `?`); square brackets stand for themselves.
"""

from __future__ import annotations

_NOT_ASKED = "a value that is listed in the arena is found there, and its owner is not asked: "

MAY_DIFFER: dict[str, str] = {
    "distributed/tests/test_worker.py::test_prefer_gather_from_local_address": (
        _NOT_ASKED + "looks for the transfer in the log of who was asked"
    ),
    "distributed/tests/test_worker.py::test_gather_dep_from_remote_workers_if_all_local_workers_are_busy": (
        _NOT_ASKED + "counts the workers that were asked and were too busy to answer"
    ),
    "distributed/tests/test_worker.py::test_get_data_cancelled_error": (
        _NOT_ASKED
        + "counts connections; the first answer, which was lost, has listed the value, and no second one is needed"
    ),
    "distributed/tests/test_utils_comm.py::test_gather_from_workers_busy": (
        _NOT_ASKED + "counts the requests; who was told to come again finds the value meanwhile"
    ),
    "distributed/tests/test_cancelled_state.py::test_worker_stream_died_during_comm": (
        _NOT_ASKED + "waits for the request, as the moment at which the owner is closed"
    ),
    "distributed/tests/test_worker_memory.py::test_dict_data_if_no_spill_to_disk": (
        "the data of a worker tell who reads them, also where they are in no spill buffer: asks for the very type of a dict"
    ),
}
"""What the test looks at is what the plugin is meant to change."""

BUGS: dict[str, str] = {
    "distributed/tests/test_utils_comm.py::test_gather_from_workers_serialization_error[unpickle]": (
        "a value that cannot be rebuilt is logged by Dask with a view of the arena, which keeps it"
    ),
}
"""What is wrong, and known. Whoever mends it takes it out of here: until then nobody sees that it comes back."""
