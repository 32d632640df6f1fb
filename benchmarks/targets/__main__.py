"""How far the plugin is from its targets, each a ratio within one run.

    python benchmarks/targets [--quick] [--only NAME ...] [--json PATH]

Real clusters with memory limits, arrays of random numbers, results that are checked; medians of rounds in which what is
compared takes turns. ``memcpy`` is a plain copy of the same bytes into memory that exists, in the same run.

one-element
    A broadcast to four workers, on each of which a task reads one element; also against size, beside stock Dask, and with
    tasks that sum all of it.
small-broadcasts
    A broadcast of 8 bytes to 4 MiB to four workers, beside stock Dask, right after each other.
sixteen-workers
    What the bytes of a broadcast cost with sixteen workers, beside the same with four; also against the number of workers.
hash
    What the default ``hash=True`` adds to a broadcast, over hashing alone.
published-fetch
    A worker fetches what another has published before, of 1 MiB to 1 GiB, over a fetch of 8 bytes.
busy-owner
    The same while the worker that has it runs a task that keeps the interpreter's lock for a second.
first-fetch
    A worker fetches what has not been published, less a fetch of 8 bytes, over a memcpy.
many-blocks
    The raw arena, without Dask: publish and attach with 10,000 live blocks and 64 members, over 10 and 2.
event-loop
    The longest time for which values of 1 GiB kept an event loop from what was due; of a worker that gives, one that takes, and
    the client, beside a process that has nothing to do with it.
start-up
    What the plugin adds to the start of a worker and to its imports; and that nobody else imports it.

A figure that is worse than its target says so. Other programs on the machine spoil all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import blocks
import broadcasts
import fetches
import loops
import machine
import starting
from report import Measurement, show

WORKS: dict[str, Callable[..., Measurement]] = {
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


def measure(names: list[str], *, is_quick: bool) -> dict[str, Any]:
    """Measure one after the other, and print each as soon as it is known."""
    works = {}
    for name in names:
        begin = time.monotonic()
        works[name] = WORKS[name](is_quick=is_quick).as_data()
        works[name]["took"] = time.monotonic() - begin
        show(name, works[name])
        print(f"{name} took {works[name]['took']:.0f} s", file=sys.stderr)
    return works


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: only to see that it works")
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS), help="some of it (default: all)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all rounds there")
    asked = parser.parse_args()
    around = machine.surroundings("distributed", "numpy")
    print(", ".join(f"{name} {value}" for name, value in around.items()))
    works = measure([name for name in WORKS if name in asked.only], is_quick=asked.quick)
    if asked.json:
        result = {"is_quick": asked.quick, "surroundings": around, "works": works}
        asked.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
