#!/bin/sh
# Two worker commands on one node, as a batch system starts them: they share one arena.
#
# sh examples/preload.sh [MiB]
set -eu
dir=$(mktemp -d)
trap 'kill $workers; wait $workers || true; kill $scheduler; wait; rm -rf "$dir"' EXIT

dask scheduler --host 127.0.0.1 --port 0 --dashboard-address :0 --scheduler-file "$dir/scheduler.json" &
scheduler=$! workers=
for i in 1 2; do
    dask worker --scheduler-file "$dir/scheduler.json" --local-directory "$dir" --dashboard-address :0 \
        --nworkers 2 --nthreads 1 --preload dask_shm_plugin &
    workers="$workers $!"
done

# The client takes part through Dask's configuration; its code does not mention the plugin.
export DASK_DISTRIBUTED__CLIENT__PRELOAD='["dask_shm_plugin"]'
MIB=${1:-256} DIR=$dir python - <<'PYTHON'
import os

import numpy as np
from distributed import Client

from dask_shm_plugin import is_shared

with Client(scheduler_file=f"{os.environ['DIR']}/scheduler.json") as client:
    client.wait_for_workers(4, timeout=60)
    future = client.scatter(np.random.rand(int(os.environ["MIB"]) << 17), broadcast=True)
    workers = client.scheduler_info(n_workers=-1)["workers"]
    shared = [client.submit(is_shared, future, workers=[w], pure=False).result() for w in workers]
    print(f"the array is shared on {sum(shared)} of {len(shared)} workers")
PYTHON
