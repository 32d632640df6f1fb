"""Measure arrays that are allocated in the arena, beside stock Dask and the plugin with ``shm.born: off``.

NumPy alone: expressions on arrays of several sizes, in the environment that Dask's nanny gives to its workers
(``MALLOC_TRIM_THRESHOLD_``), with NumPy's own allocator and with the arena's. Time is that of the processor.

Clusters of two workers: the first fetch of a new array by the other worker, which reads nothing, or one element of every
page; and a chain of operations on a Dask array of chunks of 8 MiB. All work in turn. Time is that of the wall and of the
workers' processor.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import clusters
import machine
import numpy as np
import report
from clusters import Site, Spec, take_turns
from machine import MIB
from remote import Remote, remote

SIZES_KIB = (160, 256, 512, 800, 2048, 16384)
FETCHES_MIB = (1, 8, 64, 256, 1024)
ARMS: dict[str, Spec] = {
    "stock": Spec(with_plugin=False, workers=2, memory_limit="8 GiB"),
    "off": Spec(workers=2, memory_limit="8 GiB", capacity="10 GiB", born="off"),
    "born": Spec(workers=2, memory_limit="8 GiB", capacity="10 GiB", born="on"),
}
Used = tuple[float, float, float]
"""Seconds of the wall and of the processor, and the number of page faults."""


# -- NumPy alone


@contextlib.contextmanager
def lonely() -> Iterator[None]:
    """Be the only member of an arena, in a process with the environment of a worker."""
    from dask_shm_plugin.arena.arena import Arena
    from dask_shm_plugin.births import switch

    arena = Arena.create(4 << 30, warm=4)
    reason = switch.switch_on(arena, None, 4)
    if reason:
        raise RuntimeError(reason)
    yield
    switch.switch_off(arena)


def expression(_: None, is_born: bool, size: int, seconds: float) -> tuple[float, float]:
    """Return the processor's seconds and the page faults of one ``sqrt(a * a + c)``."""
    from dask_shm_plugin.births import switch

    a, c = np.ones(size // 8), np.ones(size // 8)

    def run() -> tuple[float, float]:
        if is_born:
            switch.allocate_here()
        for _ in range(20):  # the chunks are added meanwhile
            np.sqrt(a * a + c)
            time.sleep(0.001)
        faults, cpu, count = _faults(), time.process_time(), 0
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            np.sqrt(a * a + c)
            count += 1
        return (time.process_time() - cpu) / count, (_faults() - faults) / count

    return contextvars.copy_context().run(run)


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def numpy_alone(rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return the figures of NumPy alone."""
    os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    figures = []
    with remote(lonely) as other:
        for size in SIZES_KIB:
            orders: dict[str, Callable[[int], Any]] = {
                name: lambda _, is_born=name == "born", size=size: other.ask(expression, is_born, size << 10, seconds)
                for name in ("stock", "born")
            }
            took = take_turns(rounds, orders)
            what = f"sqrt(a*a+c), {size} KiB"
            figures += [
                report.figure(f"{what}: stock", took["stock"][:, 0], "µs", factor=1e6),
                report.figure(f"{what}: born", took["born"][:, 0], "µs", factor=1e6),
                report.figure(f"{what}: stock ÷ born", took["stock"][:, 0] / took["born"][:, 0], "×"),
                report.figure(f"{what}: page faults, stock", took["stock"][:, 1], ""),
                report.figure(f"{what}: page faults, born", took["born"][:, 1], ""),
            ]
    return figures


# -- clusters


def fetch(site: Site, number: int, size: int, read: Callable[[Any], Any] = machine.read_pages) -> Used:
    """Let one worker make an array and the other fetch and read it; the first array of a size is not born."""
    a, b = site.workers
    for before in range(2):
        site.put_on(a, number + 2000 + 1000 * before, size)
        time.sleep(0.2)
    future = site.put_on(a, number + 1000, size)
    return _used(site, lambda: site.read_on(b, future, read))


def chain(site: Site, number: int, size: int) -> Used:
    """Compute a chain of operations on a Dask array."""
    import dask.array as da

    side = int((size / 8) ** 0.5) // 1024 * 1024
    x = da.random.default_rng(number + 1000).random((side, side), chunks=(1024, 1024))
    y = (da.sqrt(x * x + 1) + x.T).sum(axis=0)
    return _used(site, lambda: site.client.compute(y).result())


def settled(site: Site, do: Callable[..., Used], number: int, size: int) -> Used:
    """Do a piece of work, and wait until its values are released."""
    used = do(site, number, size)
    site.settle()
    return used


def _used(site: Site, do: Callable[[], Any]) -> Used:
    before, start = _workers_use(site), time.perf_counter()
    do()
    wall, after = time.perf_counter() - start, _workers_use(site)
    return wall, after[0] - before[0], after[1] - before[1]


def _workers_use(site: Site) -> tuple[float, float]:
    used = site.client.run(_use).values()
    return sum(cpu for cpu, _ in used), sum(faults for _, faults in used)


def _use() -> tuple[float, float]:
    return time.process_time(), _faults()


def with_clusters(rounds: int, fetches: tuple[int, ...], chained: int) -> list[dict[str, Any]]:
    """Return the figures of the clusters."""
    figures = []
    with contextlib.ExitStack() as stack:
        sites: dict[str, Remote] = {
            name: stack.enter_context(remote(clusters.site, spec)) for name, spec in ARMS.items()
        }
        fetch_only = functools.partial(fetch, read=len)
        works: list[tuple[str, Callable[..., Used], int]] = [("first fetch, 8 bytes", fetch_only, 8)]
        works += [(f"first fetch, {size} MiB", fetch_only, size * MIB) for size in fetches]
        works += [(f"first fetch and reading, {size} MiB", fetch, size * MIB) for size in fetches]
        works.append((f"chain of operations, {chained} MiB", chain, chained * MIB))
        for what, do, size in works:
            took = take_turns(
                rounds,
                {name: lambda n, s=site, do=do, size=size: s.ask(settled, do, n, size) for name, site in sites.items()},
            )
            for name, used in took.items():
                figures.append(report.figure(f"{what}: {name}", used[:, 0], "ms", factor=1e3))
                figures.append(report.figure(f"{what}: processor, {name}", used[:, 1], "ms", factor=1e3))
                figures.append(report.figure(f"{what}: page faults, {name}", used[:, 2], ""))
            for other in ("stock", "off"):
                figures.append(report.figure(f"{what}: {other} ÷ born", took[other][:, 0] / took["born"][:, 0], "×"))
    return figures


def main() -> None:
    """Measure, print, and write."""
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, help="rounds of each measurement (default: 15)")
    asked = parser.parse_args()
    head = report.head(asked, "numpy", "distributed")
    rounds = asked.rounds or (3 if asked.quick else 15)
    figures = numpy_alone(rounds, 0.02 if asked.quick else 0.1)
    report.show_figures(figures)
    more = with_clusters(rounds, FETCHES_MIB[:2] if asked.quick else FETCHES_MIB, 64 if asked.quick else 512)
    report.show_figures(more)
    report.write(asked.json, head | {"figures": figures + more})


if __name__ == "__main__":
    main()
