"""Kill whatever can be killed in real clusters that work all the time; nothing may be wrong, lost, left or late.

    python benchmarks/chaos [--kills 1000] [--seed 1] [--json] [--stock]

Clusters of three kinds, one after the other: a `LocalCluster`; `dask scheduler` and `dask worker --nworkers 2`; the same
without nannies. Three client processes scatter, fetch, gather, replicate, pass views on, write in place, fork and spill;
every value carries its number and a checksum, and is checked wherever it arrives. Meanwhile workers, nannies and clients
are killed (SIGKILL, some while they hold the lock of the table; SIGSEGV; `os._exit` in a task) or stopped for some
seconds, and now and then the scheduler, or everything at once. What was killed is replaced.

After each cluster a fresh member checks the table and waits until the arena is empty; when all has ended, nothing may be
left in /dev/shm. The seed decides who is killed when and how; how far each process has got by then is the machine's say.
What the processes print is kept in the folder that is told at the end.

``--stock`` does the same without the plugin: errors and hangs that appear there, too, are Dask's.

Ends with status 1 when anything was found that must not be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from run import Run

KINDS = ("local", "commands", "no nannies")


def main() -> int:
    """Read the arguments, run, print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--per-cluster", type=int, default=60, help="kills before the next cluster (default: 60)")
    parser.add_argument("--gap", type=float, default=0.8, help="mean seconds between kills (default: 0.8)")
    parser.add_argument(
        "--patience", type=float, default=120, help="seconds after which something hangs (default: 120)"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="clusters (default: all)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--folder", type=Path, help="where logs go (default: a new temporary one)")
    parser.add_argument("--stock", action="store_true", help="without the plugin")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["CHAOS_FOLDER"] = ""  # this process is none of the run's own
    start = time.monotonic()
    run = Run(folder, seed=asked.seed, gap=asked.gap, patience=asked.patience, has_plugin=not asked.stock)
    number = 0
    while run.killed < asked.kills and not run.is_hopeless:
        run.one_cluster(
            asked.kinds[number % len(asked.kinds)], number, min(asked.per_cluster, asked.kills - run.killed)
        )
        number += 1
    result = {**run.report(), "seconds": round(time.monotonic() - start)}
    if asked.json:
        print(json.dumps(result, indent=2))
    else:
        for name, figure in result.items():
            print(f"{name.replace('_', ' '):<28}{figure}")
    return int(run.has_failed)


if __name__ == "__main__":
    sys.exit(main())
