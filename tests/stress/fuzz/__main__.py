"""Damage handles, whereabouts, rendezvous and tables at random; each must be refused or lead to the right bytes.

    python tests/stress/fuzz [--inputs 1000000] [--seed 0] [--seconds N] [--jobs 1] [--target table] [--json]

After each input, there must be a documented exception or the right bytes, and no existing view may have changed, in
this process or in another member. Inputs run in forked children, so that a crash or a hang ends one batch only. It is
reported with the number of its batch: ``--target T --seed S --batch B`` runs that batch again. At the end of a batch,
no descriptors, mappings or names may be left.

The exit status is 1 if there were findings.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import logging
import mmap
import os
import pickle
import random
import resource
import select
import signal
import sys
import time
import traceback
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

from fuzz_targets import TARGETS, count_resources

from dask_shm_plugin.linux import segment
from dask_shm_plugin.node import rendezvous

#: The number of inputs in a batch, and the number of batches in a hundred that attack each target.
BATCH = 500
SHARES = {"handles": 72, "whereabouts": 18, "rendezvous": 5, "table": 5}
BATCH_TIMEOUT_S = 120


class Batch(NamedTuple):
    """A series of inputs, which these four fields determine."""

    target: str
    seed: int
    number: int
    inputs: int


class Child(NamedTuple):
    """A child process that runs a batch."""

    batch: Batch
    pid: int
    reading: int
    progress: mmap.mmap
    deadline: float


def batches(asked: argparse.Namespace) -> Any:
    """Yield the batches of the run, with targets in turn according to their shares."""
    if asked.batch is not None:
        yield Batch(asked.target, asked.seed, asked.batch, BATCH)
        return
    turn = [target for target, share in SHARES.items() if asked.target in (None, target) for _ in range(share)]
    random.Random(asked.seed).shuffle(turn)
    left = asked.inputs
    for number in count():
        if left <= 0:
            return
        yield Batch(turn[number % len(turn)], asked.seed, number, min(BATCH, left))
        left -= BATCH


def prefix() -> str:
    """Return the prefix of all names of this run."""
    return f"dask-shm-{os.getuid()}-fuzz{os.getpid()}-"


def start_child(batch: Batch, names: str) -> Child:
    """Start a child process that runs a batch."""
    reading, writing = os.pipe()
    progress = mmap.mmap(-1, 8)
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.setpgid(0, 0)
        segment.NAME_PREFIX = rendezvous.NAME_PREFIX = f"{names}{batch.number}-"
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.umask(0o077)
        logging.disable()
        with suppress(BrokenPipeError), open(writing, "wb") as file:
            pickle.dump(run_batch(batch, progress), file)
        os._exit(0)
    os.close(writing)
    with suppress(OSError):
        os.setpgid(pid, pid)
    return Child(batch, pid, reading, progress, time.monotonic() + BATCH_TIMEOUT_S)


def run_batch(batch: Batch, progress: mmap.mmap) -> tuple[collections.Counter[str], str | None]:
    """Run a batch in a child process; return the counts of outcomes, and the finding if there is one."""
    came: collections.Counter[str] = collections.Counter()
    attack = TARGETS[batch.target](random.Random(f"{batch.target} {batch.seed} {batch.number}"))
    try:
        came[next(attack)] += 1
        before = count_resources()
        for done, outcome in enumerate(islice(attack, batch.inputs - 1), 1):
            progress[:8] = done.to_bytes(8, "little")
            came[outcome] += 1
        # The numbers of descriptors and mappings vary a little. A leak makes them grow with every input.
        for what, now, then in zip(("descriptors", "mappings"), count_resources(), before, strict=True):
            if now - then > batch.inputs // 8 + 40:
                return came, f"{now - then} {what} more than at the beginning"
        attack.close()
    except BaseException:
        return came, traceback.format_exc()
    return came, None


def collect_result(child: Child) -> tuple[collections.Counter[str], str | None]:
    """Return the result of a child process. For one that has died, return its progress and its signal."""
    with open(child.reading, "rb") as file:
        said = file.read()
    _, status = os.waitpid(child.pid, 0)
    # End the peers of a child that has died.
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    if said and not status:
        return pickle.loads(said)
    came = int.from_bytes(child.progress[:8], "little")
    return collections.Counter({"?": came}), f"died at input {came} of signal {os.WTERMSIG(status)}"


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Run all batches; return the report."""
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    findings: list[dict[str, Any]] = []
    running: list[Child] = []
    # Garbage collections then skip existing objects, such as the modules of Dask.
    gc.collect()
    gc.freeze()
    todo, names, start = batches(asked), prefix(), time.monotonic()
    while True:
        is_late = asked.seconds is not None and time.monotonic() - start > asked.seconds
        while not is_late and len(running) < asked.jobs and (batch := next(todo, None)) is not None:
            running.append(start_child(batch, names))
        if not running:
            break
        ready, _, _ = select.select([child.reading for child in running], [], [], 1)
        for child in list(running):
            is_hanging = child.reading not in ready and time.monotonic() > child.deadline
            if is_hanging:
                os.killpg(child.pid, signal.SIGKILL)
            if is_hanging or child.reading in ready:
                running.remove(child)
                came, wrong = collect_result(child)
                outcomes[child.batch.target].update(came)
                left = list(Path("/dev/shm").glob(f"*{names}{child.batch.number}-*"))
                wrong = "hangs" if is_hanging else wrong
                for path in left:
                    remove(path)
                if wrong:
                    findings.append({**child.batch._asdict(), "what": wrong})
                    print(json.dumps(findings[-1]), file=sys.stderr, flush=True)
        if sys.stderr.isatty():
            print(f"\r{sum(c.total() for c in outcomes.values())} inputs", collect_result="", file=sys.stderr)
    return {
        "seed": asked.seed,
        "inputs": {target: came.total() for target, came in outcomes.items()},
        "total": sum(came.total() for came in outcomes.values()),
        "outcomes": {target: dict(came.most_common()) for target, came in outcomes.items()},
        "findings": findings,
        "seconds": round(time.monotonic() - start, 1),
    }


def remove(path: Path) -> None:
    """Remove a name that a killed child has left, or that an attack has made."""
    if path.is_dir() and not path.is_symlink():
        for entry in path.iterdir():
            entry.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def main() -> int:
    """Parse the arguments, run, and print the report; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="number of inputs (default: 1000000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all inputs (default: 0)")
    parser.add_argument("--seconds", type=float, help="start no batch after this time")
    parser.add_argument("--jobs", type=int, default=1, help="batches that run at the same time (default: 1)")
    parser.add_argument("--target", choices=list(TARGETS), help="attack only this target (default: all)")
    parser.add_argument("--batch", type=int, help="run only the batch with this number, of the given target")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    report = run(parser.parse_args())
    if report["findings"] or parser.parse_args().json:
        print(json.dumps(report, indent=2))
    else:
        for target, came in report["outcomes"].items():
            print(f"{target:<12} {report['inputs'][target]:>8} inputs:", *(f"{n} {what}," for what, n in came.items()))
        print(f"{report['total']} inputs in {report['seconds']} s, nothing was found")
    return int(bool(report["findings"]))


if __name__ == "__main__":
    sys.exit(main())
