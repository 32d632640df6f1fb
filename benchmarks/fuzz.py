"""Attack handles, whereabouts, rendezvous and tables with what nobody has meant; nothing but bytes may come of it.

    python benchmarks/fuzz.py [--inputs 1000000] [--seed 0] [--seconds N] [--jobs 1] [--target table] [--json]

After each input: a documented exception or the right bytes, never other bytes; no living view has changed, here or in
another member. Inputs run in forked children, so that a crash or a hang ends one batch only, and is reported with the
number of its batch: ``--target T --seed S --batch B`` runs that one again. At the end of a batch nothing is left:
descriptors, mappings, names.

Ends with status 1 if anything was found.
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

from fuzz_targets import TARGETS, held

from dask_shm_plugin import rendezvous, segment

#: Inputs of one batch, and how many of a hundred batches attack each target.
BATCH = 500
SHARES = {"handles": 72, "whereabouts": 18, "rendezvous": 5, "table": 5}
PATIENCE = 120


class Batch(NamedTuple):
    """Some inputs, made from nothing but this."""

    target: str
    seed: int
    number: int
    inputs: int


class Child(NamedTuple):
    """A child process at work on a batch."""

    batch: Batch
    pid: int
    reading: int
    progress: mmap.mmap
    deadline: float


def batches(asked: argparse.Namespace) -> Any:
    """Yield what is to be done, the targets in turn by their shares."""
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
    """Return what the names of this run begin with."""
    return f"dask-shm-{os.getuid()}-fuzz{os.getpid()}-"


def begin(batch: Batch, names: str) -> Child:
    """Start a child."""
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
            pickle.dump(work(batch, progress), file)
        os._exit(0)
    os.close(writing)
    with suppress(OSError):
        os.setpgid(pid, pid)
    return Child(batch, pid, reading, progress, time.monotonic() + PATIENCE)


def work(batch: Batch, progress: mmap.mmap) -> tuple[collections.Counter[str], str | None]:
    """Attack, in a child; return what came of it, and what must not have."""
    came: collections.Counter[str] = collections.Counter()
    attack = TARGETS[batch.target](random.Random(f"{batch.target} {batch.seed} {batch.number}"))
    try:
        came[next(attack)] += 1
        before = held()
        for done, outcome in enumerate(islice(attack, batch.inputs - 1), 1):
            progress[:8] = done.to_bytes(8, "little")
            came[outcome] += 1
        # What is in use goes up and down by some; what leaks does so with every input.
        for what, now, then in zip(("descriptors", "mappings"), held(), before, strict=True):
            if now - then > batch.inputs // 8 + 40:
                return came, f"{now - then} {what} more than at the beginning"
        attack.close()
    except BaseException:
        return came, traceback.format_exc()
    return came, None


def end(child: Child) -> tuple[collections.Counter[str], str | None]:
    """Take what a child has to say; say it for one that cannot any more."""
    with open(child.reading, "rb") as file:
        said = file.read()
    _, status = os.waitpid(child.pid, 0)
    # Peers of a child that has died.
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
    # So that collecting garbage does not search all modules of Dask each time.
    gc.collect()
    gc.freeze()
    todo, names, start = batches(asked), prefix(), time.monotonic()
    while True:
        is_late = asked.seconds is not None and time.monotonic() - start > asked.seconds
        while not is_late and len(running) < asked.jobs and (batch := next(todo, None)) is not None:
            running.append(begin(batch, names))
        if not running:
            break
        ready, _, _ = select.select([child.reading for child in running], [], [], 1)
        for child in list(running):
            is_hanging = child.reading not in ready and time.monotonic() > child.deadline
            if is_hanging:
                os.killpg(child.pid, signal.SIGKILL)
            if is_hanging or child.reading in ready:
                running.remove(child)
                came, wrong = end(child)
                outcomes[child.batch.target].update(came)
                left = list(Path("/dev/shm").glob(f"*{names}{child.batch.number}-*"))
                wrong = "hangs" if is_hanging else wrong
                for path in left:
                    remove(path)
                if wrong:
                    findings.append({**child.batch._asdict(), "what": wrong})
                    print(json.dumps(findings[-1]), file=sys.stderr, flush=True)
        if sys.stderr.isatty():
            print(f"\r{sum(c.total() for c in outcomes.values())} inputs", end="", file=sys.stderr)
    return {
        "seed": asked.seed,
        "inputs": {target: came.total() for target, came in outcomes.items()},
        "total": sum(came.total() for came in outcomes.values()),
        "outcomes": {target: dict(came.most_common()) for target, came in outcomes.items()},
        "findings": findings,
        "seconds": round(time.monotonic() - start, 1),
    }


def remove(path: Path) -> None:
    """Remove what a child has left that was killed, or put there itself."""
    if path.is_dir() and not path.is_symlink():
        for entry in path.iterdir():
            entry.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def main() -> int:
    """Read the arguments, run, print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="begin no batch after this time")
    parser.add_argument("--jobs", type=int, default=1, help="batches at the same time (default: 1)")
    parser.add_argument("--target", choices=list(TARGETS), help="attack only this")
    parser.add_argument("--batch", type=int, help="run one batch again")
    parser.add_argument("--json", action="store_true", help="print JSON")
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
