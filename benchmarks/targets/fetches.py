"""A worker fetches what another one has made, and reads one element: published before or not, its owner busy or not."""

from __future__ import annotations

import ctypes
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

from broadcasts import SMALL, in_turn, read_one
from distributed import Future
from machine import WarmCopy, make
from report import MIB, Figure, Measurement, Round, median
from sites import Site, Spec, sites

HELD = 1.0
SPEC = Spec(workers=3, memory_limit="4 GiB")


def fetch(site: Site, future: Future, expected: int) -> float:
    """Return how long the third worker takes to read a value that it has not."""
    start = time.perf_counter()
    result = site.read_on(site.workers[2], future, read_one)
    seconds = time.perf_counter() - start
    assert result == expected, "wrong value"
    return seconds


def made(site: Site, seed: int, size: int) -> tuple[Future, int]:
    """Let the first worker make a value; return it, and what reading one element of it gives."""
    return site.put_on(site.workers[0], seed, size), read_one(make(seed, size))


def publish(site: Site, future: Future, size: int) -> None:
    """Let the second worker read a value and forget it: it is published then, if it is large enough."""
    before = site.shared()["published"]["count"]
    site.read_on(site.workers[1], future, read_one)
    if size >= MIB:
        site.wait_until(lambda: site.shared()["published"]["count"] == before + 1, "the value is published")
    # The fetch that is measured shall find one worker to ask, its owner.
    site.leave_to(site.workers[0], future)


def fetch_unpublished(site: Site, seed: int, size: int) -> Round:
    """Fetch a value that nobody has asked for before."""
    future, expected = made(site, seed, size)
    seconds = fetch(site, future, expected)
    del future
    site.settle()
    return {"seconds": seconds}


def fetch_published(site: Site, seed: int, size: int) -> Round:
    """Fetch a value that was published for somebody else."""
    future, expected = made(site, seed, size)
    publish(site, future, size)
    before = site.shared()
    seconds = fetch(site, future, expected)
    after = site.shared()
    assert after["attached"]["count"] - before["attached"]["count"] == (size >= MIB), "it came another way"
    # Whether the owner had to be asked.
    found = after["found"]["count"] - before["found"]["count"]
    del future
    site.settle()
    return {"seconds": seconds, "found": found}


@functools.cache
def libc() -> Any:
    """Return the C library, whose functions keep the interpreter's lock when they are called."""
    return ctypes.PyDLL(None)


def hold_the_lock(flag: str) -> float:
    """Keep the interpreter's lock for a second without a break, and return when that was over."""
    usleep = libc().usleep
    Path(flag).touch()
    usleep(int(HELD * 1e6))
    return time.monotonic()


def fetch_from_busy_owner(site: Site, seed: int, size: int) -> Round:
    """Fetch a published value while its owner keeps the interpreter's lock."""
    future, expected = made(site, seed, size)
    publish(site, future, size)
    with tempfile.TemporaryDirectory() as folder:
        flag = Path(folder, "held")
        holding = site.client.submit(hold_the_lock, str(flag), workers=[site.workers[0]], pure=False)
        site.wait_until(flag.exists, "the lock is held")
        seconds = fetch(site, future, expected)
        end = time.monotonic()
        was_held = end < holding.result()
    del future, holding
    site.settle()
    return {"seconds": seconds, "owner_was_still_busy": was_held}


def name_of(size: int) -> str:
    """Return a size for people."""
    return f"{size} bytes" if size < 1024 else f"{size / MIB:g} MiB"


def published(*, is_quick: bool) -> Measurement:
    """Fetch published values of all sizes in turn."""
    sizes = [SMALL, *(n * MIB for n in ((1, 4) if is_quick else (1, 16, 256, 1024)))]
    rounds: list[Round] = []
    with sites(SPEC) as [site]:
        for number in range(-1, 2 if is_quick else 9):
            one = {str(size): site.ask(fetch_published, number + 1, size) for size in in_turn(number, sizes)}
            rounds += [one] if number >= 0 else []
    medians = {size: median(rounds, lambda one, size=size: one[str(size)]["seconds"]) for size in sizes}
    share = median(rounds, lambda one: sum(one[str(size)]["found"] for size in sizes[1:]) / len(sizes[1:]))
    figures = [
        *(
            Figure(f"fetch of {name_of(size)}, published, over 8 bytes", medians[size] / medians[SMALL], "×", 1.3)
            for size in sizes[1:]
        ),
        *(Figure(f"fetch of {name_of(size)}, published", 1e3 * medians[size], "ms") for size in sizes),
        Figure("of them found without asking the owner", 100 * share, "%"),
    ]
    return Measurement(rounds, figures, {"by": "bytes", "seconds": {"published": _by_size(medians)}})


def _by_size(medians: dict[int, float]) -> dict[str, float]:
    return {str(size): seconds for size, seconds in medians.items()}


def busy_owner(*, is_quick: bool) -> Measurement:
    """Fetch published values whose owner is busy, and whose owner is not, in turn."""
    size = 4 * MIB if is_quick else 256 * MIB
    orders = {"idle": fetch_published, "busy": fetch_from_busy_owner}
    rounds: list[Round] = []
    with sites(SPEC) as [site]:
        for number in range(-1, 2 if is_quick else 9):
            one = {name: site.ask(orders[name], number + 1, size) for name in in_turn(number, list(orders))}
            rounds += [one] if number >= 0 else []
    seconds = {name: median(rounds, lambda one, name=name: one[name]["seconds"]) for name in orders}
    in_time = sum(one["busy"]["owner_was_still_busy"] for one in rounds) / len(rounds)
    what = f"fetch of {name_of(size)}, published"
    return Measurement(
        rounds,
        [
            # "Unchanged", within what the same fetch may differ by.
            Figure(
                f"{what}, while its owner keeps the lock for 1 s, over idle",
                seconds["busy"] / seconds["idle"],
                "×",
                1.3,
            ),
            Figure(f"{what}, its owner busy", 1e3 * seconds["busy"], "ms"),
            Figure(f"{what}, its owner idle", 1e3 * seconds["idle"], "ms"),
            Figure("fetches that were over while the owner was still busy", 100 * in_time, "%"),
        ],
    )


def first(*, is_quick: bool) -> Measurement:
    """Fetch values that have not been published, and 8 bytes, and copy, in turn."""
    size = 4 * MIB if is_quick else 256 * MIB
    copy, rounds = WarmCopy(size), []
    with sites(SPEC) as [site]:
        for number in range(-1, 2 if is_quick else 9):
            one: Round = {"memcpy": copy.seconds()}
            for each in in_turn(number, [SMALL, size]):
                one[str(each)] = site.ask(fetch_unpublished, number + 1, each)["seconds"]
            rounds += [one] if number >= 0 else []
    extra = median(rounds, lambda one: (one[str(size)] - one[str(SMALL)]) / one["memcpy"])
    return Measurement(
        rounds,
        [
            Figure(f"first fetch of {name_of(size)}, less 8 bytes, over a memcpy", extra, "×", 1.5),
            Figure(f"first fetch of {name_of(size)}", 1e3 * median(rounds, str(size)), "ms"),
            Figure("fetch of 8 bytes", 1e3 * median(rounds, str(SMALL)), "ms"),
            Figure(f"memcpy of {name_of(size)}", 1e3 * median(rounds, "memcpy"), "ms"),
        ],
    )
