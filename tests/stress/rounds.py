"""Make, fetch and release thousands of values: each must arrive unchanged, and the arena must be empty at the end.

    python tests/stress/rounds.py [--rounds 10000] [--together 16] [--json]

In each round, one worker makes about 1.5 MiB of random bytes, with the number of the round at the beginning and a
checksum at the end. A task on another worker fetches and checks them. Then both are released. Several rounds run at
the same time, so that blocks are reserved, mapped and freed while others are in use. Every second round uses the key
of an earlier, released value again, with other contents.

The exit status is 1 if a value was wrong, if no value was shared, or if the arena is not empty at the end. Names that
are left in /dev/shm are reported, including those of other clusters that run at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from distributed import Client, LocalCluster

from dask_shm_plugin import SharedMemoryPlugin, is_shared, stats

NUMBER = 8
CHECKSUM = 4


def make(number: int) -> np.ndarray:
    """Return between 1 and 2 MiB of random bytes, with the number of their round and a checksum."""
    random = np.random.default_rng()
    value = random.integers(0, 256, size=int(random.integers(1 << 20, 2 << 20)) + NUMBER + CHECKSUM, dtype=np.uint8)
    value[:NUMBER] = np.frombuffer(number.to_bytes(NUMBER, "little"), dtype=np.uint8)
    value[-CHECKSUM:] = np.frombuffer(zlib.crc32(value[:-CHECKSUM].data).to_bytes(CHECKSUM, "little"), dtype=np.uint8)
    return value


def check(value: np.ndarray, number: int) -> tuple[bool, bool]:
    """Return whether these are the undamaged bytes of a round, and whether they lie in shared memory."""
    right = int.from_bytes(value[:NUMBER].tobytes(), "little") == number
    whole = zlib.crc32(value[:-CHECKSUM].data) == int.from_bytes(value[-CHECKSUM:].tobytes(), "little")
    return right and whole, is_shared(value)


def batches(count: int, size: int) -> Iterator[list[int]]:
    """Yield the numbers of the rounds in batches."""
    numbers = iter(range(count))
    while batch := list(islice(numbers, size)):
        yield batch


def key_of_round(number: int, together: int) -> str:
    """Return the key of a round's value: a new one in even rounds, a used one in odd rounds."""
    return f"value-{number % (4 * together)}" if number % 2 else f"new-{number}"


def run(client: Client, rounds: int, together: int) -> tuple[int, int]:
    """Run all rounds; return the number of wrong values, and the number of values in shared memory."""
    maker, reader = list(client.scheduler_info(n_workers=-1)["workers"])[:2]
    wrong = shared = 0
    for batch in batches(rounds, together):
        values = [client.submit(make, n, key=key_of_round(n, together), workers=[maker], pure=False) for n in batch]
        seen = client.gather(
            [client.submit(check, v, n, workers=[reader], pure=False) for v, n in zip(values, batch, strict=True)]
        )
        del values
        wrong += sum(not good for good, _ in seen)
        shared += sum(is_in_arena for _, is_in_arena in seen)
        if sys.stderr.isatty():
            print(f"\r{batch[-1] + 1} rounds, {wrong} wrong", end="", file=sys.stderr)
    return wrong, shared


def bytes_left(client: Client, seconds: float = 30) -> int:
    """Return the bytes that stay in use in all arenas, after some time for late releases."""
    deadline = time.monotonic() + seconds
    while True:
        used = sum(int(arena["used"]) for arena in stats(client).values())
        if not used or time.monotonic() > deadline:
            return used
        time.sleep(0.1)


def names_in_dev_shm() -> set[str]:
    """Return the package's names in /dev/shm."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("dask-shm")}


def main() -> int:
    """Parse the arguments, run, and print the results; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10_000, help="number of rounds (default: 10000)")
    parser.add_argument("--together", type=int, default=16, help="rounds that run at the same time (default: 16)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    asked = parser.parse_args()
    before = names_in_dev_shm()
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(SharedMemoryPlugin())
        start = time.perf_counter()
        wrong, shared = run(client, asked.rounds, asked.together)
        seconds = time.perf_counter() - start
        used = bytes_left(client)
        arenas: list[dict[str, Any]] = list(stats(client).values())
    result = {
        "rounds": asked.rounds,
        "wrong": wrong,
        "shared": shared,
        "used_at_the_end": used,
        "blocks_at_the_end": sum(arena["blocks"] for arena in arenas),
        "published": sum(arena["published"]["count"] for arena in arenas),
        "attached": sum(arena["attached"]["count"] for arena in arenas),
        "adopted": sum(arena["adopted"]["count"] for arena in arenas),
        "sent": {reason: counts["count"] for arena in arenas for reason, counts in arena["sent"].items()},
        "names_left_in_dev_shm": sorted(names_in_dev_shm() - before),
        "seconds": round(seconds, 1),
    }
    if asked.json:
        print(json.dumps(result, indent=2))
    else:
        for name, figure in result.items():
            print(f"{name.replace('_', ' '):<24}{figure}")
    return int(bool(wrong or used or not shared))


if __name__ == "__main__":
    sys.exit(main())
