"""Share one array with all workers of this machine.

python examples/quickstart.py [MiB]
"""

import sys

import numpy as np
from distributed import Client, LocalCluster

from dask_shm_plugin import SharedMemoryPlugin, is_shared, stats


def look(x: np.ndarray) -> tuple[bool, float]:
    """Return whether the array lies in shared memory, and its largest number."""
    return is_shared(x), float(x.max())


def main(mebibytes: int) -> None:
    """Scatter an array to all workers, and use it on each of them."""
    big = np.random.default_rng(0).random(mebibytes * 2**17)
    with LocalCluster(n_workers=4, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        client.register_plugin(SharedMemoryPlugin())  # the one line

        future = client.scatter(big, broadcast=True)
        workers = client.scheduler_info(n_workers=-1)["workers"]
        seen = client.gather([client.submit(look, future, workers=[worker], pure=False) for worker in workers])
        assert seen == [(True, float(big.max()))] * len(workers), seen

        for node in stats(client).values():
            print(f"{node['blocks']} block(s), {node['used'] / 2**20:.0f} MiB, for {len(workers)} workers")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 256)
