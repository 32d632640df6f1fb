"""Kill processes of real clusters while clients move values; no value may be wrong, and no memory may be left.

    python tests/stress/chaos [--kills 1000] [--seed 1] [--json] [--stock]

Three kinds of clusters run in turn: a `LocalCluster`; `dask scheduler` and `dask worker --nworkers 2`; the same
without nannies. Three client processes scatter, fetch, gather, replicate, pass views on, write in place, fork and
spill. Every value contains its number and a checksum, and is checked wherever it arrives. Meanwhile workers, nannies
and clients are killed (SIGKILL, sometimes while they hold the lock of the table; SIGSEGV; `os._exit` in a task) or
stopped for some seconds. Now and then the scheduler, or all processes at once, are killed. Killed processes are
replaced.

Some values are larger than 8 MiB, and so have a second holder: it is counted how many of these were computed again or
lost. Twice a second, the memory of all arenas that `dask shm list` shows is compared with the kernel's shared memory:
of the machine, or of a control group of the run.

After each cluster, a new member checks the table and waits until the arena is empty. When all processes have ended,
nothing may be left in /dev/shm. The seed fixes the schedule: when, how and in which role processes are killed. It
does not fix how far each process has got by then. The folder with the output of all processes is printed at the end.

``--stock`` runs without the plugin: errors and hangs that appear there, too, are Dask's.

The exit status is 1 if there were findings: a wrong value, a hang, memory or names that are left, a dead member that
was not reclaimed, or a traceback of this package; with the plugin, also if no value was shared.
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
    """Parse the arguments, run, and print the report; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="number of kills (default: 1000)")
    parser.add_argument("--per-cluster", type=int, default=60, help="kills before the next cluster (default: 60)")
    parser.add_argument("--gap", type=float, default=0.8, help="mean seconds between kills (default: 0.8)")
    parser.add_argument(
        "--patience", type=float, default=120, help="seconds after which an operation counts as hung (default: 120)"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of clusters (default: all)")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(1 << 32), help="seed of the schedule (default: a random one)"
    )
    parser.add_argument("--folder", type=Path, help="folder for logs (default: a new temporary one)")
    parser.add_argument(
        "--group", type=Path, help="folder of a memory control group in which only this run is, for the sums of memory"
    )
    parser.add_argument("--stock", action="store_true", help="run without the plugin")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["CHAOS_FOLDER"] = ""  # this process is not one of the run, so it is never killed
    start = time.monotonic()
    run = Run(
        folder, seed=asked.seed, gap=asked.gap, patience=asked.patience, has_plugin=not asked.stock, group=asked.group
    )
    number = 0
    while run.killed < asked.kills and not run.has_too_many_findings:
        run.run_cluster(
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
