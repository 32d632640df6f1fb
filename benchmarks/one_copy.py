"""How many copies of a large array exist, how many bytes cross a socket, and how long it takes, with and without the plugin.

    python benchmarks/one_copy.py [--quick] [--size "256 MiB"] [--workers 4] [--pairs 5] [--json PATH]

Two clusters with the same settings live at the same time and work in turn; the one that begins alternates. Each round makes
an array of random numbers and moves it in one of two ways:

broadcast
    ``scatter(x, broadcast=True, hash=False)``; then a task on every worker reads one element of every page.
fetch
    A worker makes the array. A task on a second worker fetches it and reads one element of every page; then the same on a
    third worker.

Memory is the growth of ``Shmem`` of the machine and of the ``RssAnon`` of the client and the workers since the cluster was
idle, in multiples of the array. Freed pages of the arena stay warm, so growth counts from the start and not from the round
before. Only for stock Dask, to which those pages do not belong, ``Shmem`` is read again before each round. In a fetch the
first worker's array counts, too: two copies without the plugin, one with it.

Other programs that use shared memory or the loopback meanwhile spoil the figures.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager

import clusters
import machine
import report
from clusters import ARMS, Site, Spec, in_turn
from dask.utils import parse_bytes
from machine import PAGE, make, read_pages
from pairs import Pair, Round, summary

TITLES = {
    "seconds": "time, s",
    "loopback": "over the loopback, × array",
    "shared": "growth of Shmem, × array",
    "private": "growth of RssAnon, × array",
    "seconds_second_reader": "second reader's time, s",
}


class Arm:
    """A cluster, and the memory that it took when it was idle."""

    def __init__(self, site: Site, size: int) -> None:
        self._site, self._size = site, size
        for worker in site.workers:  # imports and connections are not measured
            small = site.put_on(worker, 0, PAGE)
            for reader in site.workers:
                site.read_on(reader, small, read_pages)
        small = site.client.scatter(make(0, PAGE), broadcast=True, hash=False)
        del small
        site.settle()
        self._shared, self._private = machine.shared(), machine.private(site.processes)

    def broadcast(self, seed: int) -> Round:
        """Give an array to all workers."""
        x = make(seed, self._size)
        with self._measured(own=x.nbytes) as figures:
            future = self._site.client.scatter(x, broadcast=True, hash=False)
            results = self._site.read_on_all(future, read_pages)
        assert results == [read_pages(x)] * len(self._site.workers), "wrong values"
        del future, x
        self._site.settle()
        return figures

    def fetch(self, seed: int) -> Round:
        """Let a worker make an array, and two others read it."""
        maker, first, second = self._site.workers[:3]
        future = self._site.put_on(maker, seed, self._size)
        with self._measured() as figures:
            results = [self._site.read_on(first, future, read_pages)]
        start = time.perf_counter()
        results.append(self._site.read_on(second, future, read_pages))
        figures["seconds_second_reader"] = time.perf_counter() - start
        assert results == [read_pages(make(seed, self._size))] * 2, "wrong values"
        del future
        self._site.settle()
        return figures

    @contextmanager
    def _measured(self, own: int = 0) -> Iterator[Round]:
        """Measure the code inside; ``own`` bytes of private memory were there before."""
        figures: Round = {}
        if not self._site.with_plugin:
            self._shared = machine.shared()
        wire, start = machine.loopback(), time.perf_counter()
        yield figures
        figures["seconds"] = time.perf_counter() - start
        figures["loopback"] = (machine.loopback() - wire) / self._size
        private = machine.private(self._site.processes)
        figures["shared"] = (machine.shared() - self._shared) / self._size
        figures["private"] = (private - self._private - own) / self._size


WAYS = {"broadcast": Arm.broadcast, "fetch": Arm.fetch}


@contextmanager
def arm(spec: Spec, size: int) -> Iterator[Arm]:
    """Start a cluster."""
    with clusters.site(spec) as site:
        yield Arm(site, size)


def main() -> None:
    """Read the arguments, measure, print."""
    parser = report.parser(__doc__, pairs=5)
    parser.add_argument("--size", type=parse_bytes, help="of the array (default: 256 MiB)")
    parser.add_argument("--workers", type=int, default=4, help="of each cluster (default: 4)")
    asked = parser.parse_args()
    size = asked.size or ("16 MiB" if asked.quick else "256 MiB")
    size, pairs = parse_bytes(size), asked.pairs or (2 if asked.quick else 5)
    if asked.workers < 3 or pairs < 1 or size < PAGE:
        parser.error("needs at least three workers, one pair, and one page")
    result = report.head(asked, "distributed", "numpy", size=size, workers=asked.workers, pairs=pairs, summary={})
    rounds: dict[str, list[Pair]] = {way: [] for way in WAYS}
    with clusters.arms(Spec(workers=asked.workers, memory_limit="auto"), arm, size) as remotes:
        for number, way in itertools.product(range(pairs), WAYS):
            rounds[way].append({name: remotes[name].ask(WAYS[way], number) for name in in_turn(number, ARMS)})
    for way, done in rounds.items():
        result["summary"][way] = {**summary(done), "first_seconds": {arm: done[0][arm]["seconds"] for arm in ARMS}}
    report.write(asked.json, result)
    rows = []
    for way, one in result["summary"].items():
        for name in one["stock"]:
            rows.append([f"{way}: {TITLES[name]}", *(f"{one[arm][name]['median']:.3f}" for arm in ARMS)])
        rows.append([f"{way}: the very first time, s", *(f"{one['first_seconds'][arm]:.3f}" for arm in ARMS)])
        rows.append([f"{way}: times faster", "", f"{one['times_faster']['median']:.1f}"])
    report.table(["", *ARMS], rows)


if __name__ == "__main__":
    main()
