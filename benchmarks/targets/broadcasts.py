"""``scatter(x, broadcast=True)``, and a task on each worker that reads one element: against size, workers, and hashing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from dask.base import tokenize
from dask.hashing import hashers
from machine import WarmCopy, make
from report import MIB, Figure, Measurement, Round, median
from sites import Site, Spec, sites

SMALL = 8


def read_one(x: np.ndarray) -> int:
    """Return the bits of one element, from the middle."""
    return int(x.view(np.uint64)[len(x) // 2])


def read_all(x: np.ndarray) -> int:
    """Sum the bits of all elements, which unlike a sum of floats is exact."""
    return int(x.view(np.uint64).sum())


def broadcast(
    site: Site, seed: int, size: int, hash: bool = False, read: Callable[[np.ndarray], int] = read_one
) -> float:
    """Give an array to all workers, let each of them read it, and return how long that took."""
    x = make(seed, size)
    start = time.perf_counter()
    future = site.client.scatter(x, broadcast=True, hash=hash)
    tasks = [site.client.submit(read, future, workers=[worker], pure=False) for worker in site.workers]
    results = site.client.gather(tasks)
    seconds = time.perf_counter() - start
    assert results == [read(x)] * len(site.workers), "wrong values"
    del future, tasks
    site.settle()
    return seconds


def in_turn(number: int, orders: list[Any]) -> list[Any]:
    """Return orders from first to last, or every other time from last to first."""
    return orders if number % 2 else orders[::-1]


# ------------------------------------------------------------------------------------------------------- against size


def one_element(*, is_quick: bool) -> Measurement:
    """Broadcast arrays of several sizes to four workers, with and without the plugin, beside a plain copy."""
    sizes = [SMALL, *(n * MIB for n in ((1, 4) if is_quick else (1, 4, 16, 64, 256)))]
    rounds: list[Round] = []
    copy = WarmCopy(sizes[-1])
    with sites(Spec(), Spec(with_plugin=False)) as arms:
        names = dict(zip(arms, ("plugin", "stock"), strict=True))
        for number in range(-1, 2 if is_quick else 7):
            one: Round = {"memcpy": copy.seconds(), "plugin": {}, "stock": {}, "sums": {}}
            for size in in_turn(number, sizes):
                for arm in in_turn(number, arms):
                    one[names[arm]][str(size)] = arm.ask(broadcast, number + 1, size)
            for arm in in_turn(number, arms):
                one["sums"][names[arm]] = arm.ask(broadcast, number + 1, sizes[-1], False, read_all)
            rounds += [one] if number >= 0 else []
    large, small = str(sizes[-1]), str(SMALL)
    ratio = median(rounds, lambda one: one["plugin"][large] / (one["memcpy"] + one["plugin"][small]))
    sums = median(rounds, lambda one: one["sums"]["plugin"] / one["sums"]["stock"])
    faster = median(rounds, lambda one: one["plugin"][large] / one["stock"][large])
    what = f"broadcast of {sizes[-1] // MIB} MiB to 4 workers that read one element"
    figures = [
        Figure(f"{what}, over a memcpy and the same with 8 bytes", ratio, "×", 3),
        Figure("the same, over stock Dask", faster, "×"),
        Figure("the same with tasks that sum all elements, over stock Dask", sums, "×"),
        Figure(what, 1e3 * median(rounds, lambda one: one["plugin"][large]), "ms"),
        Figure("the same with 8 bytes", 1e3 * median(rounds, lambda one: one["plugin"][small]), "ms"),
        Figure(f"memcpy of {sizes[-1] // MIB} MiB", 1e3 * median(rounds, "memcpy"), "ms"),
    ]
    series = {
        arm: {str(size): median(rounds, lambda one, arm=arm, size=size: one[arm][str(size)]) for size in sizes[1:]}
        for arm in ("plugin", "stock")
    }
    return Measurement(rounds, figures, {"by": "bytes", "seconds": series})


def small_ones(*, is_quick: bool) -> Measurement:
    """Broadcast what is too small to gain much: right after each other with and without the plugin, again and again."""
    kib = MIB // 1024
    sizes = {SMALL: 1.05, 64 * kib: 1.05, MIB: 1.0, 4 * MIB: 1.0}
    rounds: list[Round] = []
    with sites(Spec(), Spec(with_plugin=False)) as arms:
        names = dict(zip(arms, ("plugin", "stock"), strict=True))
        for number in range(-2, 2 if is_quick else 40):
            one: Round = {"plugin": {}, "stock": {}}
            for size in in_turn(number // 2, list(sizes)):
                for arm in in_turn(number, arms):
                    one[names[arm]][str(size)] = arm.ask(broadcast, number + 2, size)
            rounds += [one] if number >= 0 else []
    figures = []
    for size, most in sizes.items():
        ratio = median(rounds, lambda one, size=size: one["plugin"][str(size)] / one["stock"][str(size)])
        what = f"{size} bytes" if size < kib else f"{size // kib} KiB"
        figures.append(Figure(f"broadcast of {what} to 4 workers, over stock Dask", ratio, "×", most))
    series = {
        arm: {str(size): median(rounds, lambda one, arm=arm, size=size: one[arm][str(size)]) for size in sizes}
        for arm in ("plugin", "stock")
    }
    return Measurement(rounds, figures, {"by": "bytes", "seconds": series})


# ---------------------------------------------------------------------------------------------------- against workers


def large_and_small(arm: str, workers: int, size: int, rounds: int) -> list[Round]:
    """Let a cluster broadcast a large array and a small one in turn."""
    done: list[Round] = []
    with sites(Spec(workers, with_plugin=arm == "plugin")) as [site]:
        for number in range(-1, rounds):
            seconds = {str(each): site.ask(broadcast, number + 1, each) for each in in_turn(number, [SMALL, size])}
            done += [{"arm": arm, "workers": workers, "seconds": seconds}] if number >= 0 else []
    return done


def sixteen_workers(*, is_quick: bool) -> Measurement:
    """Broadcast to more and more workers.

    One cluster at a time, for sixteen idle workers are no small load; four are measured before sixteen and again after.
    """
    size = 4 * MIB if is_quick else 256 * MIB
    order = [("plugin", 4), ("plugin", 16), ("plugin", 4)]
    if not is_quick:
        order += [("plugin", n) for n in (1, 2, 8)] + [("stock", n) for n in (1, 2, 4)]
    rounds: list[Round] = []
    for arm, count in order:
        rounds += large_and_small(arm, count, size, 2 if is_quick else 11 if count == 16 else 5)
    done: dict[tuple[str, int], list[Round]] = {}
    for one in rounds:
        done.setdefault((one["arm"], one["workers"]), []).append(one["seconds"])
    extra = {count: median(done["plugin", count], lambda one: one[str(size)] - one[str(SMALL)]) for count in (4, 16)}
    what = f"broadcast of {size // MIB} MiB less 8 bytes"
    figures = [
        # Not their ratio: 8 bytes, which are not shared, may take longer than what is.
        Figure(f"{what}, 16 workers, beside 1.3 × the same with 4", 1e3 * extra[16], "ms", 1.3e3 * extra[4]),
        Figure(f"{what}, 4 workers", 1e3 * extra[4], "ms"),
        *(Figure(f"8 bytes, {n} workers", 1e3 * median(done["plugin", n], str(SMALL)), "ms") for n in (4, 16)),
    ]
    series: dict[str, Any] = {"plugin": {}, "stock": {}, "plugin, 8 bytes": {}}
    for (arm, count), ones in sorted(done.items()):
        series[arm][str(count)] = median(ones, str(size))
        if arm == "plugin":
            series["plugin, 8 bytes"][str(count)] = median(ones, str(SMALL))
    return Measurement(rounds, figures, {"by": "workers", "bytes": size, "seconds": series})


# ------------------------------------------------------------------------------------------------------------- hashing


def hashing(site: Site, seed: int, size: int) -> float:
    """Return the seconds of what ``hash=True`` asks for, by itself."""
    x = make(seed, size)
    start = time.perf_counter()
    tokenize(x)
    return time.perf_counter() - start


def hashed(*, is_quick: bool) -> Measurement:
    """Broadcast with and without ``hash=True``, and hash alone, in turn."""
    size = 4 * MIB if is_quick else 256 * MIB
    copy, rounds = WarmCopy(size), []
    orders = {"hash": (broadcast, True), "no hash": (broadcast, False), "hash alone": (hashing,)}
    with sites(Spec()) as [site]:
        for number in range(-1, 2 if is_quick else 9):
            one: Round = {"memcpy": copy.seconds()}
            for name in in_turn(number, list(orders)):
                function, *more = orders[name]
                one[name] = site.ask(function, number + 1, size, *more)
            rounds += [one] if number >= 0 else []
    added = median(rounds, lambda one: one["hash"] - one["no hash"])
    alone = median(rounds, "hash alone")
    what = f"broadcast of {size // MIB} MiB to 4 workers"
    return Measurement(
        rounds,
        [
            # A tenth for the noise of a difference, as for a copy elsewhere in the table.
            Figure(f"{what}: what hash=True adds, over hashing alone", added / alone, "×", 1.1),
            Figure(f"hashing alone ({hashers[0].__name__}), over a memcpy", alone / median(rounds, "memcpy"), "×"),
            Figure(f"{what}, hash=True", 1e3 * median(rounds, "hash"), "ms"),
            Figure(f"{what}, hash=False", 1e3 * median(rounds, "no hash"), "ms"),
            Figure("hashing alone", 1e3 * alone, "ms"),
        ],
    )
