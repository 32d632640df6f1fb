"""A worker fetches a value that another one has made, and reads one element: published before or not, its owner busy or not."""

from __future__ import annotations

import ctypes
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from broadcasts import SMALL, order, read_one
from clusters import Site, Spec, site, take_turns
from distributed import Future
from machine import MIB, WarmCopy, make
from remote import remote
from report import figure, spread

HELD = 1.0
SPEC = Spec(workers=3, memory_limit="4 GiB")


def fetch(site: Site, future: Future, expected: int) -> float:
    """Return the time until the third worker has read a value that another worker has."""
    start = time.perf_counter()
    result = site.read_on(site.workers[2], future, read_one)
    seconds = time.perf_counter() - start
    assert result == expected, "wrong value"
    return seconds


def fetch_unpublished(site: Site, seed: int, size: int) -> float:
    """Fetch a value that no other worker has asked for."""
    future, expected = made(site, seed, size)
    seconds = fetch(site, future, expected)
    del future
    site.settle(blocks_too=True)
    return seconds


def fetch_published(site: Site, seed: int, size: int) -> tuple[float, int]:
    """Fetch a value that was published for another worker, and tell whether it was found without asking the owner."""
    future, expected = publish(site, seed, size)
    before = site.shared()
    seconds = fetch(site, future, expected)
    after = site.shared()
    attached, found = (after[name]["count"] - before[name]["count"] for name in ("attached", "found"))
    assert attached == (size >= MIB), "it came another way"
    del future
    site.settle(blocks_too=True)
    return seconds, found


def fetch_from_busy_owner(site: Site, seed: int, size: int) -> tuple[float, bool]:
    """Fetch a published value while its owner keeps the interpreter's lock, and tell whether it still did afterwards."""
    future, expected = publish(site, seed, size)
    with tempfile.TemporaryDirectory() as folder:
        flag = Path(folder, "held")
        holding = site.client.submit(hold_the_lock, str(flag), workers=[site.workers[0]], pure=False)
        site.wait_until(flag.exists, "the lock is held")
        seconds = fetch(site, future, expected)
        end = time.monotonic()
        was_held = end < holding.result()
    del future, holding
    site.settle(blocks_too=True)
    return seconds, was_held


def made(site: Site, seed: int, size: int) -> tuple[Future, int]:
    """Let the first worker make a value; return it, and the bits of one element."""
    return site.put_on(site.workers[0], seed, size), read_one(make(seed, size))


def publish(site: Site, seed: int, size: int) -> tuple[Future, int]:
    """Let the first worker make a value, and the second read and forget it: a large value is then published."""
    future, expected = made(site, seed, size)
    before = site.shared()["published"]["count"]
    site.read_on(site.workers[1], future, read_one)
    if size >= MIB:
        site.wait_until(lambda: site.shared()["published"]["count"] == before + 1, "the value is published")
    # The fetch that is measured must find one worker to ask, the owner.
    leave_to(site, site.workers[0], future)
    return future, expected


def leave_to(site: Site, owner: str, future: Future) -> None:
    """Let all workers but one forget a value."""

    def forget(dask_scheduler: Any) -> None:
        others = [worker.address for worker in dask_scheduler.tasks[future.key].who_has]
        for other in set(others) - {owner}:
            dask_scheduler.request_remove_replicas(other, [future.key], stimulus_id="targets")

    def holders() -> set[str]:
        kept = site.client.run(lambda key, dask_worker: key in dask_worker.data, future.key)
        return {worker for worker, is_kept in kept.items() if is_kept}

    site.client.run_on_scheduler(forget)
    site.wait_until(lambda: list(site.client.who_has(future)[future.key]) == [owner], "the others have forgotten it")
    site.wait_until(lambda: holders() == {owner}, "the others have given it back")


@functools.cache
def libc() -> Any:
    """Return the C library, whose functions keep the interpreter's lock when they are called."""
    return ctypes.PyDLL(None)


def hold_the_lock(flag: str) -> float:
    """Keep the interpreter's lock for a second without a break, and return the time when that was over."""
    usleep = libc().usleep
    Path(flag).touch()
    usleep(int(HELD * 1e6))
    return time.monotonic()


def mib(size: int) -> str:
    """Return a size for people."""
    return f"{size} bytes" if size < 1024 else f"{size / MIB:g} MiB"


def published(*, is_quick: bool) -> dict[str, Any]:
    """Fetch published values of all sizes in turn."""
    sizes = [SMALL, *(n * MIB for n in ((1, 4) if is_quick else (1, 16, 256, 1024)))]
    with remote(site, SPEC) as cluster:
        done = take_turns(2 if is_quick else 9, {size: order(cluster, fetch_published, size) for size in sizes})
    seconds = {size: results[:, 0] for size, results in done.items()}
    found = np.mean([done[size][:, 1] for size in sizes[1:]], axis=0)
    over, what = np.median(seconds[SMALL]), "fetch of {}, published".format
    figures = [
        *(figure(f"{what(mib(size))}, over 8 bytes", seconds[size] / over, "×", 1.3) for size in sizes[1:]),
        *(figure(what(mib(size)), seconds[size], "ms", factor=1e3) for size in sizes),
        figure("of them found without asking the owner", found, "%", factor=100),
    ]
    series = {"published": {str(size): spread(seconds[size]) for size in sizes}}
    return {"figures": figures, "series": {"by": "bytes", "seconds": series}}


def busy_owner(*, is_quick: bool) -> dict[str, Any]:
    """Fetch published values whose owner is busy, and whose owner is not, in turn."""
    size = 4 * MIB if is_quick else 256 * MIB
    ways = {"idle": fetch_published, "busy": fetch_from_busy_owner}
    with remote(site, SPEC) as cluster:
        done = take_turns(2 if is_quick else 9, {name: order(cluster, way, size) for name, way in ways.items()})
    (idle, _), (busy, was_held) = (done[name].T for name in ways)
    what = f"fetch of {mib(size)}, published"
    slower = float(np.median(busy) / np.median(idle))
    figures = [
        # The target is "unchanged", within the noise of the same fetch.
        figure(f"{what}, while its owner keeps the lock for 1 s, over idle", slower, "×", 1.3),
        figure(f"{what}, its owner busy", busy, "ms", factor=1e3),
        figure(f"{what}, its owner idle", idle, "ms", factor=1e3),
        figure("fetches that were over while the owner was still busy", was_held.mean(), "%", factor=100),
    ]
    return {"figures": figures}


def first(*, is_quick: bool) -> dict[str, Any]:
    """Fetch values that have not been published, and 8 bytes, and copy, in turn."""
    size = 4 * MIB if is_quick else 256 * MIB
    copy = {"memcpy": WarmCopy(size).seconds}
    with remote(site, SPEC) as cluster:
        orders = {each: order(cluster, fetch_unpublished, each) for each in (SMALL, size)}
        seconds = take_turns(2 if is_quick else 9, orders, copy)
    extra = (seconds[size] - seconds[SMALL]) / seconds["memcpy"]
    figures = [
        figure(f"first fetch of {mib(size)}, less 8 bytes, over a memcpy", extra, "×", 1.5),
        figure(f"first fetch of {mib(size)}", seconds[size], "ms", factor=1e3),
        figure("fetch of 8 bytes", seconds[SMALL], "ms", factor=1e3),
        figure(f"memcpy of {mib(size)}", seconds["memcpy"], "ms", factor=1e3),
    ]
    return {"figures": figures}
