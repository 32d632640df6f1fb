"""A task that makes a large table, gives it to all workers, and starts more tasks on it.

python examples/workflow_from_task.py [MiB]
"""

import sys

import numpy as np
from distributed import Client, LocalCluster, worker_client

from dask_shm_plugin import SharedMemoryPlugin


def slope(table: np.ndarray, seed: int) -> float:
    """Fit a line to a random tenth of the rows."""
    rows = np.random.default_rng(seed).integers(len(table), size=len(table) // 10)
    return float(np.polyfit(table[rows, 0], table[rows, 1], 1)[0])


def bootstrap(mebibytes: int, repetitions: int) -> tuple[float, float]:
    """Return the mean of the slope and its spread; runs on a worker."""
    x, noise = np.random.default_rng(0).random((2, mebibytes * 2**16))
    table = np.stack([x, 2 * x + noise], axis=1)
    with worker_client() as client:
        [shared] = client.scatter([table], hash=False)
        slopes = client.gather([client.submit(slope, shared, seed) for seed in range(repetitions)])
    return float(np.mean(slopes)), float(np.std(slopes))


def main(mebibytes: int) -> None:
    """Run the task on a cluster of this machine."""
    with LocalCluster(n_workers=4, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        client.register_plugin(SharedMemoryPlugin())
        mean, spread = client.submit(bootstrap, mebibytes, 20).result()
        print(f"slope {mean:.3f} ± {spread:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 128)
