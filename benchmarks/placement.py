"""Where blocks should go: how full an arena gets before a request is refused, by placement, over made-up and real traces.

    python benchmarks/placement.py [--capacity "8 GiB"] [--seeds 3] [--json benchmarks/results/placement.json]

Replays traces (see `traces.py`) that would fill 1.2 times the capacity, against the package's own ``placement.Room``
and alternatives. *Spread* is how many times the capacity there are offsets. What is refused would be sent as bytes; it
does not come again. Scores, over all traces and seeds:

usable      the least share of the capacity (live bytes and the request) at which a request was refused that an arena
            that compacts would have taken; 100 % where there was none. The worst of all runs, and the mean
first       how full (live bytes) the arena was when such a request was refused for the first time; mean
full        how full it was at all such refusals; mean
refused     share of the bytes asked for that were refused; beside it, what a compacting arena refuses
cold        share of the bytes placed that lie where the operating system had no page (1 GiB of freed memory stays warm)
span        the highest offset that was used, as a multiple of the capacity
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import traces
from dask.utils import parse_bytes

from dask_shm_plugin import placement

PAGE, MIB = 4096, 1 << 20
WARM = 1024  # MiB
DEMAND = 1.2

#: Returns an offset for a length, given the free parts by offset.
Choice = Callable[[np.ndarray, int], int | None]
Place = Callable[[np.ndarray, int, int, int], int | None]


# --------------------------------------------------------------------------------------------------------- placements


def lowest_gap(taken: np.ndarray, capacity: int, length: int, spread: int = 1) -> int | None:
    """Return the place that the package chooses, looked for from the start."""
    return placement.Room(taken, capacity, spread).place(length)


def choosing(choice: Choice) -> Place:
    """Return a placement that chooses among the gaps."""

    def place(taken: np.ndarray, capacity: int, length: int, spread: int = 1) -> int | None:
        if int(np.sum(taken[:, 1])) + length > capacity:
            return None
        free = placement.gaps(taken, spread * capacity)
        fitting = free[free[:, 1] >= length]
        return choice(fitting, length) if len(fitting) else None

    return place


def tightest_gap(fitting: np.ndarray, length: int) -> int:
    """Return the place that leaves least beside it, and of equals the lowest."""
    return int(fitting[np.argmin(fitting[:, 1]), 0])


def worst_fit(fitting: np.ndarray, length: int) -> int:
    """Return a place in the largest gap."""
    return int(fitting[np.argmax(fitting[:, 1]), 0])


def next_fit() -> Choice:
    """Return a placement that goes on where the last block was placed."""
    at = 0

    def choice(fitting: np.ndarray, length: int) -> int:
        nonlocal at
        offset = int(fitting[np.searchsorted(fitting[:, 0], at) % len(fitting), 0])
        at = offset + length
        return offset

    return choice


def two_ended(fitting: np.ndarray, length: int) -> int:
    """Return a place in the tightest gap for large blocks, and the highest place for those below 64 MiB."""
    if length >= 64 * MIB:
        return int(fitting[np.argmin(fitting[:, 1]), 0])
    return int(fitting[-1].sum()) - length


def buddy(fitting: np.ndarray, length: int) -> int | None:
    """Return the lowest place that is a multiple of the length, which is a power of two."""
    starts = -(-fitting[:, 0] // length) * length
    aligned = starts[starts + length <= fitting.sum(axis=1)]
    return int(aligned[0]) if len(aligned) else None


def placements() -> Iterator[tuple[str, int, Place, Callable[[int], int]]]:
    """Yield name, spread, placement, and how many bytes of the arena a block takes."""

    def whole(length: int) -> int:
        return length

    for spread in (1, 2, 4):
        yield "lowest gap", spread, lowest_gap, whole
        yield "tightest gap", spread, choosing(tightest_gap), whole
    yield "two-ended", 1, choosing(two_ended), whole
    yield "next fit", 1, choosing(next_fit()), whole
    yield "worst fit", 1, choosing(worst_fit), whole
    yield "buddy", 1, choosing(buddy), lambda length: 1 << (length - 1).bit_length()


# ------------------------------------------------------------------------------------------------------------- replay


class Ground:
    """Which MiB of an arena have pages, as trimming keeps them: the highest free ones go first."""

    def __init__(self, span: int, capacity: int) -> None:
        self._resident = np.zeros(span // MIB + 2, dtype=bool)
        self._taken = np.zeros_like(self._resident)
        self._capacity = capacity // MIB
        self._count = self._free = 0

    def take(self, offset: int, length: int) -> int:
        """Take a part into use and return how many bytes of it had no pages."""
        part = slice(offset // MIB, -(-(offset + length) // MIB))
        free = ~self._taken[part]
        cold = int(np.count_nonzero(~self._resident[part]))
        self._free -= int(np.count_nonzero(self._resident[part] & free))
        self._taken[part] = True
        self.trim(self._capacity - self._count - cold + self._free)
        self._resident[part] = True
        self._count += cold
        return min(length, cold * MIB)

    def leave(self, offset: int, length: int) -> None:
        """Free a part; its pages stay."""
        part = slice(-(-offset // MIB), (offset + length) // MIB)
        self._free += int(np.count_nonzero(self._resident[part] & self._taken[part]))
        self._taken[part] = False
        self.trim(WARM)

    def trim(self, warm: int) -> None:
        """Give free pages back until so many are left."""
        beyond = self._free - max(warm, 0)
        if beyond > 0:
            self._resident[np.flatnonzero(self._resident & ~self._taken)[-beyond:]] = False
            self._free -= beyond
            self._count -= beyond


def events(trace: traces.Trace) -> list[tuple[bool, int]]:
    """Return what happens in order: whether a block is wanted or given up, and which one."""
    begins, ends, _ = trace
    count = len(begins)
    order = np.lexsort((np.repeat([1, 0], count), np.concatenate((begins, ends))))
    return [(at < count, at % count) for at in order.tolist()]


def replay(trace: traces.Trace, capacity: int, spread: int, place: Place, takes: Callable[[int], int]) -> Score:
    """Run a trace and return its scores, as shares of the capacity and of the bytes asked for."""
    sizes = -(-trace[2].astype(np.int64) // PAGE) * PAGE
    parts = np.zeros((len(sizes), 2), dtype=np.uint64)
    is_there = np.zeros(len(sizes), dtype=bool)
    ground, live, cold, placed, top = Ground(spread * capacity, capacity), 0, 0, 0, 0
    refusals: list[tuple[int, int]] = []
    refused = 0
    for is_wanted, block in events(trace):
        size = int(sizes[block])
        if is_wanted:
            length = takes(size)
            offset = place(parts[is_there], capacity, length, spread)
            if offset is None:
                refused += size
                if live + size <= capacity:
                    refusals.append((live, size))
                continue
            parts[block], is_there[block] = (offset, length), True
            live, placed, top = live + size, placed + size, max(top, offset + length)
            cold += ground.take(offset, length)
        elif is_there[block]:
            is_there[block] = False
            live -= size
            ground.leave(*map(int, parts[block]))
    full = [before / capacity for before, _ in refusals]
    return {
        "usable": min((sum(refusal) for refusal in refusals), default=capacity) / capacity,
        "first": full[0] if full else 1.0,
        "full": statistics.mean(full) if full else 1.0,
        "refused": refused / int(sizes.sum()),
        "cold": cold / placed,
        "span": top / capacity,
    }


def compacting(trace: traces.Trace, capacity: int) -> float:
    """Return the share of bytes that an arena refuses in which free bytes are always in one piece."""
    sizes, live, refused = trace[2], 0.0, 0.0
    is_there = np.zeros(len(sizes), dtype=bool)
    for is_wanted, block in events(trace):
        if not is_wanted:
            live -= sizes[block] * is_there[block]
        elif live + sizes[block] > capacity:
            refused += sizes[block]
        else:
            is_there[block] = True
            live += sizes[block]
    return float(refused / sizes.sum())


Score = dict[str, float]


# ---------------------------------------------------------------------------------------------------------------- all


def all_traces(capacity: int, seeds: int) -> Iterator[tuple[str, traces.Trace]]:
    """Yield every trace, in several variants."""
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        yield "steady", traces.steady(random, capacity, DEMAND, heavy=False)
        yield "steady, long tail", traces.steady(random, capacity, DEMAND, heavy=True)
        yield "day", traces.day(random, capacity, DEMAND)
        for name in sorted(path.stem for path in traces.RECORDED.glob("*.csv")):
            yield name, traces.scaled(random, traces.recorded(name), capacity, DEMAND)


def microseconds(place: Place, spread: int, takes: Callable[[int], int]) -> dict[str, float]:
    """Return what one call costs among so many live blocks, every second of which was freed."""
    costs = {}
    for live in (10, 1000, 10000):
        lengths = 1 << np.random.default_rng(0).integers(16, 20, 2 * live)
        offsets = np.cumsum(lengths) - lengths
        taken = np.stack((offsets, lengths), axis=1).astype(np.uint64)[::2]
        capacity, times = 4 * int(offsets[-1]), []
        for _ in range(max(5, 2000 // live)):
            start = time.perf_counter()
            place(taken, capacity, takes(1 << 17), spread)
            times.append(time.perf_counter() - start)
        costs[str(live)] = round(statistics.median(times) * 1e6, 1)
    return costs


def measure(capacity: int, seeds: int) -> dict[str, Any]:
    """Replay everything."""
    named = list(all_traces(capacity, seeds))
    ideal = {name: [compacting(trace, capacity) for other, trace in named if other == name] for name, _ in named}
    rows = []
    for name, spread, place, takes in placements():
        scores = [(of, replay(trace, capacity, spread, place, takes)) for of, trace in named]
        mean = {key: statistics.mean(score[key] for _, score in scores) for key in scores[0][1]}
        by_trace = {of: statistics.mean(score["usable"] for other, score in scores if other == of) for of, _ in named}
        rows.append(
            {"placement": name, "spread": spread, "least_usable": min(score["usable"] for _, score in scores)}
            | mean
            | {"usable_by_trace": by_trace, "microseconds": microseconds(place, spread, takes)}
        )
    mean_ideal = statistics.mean(share for shares in ideal.values() for share in shares)
    counts = {name: len(trace[0]) for name, trace in named}
    return {"capacity": capacity, "seeds": seeds, "blocks": counts, "ideal_refused": mean_ideal, "rows": rows}


def show(result: dict[str, Any]) -> None:
    """Print the table for the documentation."""
    print(
        "| placement | spread | usable, least | mean | first | full | refused | cold | span | µs at 10 / 1,000 / 10,000 |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        shares = " | ".join(f"{row[key]:.0%}" for key in ("least_usable", "usable", "first", "full", "refused", "cold"))
        costs = " / ".join(f"{cost:,.0f}" for cost in row["microseconds"].values())
        print(f"| {row['placement']} | {row['spread']} | {shares} | {row['span']:.2f} | {costs} |")
    print(f"\nA compacting arena refuses {result['ideal_refused']:.0%}. Blocks: {result['blocks']}")


def main() -> None:
    """Read the arguments, replay, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity", type=parse_bytes, default="8 GiB")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures there")
    asked = parser.parse_args()
    result = measure(asked.capacity, asked.seeds)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    main()
