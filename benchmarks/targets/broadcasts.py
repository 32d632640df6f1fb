"""``scatter(x, broadcast=True)``, and a task on each worker that reads one element: by size, by workers, and with hashing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from clusters import ARMS, Site, Spec, arms, in_turn, site, take_turns
from dask.base import tokenize
from dask.hashing import hashers
from machine import MIB, WarmCopy, make
from remote import Remote, remote
from report import figure, spread

SMALL = 8


def read_one(x: np.ndarray) -> int:
    """Return the bits of one element, from the middle."""
    return int(x.view(np.uint64)[len(x) // 2])


def broadcast(site: Site, seed: int, size: int, hash: bool = False) -> float:
    """Give an array to all workers, let each of them read one element, and return the time."""
    x = make(seed, size)
    start = time.perf_counter()
    future = site.client.scatter(x, broadcast=True, hash=hash)
    results = site.read_on_all(future, read_one)
    seconds = time.perf_counter() - start
    assert results == [read_one(x)] * len(site.workers), "wrong values"
    del future
    site.settle(blocks_too=True)
    return seconds


def order(cluster: Remote, function: Callable[..., Any], *arguments: Any, first: int = 1) -> Callable[[int], Any]:
    """Return a function that lets a cluster measure with a seed of its own for each round."""
    return lambda number: cluster.ask(function, number + first, *arguments)


def by_size(seconds: dict[Any, np.ndarray], sizes: Iterable[int]) -> dict[str, Any]:
    """Return the medians of each arm at each size."""
    arms = ("plugin", "stock")
    return {"by": "bytes", "seconds": {arm: {str(size): spread(seconds[arm, size]) for size in sizes} for arm in arms}}


def one_element(*, is_quick: bool) -> dict[str, Any]:
    """Broadcast arrays of several sizes to four workers, with and without the plugin, beside a plain copy."""
    sizes = [SMALL, *(n * MIB for n in ((1, 4) if is_quick else (1, 4, 16, 64, 256)))]
    copy = {"memcpy": WarmCopy(sizes[-1]).seconds}
    with arms(Spec()) as remotes:
        orders = {(arm, size): order(remotes[arm], broadcast, size) for size in sizes for arm in ARMS}
        seconds = take_turns(2 if is_quick else 7, orders, copy)
    ratios = seconds["plugin", sizes[-1]] / (seconds["memcpy"] + seconds["plugin", SMALL])
    what = f"broadcast of {sizes[-1] // MIB} MiB to 4 workers that read one element"
    figures = [
        figure(f"{what}, over a memcpy and the same with 8 bytes", ratios, "×", 3),
        figure(f"memcpy of {sizes[-1] // MIB} MiB", seconds["memcpy"], "ms", factor=1e3),
    ]
    return {"figures": figures, "series": by_size(seconds, sizes)}


def small_ones(*, is_quick: bool) -> dict[str, Any]:
    """Broadcast small arrays, right after each other with and without the plugin, again and again."""
    kib = MIB // 1024
    sizes = {SMALL: 1.05, 64 * kib: 1.05, MIB: 1.0, 4 * MIB: 1.0}

    def sequence(number: int) -> list[tuple[str, int]]:
        return [(arm, size) for size in in_turn(number // 2, sizes) for arm in in_turn(number, ARMS)]

    with arms(Spec()) as remotes:
        orders = {(arm, size): order(remotes[arm], broadcast, size, first=2) for size in sizes for arm in ARMS}
        seconds = take_turns(2 if is_quick else 40, orders, sequence=sequence, unmeasured=2)
    figures = []
    for size, most in sizes.items():
        what = f"broadcast of {f'{size} bytes' if size < kib else f'{size // kib} KiB'} to 4 workers, over stock Dask"
        figures.append(figure(what, seconds["plugin", size] / seconds["stock", size], "×", most))
    return {"figures": figures, "series": by_size(seconds, sizes)}


def large_and_small(arm: str, workers: int, size: int, count: int) -> dict[int, np.ndarray]:
    """Let a cluster broadcast a large array and a small one in turn."""
    with remote(site, Spec(arm == "plugin", workers)) as cluster:
        return take_turns(count, {each: order(cluster, broadcast, each) for each in (SMALL, size)})


def sixteen_workers(*, is_quick: bool) -> dict[str, Any]:
    """Broadcast to more and more workers.

    One cluster at a time, for sixteen idle workers are no small load; four are measured before sixteen and again after.
    """
    size = 4 * MIB if is_quick else 256 * MIB
    runs = [("plugin", 4), ("plugin", 16), ("plugin", 4)]
    if not is_quick:
        runs += [("plugin", n) for n in (1, 2, 8)] + [("stock", n) for n in (1, 2, 4)]
    done: dict[tuple[str, int], list[dict[int, np.ndarray]]] = {}
    for arm, workers in runs:
        count = 2 if is_quick else 11 if workers == 16 else 5
        done.setdefault((arm, workers), []).append(large_and_small(arm, workers, size, count))
    seconds = {
        run: {each: np.concatenate([one[each] for one in ones]) for each in ones[0]} for run, ones in done.items()
    }
    extra = {count: seconds["plugin", count][size] - seconds["plugin", count][SMALL] for count in (4, 16)}
    # Not a ratio: 8 bytes, which are not shared, may take longer than 256 MiB, which are.
    what = f"broadcast of {size // MIB} MiB less 8 bytes, 16 workers, beside 1.3 × the same with 4"
    figures = [figure(what, extra[16], "ms", 1.3e3 * np.median(extra[4]), 1e3)]
    series: dict[str, Any] = {"plugin": {}, "stock": {}, "plugin, 8 bytes": {}}
    for (arm, count), one in sorted(seconds.items()):
        series[arm][str(count)] = spread(one[size])
        if arm == "plugin":
            series["plugin, 8 bytes"][str(count)] = spread(one[SMALL])
    return {"figures": figures, "series": {"by": "workers", "bytes": size, "seconds": series}}


def hashing(site: Site, seed: int, size: int) -> float:
    """Return the time of the hash that ``hash=True`` asks for, by itself."""
    x = make(seed, size)
    start = time.perf_counter()
    tokenize(x)
    return time.perf_counter() - start


def hashed(*, is_quick: bool) -> dict[str, Any]:
    """Broadcast with and without ``hash=True``, and hash alone, in turn."""
    size = 4 * MIB if is_quick else 256 * MIB
    copy = {"memcpy": WarmCopy(size).seconds}
    with remote(site, Spec()) as cluster:
        broadcasts = {is_hashed: order(cluster, broadcast, size, is_hashed) for is_hashed in (True, False)}
        seconds = take_turns(2 if is_quick else 9, {**broadcasts, "alone": order(cluster, hashing, size)}, copy)
    alone, memcpy = (np.median(seconds[name]) for name in ("alone", "memcpy"))
    what = f"broadcast of {size // MIB} MiB to 4 workers"
    figures = [
        # A tenth for the noise of a difference, as for a copy elsewhere in the table.
        figure(f"{what}: what hash=True adds, over hashing alone", (seconds[True] - seconds[False]) / alone, "×", 1.1),
        figure(f"hashing alone ({hashers[0].__name__}), over a memcpy", alone / memcpy, "×"),
        *(figure(f"{what}, hash={is_hashed}", seconds[is_hashed], "ms", factor=1e3) for is_hashed in broadcasts),
        figure("hashing alone", seconds["alone"], "ms", factor=1e3),
    ]
    return {"figures": figures}
