"""Pieces of work that two clusters, with and without the plugin, do in turn.

The clusters live at the same time and never work together; the one that begins alternates. Every piece of work is done
once unmeasured. Both must give the same answer, or the run ends with an error.

Memory, where it is watched, is the highest growth in a round, read every 20 ms: of ``Shmem`` of the machine since the
cluster was idle for the first time (freed pages of the arena count as long as they exist; for stock Dask, to which they do
not belong, ``Shmem`` is read again before each round), of the ``RssAnon`` of the client and all workers since before the
round was prepared, and of both together. Other programs that use shared memory or the processors meanwhile spoil the
figures.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import clusters
import machine
import report
from clusters import ARMS, Site, Spec, in_turn
from distributed import Client

EVERY = 0.02
KINDS = ("shared", "private", "together")
SPEC = Spec(has_amm=True)

Round = dict[str, float]
Pair = dict[str, Round]
"""What each of the clusters took for the same piece of work."""


def keep(client: Client, seed: int, **sizes: Any) -> tuple[Any, ...]:
    """Prepare nothing: return the seed and the sizes."""
    return seed, *sizes.values()


class Work(NamedTuple):
    """Something to do with a cluster.

    ``prepare(client, seed, **sizes)``, which is not measured, returns the input of ``do(client, prepared)``. That returns an
    answer that can be compared, and that must be the same with and without the plugin.
    """

    name: str
    do: Callable[[Client, Any], Any]
    prepare: Callable[..., Any]
    sizes: dict[str, Any]


def work(
    name: str, do: Callable[[Client, Any], Any], prepare: Callable[..., Any] = keep, **sizes: tuple[Any, Any]
) -> tuple[Work, Work]:
    """Return a work of the usual size and a quick one, from the two values of each size."""
    usual, quick = ({key: value[which] for key, value in sizes.items()} for which in (0, 1))
    return Work(name, do, prepare, usual), Work(name, do, prepare, quick)


Works = Sequence[tuple[Work, Work]]


class Arm:
    """A cluster that does rounds of work, and the shared memory of the machine when it was idle."""

    def __init__(self, site: Site, watches_memory: bool) -> None:
        self._site, self._watches_memory = site, watches_memory
        self.shared = machine.shared()

    def processor_time(self) -> float:
        """Return the processor time that the workers have taken so far, in seconds."""
        return self._site.processor_time()

    def round(self, work: Work, seed: int) -> tuple[Round, Any]:
        """Do a piece of work, and return its figures and its answer."""
        self._site.settle()
        private = machine.private(self._site.processes)
        prepared = work.prepare(self._site.client, seed, **work.sizes)
        if not self._site.with_plugin:
            self.shared = machine.shared()
        pids, watch = self._site.processes, None
        if self._watches_memory:
            watch = machine.Watch(lambda: (machine.shared() - self.shared, machine.private(pids) - private), EVERY)
        start = time.perf_counter()
        answer = work.do(self._site.client, prepared)
        figures: Round = {"seconds": time.perf_counter() - start}
        if watch:
            growths = watch.stop()[:, 1:]
            most = [*growths.max(axis=0), growths.sum(axis=1).max()]
            figures |= {kind: max(0, int(growth)) for kind, growth in zip(KINDS, most, strict=True)}
        return figures, answer


@contextlib.contextmanager
def arm(spec: Spec, watches_memory: bool = True) -> Iterator[Arm]:
    """Start a cluster."""
    with clusters.site(spec) as site:
        yield Arm(site, watches_memory)


def arguments(description: str | None, works: Works, pairs: int) -> tuple[argparse.Namespace, list[Work]]:
    """Read the arguments, and return them and the chosen works at the chosen sizes."""
    parser = report.parser(description, [usual.name for usual, _ in works], pairs)
    asked = parser.parse_args()
    asked.pairs = asked.pairs or (2 if asked.quick else pairs)
    if asked.pairs < 1:
        parser.error("needs at least one pair")
    return asked, [quick if asked.quick else usual for usual, quick in works if usual.name in asked.only]


def both(
    number: int, work: Work, ask: Callable[[str, Work, int], tuple[Round, Any]], arms: Sequence[str] = ARMS
) -> Pair:
    """Let all arms do a piece of work in turn; end with an error if their answers differ."""
    done = {arm: ask(arm, work, number + 1) for arm in in_turn(number, arms)}
    answers = [answer for _, answer in done.values()]
    if any(answer != answers[0] for answer in answers):
        raise SystemExit(f"{work.name}: the plugin changes the result: {str(answers)[:1000]}")
    return {arm: done[arm][0] for arm in arms}


def measure(works: Sequence[Work], pairs: int, *, watches_memory: bool = True) -> dict[str, list[Pair]]:
    """Let two clusters do all works in turn, and return all pairs of each work."""
    done: dict[str, list[Pair]] = {work.name: [] for work in works}
    with clusters.arms(SPEC, arm, watches_memory) as remotes:
        for number in range(-1, pairs):
            print(f"pair {number + 1} of {pairs}" if number >= 0 else "once unmeasured", file=sys.stderr)
            for work in works:
                one = both(number, work, lambda name, *order: remotes[name].ask(Arm.round, *order))
                done[work.name] += [one] if number >= 0 else []
    return done


def medians(pairs: list[Pair]) -> dict[str, dict[str, report.Spread]]:
    """Return the median and the spread of every figure of each arm."""
    return {arm: {f: report.spread(one[arm][f] for one in pairs) for f in pairs[0][arm]} for arm in pairs[0]}


def ratios(pairs: list[Pair], over: str, under: str, figure: str = "seconds") -> list[float]:
    """Return one arm's figure over the other's, within each pair."""
    return [one[over][figure] / one[under][figure] for one in pairs]


def summary(pairs: list[Pair]) -> dict[str, Any]:
    """Return the medians of a work, and how many times faster the plugin was in each pair."""
    return {**medians(pairs), "times_faster": report.spread(ratios(pairs, *ARMS))}


def run(description: str | None, works: Works, pairs: int, *packages: str) -> None:
    """Read the arguments, measure times and memory, write and print them."""
    asked, chosen = arguments(description, works, pairs)
    sizes = {work.name: work.sizes for work in chosen}
    settings = {"workers": SPEC.workers, "memory_limit": SPEC.memory_limit}
    result = report.head(asked, *packages, pairs=asked.pairs, settings=settings, sizes=sizes)
    result["summary"] = {name: summary(done) for name, done in measure(chosen, asked.pairs).items()}
    report.write(asked.json, result)
    rows = []
    for name, one in result["summary"].items():
        times = [f"{one[arm]['seconds']['median']:.3f}" for arm in ARMS]
        memory = [report.mib(one[arm][kind]["median"]) for kind in KINDS for arm in ARMS]
        rows.append([name, *times, f"{one['times_faster']['median']:.2f} ×", *memory])
    memory = [f"{arm} {kind}" for kind in KINDS for arm in ARMS]
    report.table(["medians, in s and MiB", *ARMS, "faster by", *memory], rows)
