"""What one reading of the memory meter costs, by the number of blocks that the process refers to.

    python benchmarks/meter.py [--members 5]

A reading is what a worker does each time it reports its memory, or asks itself whether to spill. The other members refer
to all blocks, too.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from dask_shm_plugin.arena import Arena
from dask_shm_plugin.block import Block, Descriptor
from dask_shm_plugin.segment import PAGE

ROUNDS = 2000
NEIGHBOUR = """
import pickle, sys
from dask_shm_plugin.arena import Arena
at, arena_id, descriptors = pickle.load(sys.stdin.buffer)
arena = Arena.attach(at, arena_id)
blocks = [arena.attach_block(descriptor) for descriptor in descriptors]
print("ready", flush=True)
sys.stdin.read()
for block in blocks:
    block.close()
arena.close()
"""


def published(arena: Arena, count: int) -> list[Block]:
    """Make some blocks."""
    blocks = []
    for _ in range(count):
        with arena.draft(PAGE) as draft:
            blocks.append(draft.seal())
    return blocks


@contextmanager
def neighbour(arena: Arena, descriptors: list[Descriptor]) -> Iterator[None]:
    """Let another process refer to some blocks."""
    command = [sys.executable, "-c", NEIGHBOUR]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(pickle.dumps((arena.segment.whereabouts, arena.arena_id, descriptors)))
        process.stdin.flush()
        process.stdout.readline()
        yield


def cost(count: int, members: int) -> float:
    """Return the median of one reading, in microseconds."""
    arena = Arena.create(count * PAGE)
    blocks = published(arena, count)
    times = []
    with ExitStack() as stack:
        for _ in range(members - 1):
            stack.enter_context(neighbour(arena, [block.descriptor for block in blocks]))
        for _ in range(ROUNDS):
            start = time.perf_counter()
            arena.budget.private_memory(os.getpid())
            arena.weights.weigh()
            times.append(time.perf_counter() - start)
    for block in blocks:
        block.close()
    arena.close()
    return statistics.median(times) * 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=5, help="processes that refer to the blocks (default: 5)")
    members = parser.parse_args().members
    for count in (1, 100, 1000):
        print(f"{count:>5} blocks, {members} members: {cost(count, members):.0f} µs")


if __name__ == "__main__":
    main()
