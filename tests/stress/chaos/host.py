"""A ``LocalCluster``: the scheduler, all nannies and a client in one process, as most users start.

    python host.py <scheduler file> <workers> <memory limit of a worker> <with or without the plugin: 1 or 0>

Ends when it reads "stop" from its standard input.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import tasks
from distributed import Client, LocalCluster


def main() -> None:
    """Run the cluster until "stop" is read."""
    file, workers, memory_limit, has_plugin = sys.argv[1:]
    tasks.print_stacks_on_signal()
    with (
        LocalCluster(
            n_workers=int(workers), threads_per_worker=2, memory_limit=memory_limit, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        if int(has_plugin):
            from dask_shm_plugin import SharedMemoryPlugin

            client.register_plugin(SharedMemoryPlugin())
        Path(file).write_text(json.dumps({"address": cluster.scheduler_address}))
        for line in sys.stdin:
            if line.strip() == "stop":
                break
        else:
            os._exit(2)  # the process that started this one is gone


if __name__ == "__main__":
    main()
