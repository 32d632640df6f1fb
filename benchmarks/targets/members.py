"""A process that is a member of arenas, and does what it is told there. Knows nothing of Dask."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from dask_shm_plugin.arena import Arena
from dask_shm_plugin.block import Block, Descriptor


def keep_small(arena: Arena, kept: list[Block], count: int) -> None:
    """Publish blocks of one page each until there are so many."""
    while len(kept) < count:
        with arena.draft(8) as draft:
            draft.write(0, memoryview(np.random.default_rng(len(kept)).bytes(8)))
            kept.append(draft.seal())


def come_and_go(arena: Arena) -> None:
    """Publish a block of one page and give it back, so that what others know of the table is no longer true."""
    kept: list[Block] = []
    keep_small(arena, kept, 1)
    kept[0].close()
    arena.holdings.tidy()


def attach(arena: Arena, descriptor: Descriptor, size: int) -> tuple[float, bytes]:
    """Return how long it took to have an array of a block, and then what is in it."""
    start = time.perf_counter()
    x = np.frombuffer(arena.view(descriptor, 0, size), np.uint8)
    seconds = time.perf_counter() - start
    content = x.tobytes()
    del x
    arena.holdings.tidy()
    return seconds, content


def _live(pipe: Connection, places: list[Any]) -> None:
    arenas = [Arena.attach(*place, warm=1 << 40) for place in places]
    kept: list[list[Block]] = [[] for _ in arenas]
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        kind, which, *arguments = order
        if kind == "keep":
            pipe.send(keep_small(arenas[which], kept[which], *arguments))
        elif kind == "come and go":
            pipe.send(come_and_go(arenas[which]))
        else:
            pipe.send(attach(arenas[which], *arguments))
    for block in itertools.chain(*kept):
        block.close()
    for arena in arenas:
        arena.close()


class Member:
    """Such a process, as it is seen from the one that gives orders."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def ask(self, *order: Any) -> Any:
        """Let it do something, and return what it returns."""
        self._pipe.send(order)
        return self._pipe.recv()


@contextlib.contextmanager
def members(places: list[list[Any]]) -> Iterator[list[Member]]:
    """Start a process for each list of arenas, let it join them, and end all of them."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for place in places:
            pipe, theirs = context.Pipe()
            process = context.Process(target=_live, args=(theirs, place))
            process.start()
            theirs.close()
            pipes.append(pipe)
            processes.append(process)
        for pipe in pipes:
            assert pipe.recv() == "ready"
        yield [Member(pipe) for pipe in pipes]
    finally:
        for pipe in pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in processes:
            process.join()
