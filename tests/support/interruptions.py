"""Exceptions at arbitrary instructions of a thread that works with an arena.

    python tests/support/interruptions.py 10000 signals

interrupts a process 10,000 times and prints the counts as JSON. With ``signals``, a signal handler raises the
exceptions. With ``threads``, another thread sends them. The interrupted process runs this file with more arguments.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import gc
import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.block import Descriptor
from dask_shm_plugin.exceptions import ArenaBusy, ArenaFull, SharedMemoryError, StaleBlock
from dask_shm_plugin.linux.segment import Whereabouts
from dask_shm_plugin.table.layout import BlockId

PAGE = 4096
_MIN_INTERVAL_S, _MAX_INTERVAL_S = 20e-6, 2e-3


class Interrupted(BaseException):
    """The asynchronous exception."""


class Work:
    """Publishes, attaches and releases blocks, and checks every value.

    Parameters
    ----------
    arena
        An arena of which the process is a member.
    kept
        A block of another member, which is attached, too.
    filled_with
        The value of each byte of that block.
    """

    def __init__(self, arena: Arena, kept: Descriptor, filled_with: int) -> None:
        self._arena, self._kept, self._filled_with = arena, kept, filled_with
        self._sources = {size: np.arange(size, dtype=np.uint8) for size in (PAGE, 5 * PAGE, 96 * PAGE)}
        self.counts: collections.Counter[str] = collections.Counter()

    def run_round(self) -> None:
        """Do each operation once."""
        source = random.choice(list(self._sources.values()))
        arena = self._arena
        try:
            with arena.draft(len(source)) as draft:
                draft.write(0, source.data)
                block = draft.seal()
            view = block.view(0, len(source))
            again = arena.view(block.descriptor, 0, PAGE)
            block.close()
            self._count_unless(np.array_equal(np.frombuffer(view, np.uint8), source), "the published block")
            view[0] = 99
            self._count_unless(again[0] == source[0], "another view of the block")
            foreign = arena.view(self._kept, 0, PAGE)
            self._count_unless(bytes(foreign) == bytes([self._filled_with]) * PAGE, "the block of another member")
            del view, again, foreign
            if random.random() < 0.1:
                arena.holdings.tidy()
        except ArenaBusy:
            self.counts["busy"] += 1
        except ArenaFull:
            # Where processors are scarce, the other member may have dropped blocks that it has not released yet.
            self.counts["full"] += 1
        self.counts["rounds"] += 1

    def _count_unless(self, holds: bool, what: str) -> None:
        if not holds:
            self.counts[f"wrong: {what}"] += 1


class InterruptedWorker:
    """Repeats `Work` in one thread, and counts the exceptions.

    Exceptions arrive only while ``is_armed`` is set. So they interrupt the work, and never the code of this class.
    """

    def __init__(self, work: Work, most: int) -> None:
        self._work, self._most = work, most
        self.thread = threading.current_thread()
        self.is_armed = self.is_over = False

    def run(self) -> None:
        """Work until there were enough interrupts or a check failed."""
        counts = self._work.counts
        while counts["interrupts"] < self._most and not any(what.startswith(("wrong", "refused")) for what in counts):
            try:
                self.is_armed = True
                self._work_while_armed()
            except Interrupted:
                counts["interrupts"] += 1
            except SharedMemoryError as error:
                counts[f"refused: {type(error).__name__}: {error}"] += 1
            # After a refusal, the exception of this round is still to come. After an interrupt, this returns at once.
            with contextlib.suppress(Interrupted):
                self._wait_while_armed()
        self.is_over = True

    # Each loop is in a function of its own: in Python 3.13.0, a ``try`` around a loop may not cover the jump back.

    def _work_while_armed(self) -> None:
        # An exception that arrives in a finalizer is only printed. The flag, which is cleared then, ends the loop.
        while self.is_armed:
            self._work.run_round()

    def _wait_while_armed(self) -> None:
        while self.is_armed:
            time.sleep(1e-5)


def interrupt_by_signals(work: Work, most: int) -> None:
    """Interrupt the main thread by a signal handler that raises."""
    worker = InterruptedWorker(work, most)

    def handler(*of_signal: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(_MIN_INTERVAL_S, _MAX_INTERVAL_S))
        if worker.is_armed:
            worker.is_armed = False
            raise Interrupted

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, _MAX_INTERVAL_S)
    worker.run()
    signal.setitimer(signal.ITIMER_REAL, 0)


def interrupt_by_threads(work: Work, most: int) -> None:
    """Interrupt two threads, which work at the same time, by exceptions that this thread sends."""
    send = ctypes.pythonapi.PyThreadState_SetAsyncExc
    send.argtypes = [ctypes.c_ulong, ctypes.py_object]
    workers = [InterruptedWorker(work, most) for _ in range(2)]
    for worker in workers:
        worker.thread = threading.Thread(target=worker.run)
        worker.thread.start()
    while not all(worker.is_over for worker in workers):
        time.sleep(random.uniform(_MIN_INTERVAL_S, _MAX_INTERVAL_S))
        worker = random.choice(workers)
        if worker.is_armed and worker.thread.ident is not None:
            send(worker.thread.ident, Interrupted)
            worker.is_armed = False
    for worker in workers:
        worker.thread.join()


def _count_mappings(arena: Arena) -> int:
    return sum(f" {arena.segment.inode} " in line for line in Path("/proc/self/maps").read_text().splitlines())


def main(most: int, how: str, seed: int, at: Whereabouts, kept: Descriptor, filled_with: int) -> dict[str, Any]:
    """Join the arena, work while being interrupted, and return the counts."""
    random.seed(seed)
    sys.setswitchinterval(1e-4)
    # Python reports exceptions that arrive in finalizers. These are expected here.
    sys.unraisablehook = lambda unraisable: None
    arena = Arena.attach(at, kept.arena_id, warm=1 << 20)
    before = _count_mappings(arena)
    work = Work(arena, kept, filled_with)
    started = time.monotonic()
    {"signals": interrupt_by_signals, "threads": interrupt_by_threads}[how](work, most)
    seconds = time.monotonic() - started
    deadline = time.monotonic() + 10
    while (gc.collect(), len(arena.holdings))[1] and time.monotonic() < deadline:
        time.sleep(0.01)
    arena.holdings.mappings.clear()
    left = len(arena.holdings)
    # The next change of the table completes one that was interrupted.
    arena.validate()
    with contextlib.suppress(StaleBlock):
        arena.stats()
    claims = len(arena._access.run(lambda table: table.held_by(arena.member)))
    said = {
        "held": left,
        "claims": claims,
        "damaged": arena.is_damaged,
        "mappings": _count_mappings(arena) - before,
        "seconds": round(seconds, 1),
        **work.counts,
    }
    segment = arena.segment
    arena.close()
    return {**said, "left": arena.has_left, "mapped": len(list(segment.private_mappings()))}


def run(most: int, how: str, seed: int = 1) -> dict[str, Any]:
    """Interrupt another process while this one works in the same arena; return the counts of both."""
    arena = Arena.create(4 << 20, warm=1 << 20)
    try:
        with arena.draft(PAGE) as draft:
            draft.write(0, memoryview(bytes([7]) * PAGE))
            kept = draft.seal()
        at, descriptor = arena.segment.whereabouts, kept.descriptor
        names = [*map(str, at), descriptor.arena_id.hex(), *map(str, descriptor.row)]
        command = [sys.executable, __file__, str(most), how, str(seed), *names]
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        work = Work(arena, descriptor, 7)
        while other.poll() is None:
            work.run_round()
            time.sleep(0.001)
        said = json.loads(other.communicate()[0] or "{}")
        assert said, f"the process has ended with status {other.returncode}"
        kept.close()
        deadline = time.monotonic() + 10
        while arena.stats().used and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.01)
        arena.validate()
        neighbour = {**work.counts, "used": arena.stats().used, "damaged": arena.is_damaged}
        return {**said, "neighbour": neighbour}
    finally:
        arena.close()


if __name__ == "__main__":
    if len(sys.argv) > 4:
        pid, fd, device, inode = map(int, sys.argv[4:8])
        row = BlockId(*map(int, sys.argv[9:11]))
        named = Descriptor(bytes.fromhex(sys.argv[8]), row)
        print(
            json.dumps(
                main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Whereabouts(pid, fd, device, inode), named, 7)
            )
        )
    else:
        print(json.dumps(run(int(sys.argv[1]), *sys.argv[2:3], *map(int, sys.argv[3:])), indent=1))
