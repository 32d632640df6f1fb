"""Two clusters with the same settings, one with the plugin and one without, which do the same work in turn.

They live at the same time, each in a process of its own, and never work together; who begins alternates. Every piece of
work is done once unmeasured. Each answer of the one must equal the answer of the other, or the run ends with an error.

Memory, where it is watched, is the highest growth in a round, read every 20 ms: of ``Shmem`` of the machine since the
cluster was idle for the first time (freed pages of the arena count as long as they are there; for the cluster without the
plugin, whose pages they are not, ``Shmem`` is read again before each round), of the ``RssAnon`` of the client's and all
workers' processes since before the round was prepared, and of both together. Other programs that use shared memory, the loopback
or the processors meanwhile spoil the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import machine
from dask.utils import format_bytes
from distributed import Client, LocalCluster

from dask_shm_plugin import SharedMemoryPlugin

ARMS = ("stock", "plugin")
EVERY = 0.02

Round = dict[str, float]
Rounds = dict[str, dict[str, list[Round]]]


class Settings(NamedTuple):
    """Of each of the two clusters."""

    workers: int = 4
    memory_limit: str = "2 GiB"
    watch_memory: bool = True


class Work:
    """Something to do with a cluster; subclasses can be pickled and say in their docstring what they stand for."""

    name: str

    def prepare(self, client: Client, seed: int) -> Any:
        """Return what :meth:`do` starts from; this is not measured."""
        return seed

    def do(self, client: Client, prepared: Any) -> Any:
        """Do it, and return an answer that can be compared and must be the same with and without the plugin."""
        raise NotImplementedError


# --------------------------------------------------------------------------------------------------------- one cluster


class Watch:
    """The highest that shared, private memory and their sum have grown by, as a thread sees them."""

    def __init__(self, pids: list[int], base: tuple[int, int]) -> None:
        self._pids, self._base = pids, base
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look_often, daemon=True)
        self.highest = [0, 0, 0]

    def _look(self) -> None:
        growths = machine.shared() - self._base[0], machine.private(self._pids) - self._base[1]
        self.highest = [max(pair) for pair in zip(self.highest, (*growths, sum(growths)), strict=True)]

    def _look_often(self) -> None:
        while not self._is_over.wait(EVERY):
            self._look()

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._look()


class Arm:
    """A cluster, with or without the plugin, that does rounds of work."""

    def __init__(self, client: Client, *, with_plugin: bool, watch_memory: bool) -> None:
        self._client, self._with_plugin, self._watch_memory = client, with_plugin, watch_memory
        self._processes = [os.getpid(), *client.run(os.getpid).values()]
        self._shared = machine.shared()

    def round(self, work: Work, seed: int) -> tuple[Round, Any]:
        """Do a piece of work, and return its figures and its answer."""
        self._settle()
        private = machine.private(self._processes)
        prepared = work.prepare(self._client, seed)
        if not self._with_plugin:
            self._shared = machine.shared()
        figures: Round = {"shared_before": self._shared}
        with contextlib.ExitStack() as stack:
            if self._watch_memory:
                watch = stack.enter_context(Watch(self._processes, (self._shared, private)))
            wire, start = machine.loopback(), time.perf_counter()
            answer = work.do(self._client, prepared)
            figures |= {"seconds": time.perf_counter() - start, "loopback": machine.loopback() - wire}
        if self._watch_memory:
            figures |= dict(zip(("shared", "private", "together"), watch.highest, strict=True))
        return figures, answer

    def _settle(self) -> None:
        """Wait until all workers have forgotten all data."""
        gc.collect()
        deadline = time.monotonic() + 60
        while any(self._client.run(lambda dask_worker: len(dask_worker.data)).values()):
            if time.monotonic() > deadline:
                raise TimeoutError("the workers still hold data")
            time.sleep(0.05)
        self._client.run(gc.collect)


def serve(pipe: Connection, with_plugin: bool, settings: Settings) -> None:
    """Run one cluster and do what the other end of the pipe asks for, until it says None."""
    # distributed logs every shuffle that begins and ends as a warning (2026.8.0, shuffle/_scheduler_plugin.py).
    logging.getLogger("distributed.shuffle").setLevel(logging.ERROR)
    with (
        LocalCluster(
            n_workers=settings.workers,
            threads_per_worker=1,
            memory_limit=settings.memory_limit,
            dashboard_address=":0",
        ) as cluster,
        Client(cluster) as client,
    ):
        if with_plugin:
            client.register_plugin(SharedMemoryPlugin())
        arm = Arm(client, with_plugin=with_plugin, watch_memory=settings.watch_memory)
        pipe.send("ready")
        while (order := pipe.recv()) is not None:
            pipe.send(arm.round(*order))


# --------------------------------------------------------------------------------------------------------------- both


@contextlib.contextmanager
def clusters(settings: Settings, arms: Sequence[str] = ARMS) -> Iterator[dict[str, Connection]]:
    """Start both, or one, and give the pipes through which they take orders."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    try:
        for arm in arms:
            pipes[arm], theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, arm == "plugin", settings))
            process.start()
            theirs.close()
            processes.append(process)
            assert pipes[arm].recv() == "ready"
        yield pipes
    finally:
        for pipe in pipes.values():
            with contextlib.suppress(OSError):  # it has ended by itself, and has said why
                pipe.send(None)
        for process in processes:
            process.join()


def measure(works: Sequence[Work], pairs: int, settings: Settings) -> Rounds:
    """Let both clusters do all works in turn, and return all rounds."""
    rounds: Rounds = {work.name: {arm: [] for arm in ARMS} for work in works}
    with clusters(settings) as pipes:
        for number in range(-1, pairs):
            print(f"pair {number + 1} of {pairs}" if number >= 0 else "once unmeasured", file=sys.stderr)
            for work in works:
                answers = []
                for arm in ARMS if number % 2 else reversed(ARMS):
                    pipes[arm].send((work, number + 1))
                    figures, answer = pipes[arm].recv()
                    answers.append(answer)
                    if number >= 0:
                        rounds[work.name][arm].append(figures)
                if answers[0] != answers[1]:
                    raise SystemExit(f"{work.name}: the plugin changes the result: {str(answers)[:1000]}")
    return rounds


def summary(rounds: Rounds) -> dict[str, dict[str, Any]]:
    """Return the median of every figure, and of how many times faster the plugin was in each pair."""
    result: dict[str, dict[str, Any]] = {}
    for name, arms in rounds.items():
        figures = list(arms["stock"][0])
        result[name] = {arm: {f: statistics.median(one[f] for one in arms[arm]) for f in figures} for arm in ARMS}
        both = zip(arms["stock"], arms["plugin"], strict=True)
        result[name]["times_faster"] = statistics.median(s["seconds"] / p["seconds"] for s, p in both)
    return result


# ------------------------------------------------------------------------------------------------------- command line


def arguments(description: str | None, works: Sequence[str], pairs: int) -> argparse.Namespace:
    """Read what all benchmarks of pairs are asked for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and two pairs: only to see that it works")
    parser.add_argument("--pairs", type=int, help=f"rounds with and without the plugin (default: {pairs})")
    parser.add_argument("--only", nargs="+", choices=works, default=works, help="some of it (default: all)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all rounds there")
    asked = parser.parse_args()
    asked.pairs = asked.pairs or (2 if asked.quick else pairs)
    if asked.pairs < 1:
        parser.error("needs at least one pair")
    return asked


def headline(result: dict[str, Any]) -> str:
    """Return on what and how a result was measured, for people."""
    around = dict(result["surroundings"])
    memory, processors, date = around.pop("memory"), around.pop("processors"), around.pop("date")
    names = ", ".join(f"{name} {version}" for name, version in around.items())
    return f"{result['pairs']} pairs in turn, medians; {processors} processors, {format_bytes(memory)}, {date}\n{names}"


def show(result: dict[str, Any]) -> None:
    """Print times and memory for people."""
    print(headline(result) + "\n")
    print(f"{'':<18}{'time, s':^20}{'faster':>8}{'Shmem, MiB':^20}{'private, MiB':^20}{'together, MiB':^20}")
    print(f"{'':<18}{'stock':>10}{'plugin':>10}{'by':>8}" + f"{'stock':>10}{'plugin':>10}" * 3)
    for name, figures in result["summary"].items():
        stock, plugin = figures["stock"], figures["plugin"]
        print(f"{name:<18}{stock['seconds']:>10.3f}{plugin['seconds']:>10.3f}{figures['times_faster']:>6.2f} ×", end="")
        for kind in ("shared", "private", "together"):
            print(f"{stock[kind] / 2**20:>10.0f}{plugin[kind] / 2**20:>10.0f}", end="")
        print()


def result(
    asked: argparse.Namespace, works: Sequence[Work], settings: Settings, surroundings: dict[str, Any]
) -> dict[str, Any]:
    """Measure as was asked for, and return all rounds with all that is needed to judge them."""
    return {
        "pairs": asked.pairs,
        "sizes": {work.name: vars(work) for work in works},
        "settings": settings._asdict(),
        "surroundings": surroundings,
        "rounds": measure(works, asked.pairs, settings),
    }


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Keep a result, if that is wanted."""
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")


def report(asked: argparse.Namespace, works: Sequence[Work], settings: Settings, surroundings: dict[str, Any]) -> None:
    """Measure times and memory, keep them, and print them."""
    measured = result(asked, works, settings, surroundings)
    measured["summary"] = summary(measured["rounds"])
    write(asked.json, measured)
    show(measured)
