"""Real clusters for the tests, with nannies, worker processes and memory limits, as users have them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distributed import Client, LocalCluster

#: The options of the plugin in most tests. A small threshold keeps the arrays small and the tests quick.
OPTIONS: dict[str, Any] = {"threshold": "64 KiB", "capacity": "256 MiB"}


@contextmanager
def local_cluster(
    n_workers: int = 2, options: dict[str, Any] | None = OPTIONS, *, memory_limit: str = "1 GiB", **arguments: Any
) -> Iterator[Client]:
    """Run a `LocalCluster`, with the plugin unless ``options`` is None, and yield a client of it.

    The Active Memory Manager is stopped, so that a test can rely on the location of each replica.
    """
    with (
        LocalCluster(
            n_workers=n_workers,
            memory_limit=memory_limit,
            dashboard_address=":0",
            **{"processes": True, "threads_per_worker": 1} | arguments,
        ) as cluster,
        Client(cluster) as client,
    ):
        client.amm.stop()
        if options is not None:
            register(client, **options)
        yield client


def register(client: Client, **options: Any) -> None:
    """Register the plugin as a user does."""
    from dask_shm_plugin import SharedMemoryPlugin

    client.register_plugin(SharedMemoryPlugin(**options))
