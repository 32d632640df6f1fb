"""How far the plugin is from its targets, each a ratio within one run.

    python benchmarks/targets [--quick] [--only NAME ...] [--json PATH]

Real clusters with memory limits, arrays of random numbers, results that are checked; medians of rounds in which the compared
things take turns. A memcpy is a plain copy of the same bytes into memory whose pages exist, in the same run.

one-element
    A broadcast to four workers, on each of which a task reads one element; of several sizes, beside stock Dask.
small-broadcasts
    A broadcast of 8 bytes to 4 MiB to four workers, and right after it the same with stock Dask.
sixteen-workers
    The cost of the bytes of a broadcast with sixteen workers, beside that with four; also for other numbers of workers.
hash
    The time that the default ``hash=True`` adds to a broadcast, over hashing alone.
published-fetch
    A worker fetches a value that another worker has published before, of 1 MiB to 1 GiB, over a fetch of 8 bytes.
busy-owner
    The same while the worker that has the value runs a task that keeps the interpreter's lock for a second.
first-fetch
    A worker fetches a value that was not published, less a fetch of 8 bytes, over a memcpy.
many-blocks
    The raw arena, without Dask: publish and attach with 10,000 live blocks and 64 members, over 10 and 2.
event-loop
    The longest delay of a timer while values of 1 GiB move, on the event loops of the worker that gives, of the worker that
    takes, and of the client, beside an unrelated process.
start-up
    The time that the plugin adds to the start of a worker and to its imports, and that no other worker imports it.

A figure that misses its target is marked. Other programs on the machine spoil all figures.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import blocks
import broadcasts
import fetches
import loops
import report
import starting

WORKS = {
    "one-element": broadcasts.one_element,
    "small-broadcasts": broadcasts.small_ones,
    "sixteen-workers": broadcasts.sixteen_workers,
    "hash": broadcasts.hashed,
    "published-fetch": fetches.published,
    "busy-owner": fetches.busy_owner,
    "first-fetch": fetches.first,
    "many-blocks": blocks.many_blocks,
    "event-loop": loops.event_loop,
    "start-up": starting.start_up,
}


def main() -> None:
    """Read the arguments, measure one after the other, and print each as soon as it is known."""
    asked = report.parser(__doc__, list(WORKS)).parse_args()
    result = report.head(asked, "distributed", "numpy", works={})
    for name in (name for name in WORKS if name in asked.only):
        begin = time.monotonic()
        result["works"][name] = one = WORKS[name](is_quick=asked.quick)
        print(f"\n{name}, {time.monotonic() - begin:.0f} s")
        report.show_figures(one["figures"])
    report.write(asked.json, result)


if __name__ == "__main__":
    main()
