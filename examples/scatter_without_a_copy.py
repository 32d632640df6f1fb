"""Make an array where `scatter` will find it, and share it with all workers of this machine.

python examples/scatter_without_a_copy.py [MiB]
"""

import sys
import time

import numpy as np
from distributed import Client, LocalCluster

from dask_shm_plugin import SharedMemoryPlugin, born, stats


def main(mebibytes: int) -> None:
    """Scatter an array that lies in shared memory from the start."""
    with LocalCluster(n_workers=4, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        client.register_plugin(SharedMemoryPlugin())

        with born():  # arrays that are made here are allocated in shared memory
            big = np.random.default_rng(0).random(mebibytes * 2**17)
        start = time.perf_counter()
        future = client.scatter(big, broadcast=True, hash=False)
        print(f"scattered to 4 workers in {time.perf_counter() - start:.3f} s")

        assert client.submit(np.max, future).result() == big.max()
        for node in stats(client).values():
            print(f"{node['born']['count']} array(s) shared in place, {node['published']['count']} copied")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 256)
