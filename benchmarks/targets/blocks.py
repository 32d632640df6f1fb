"""The raw arena, without Dask: the time to publish and to attach a block when there are many live blocks and many members."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from clusters import take_turns
from machine import MIB
from remote import Remote, remote
from report import figure, spread

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.block import Block, Descriptor

CAPACITY = 256 * MIB
FOR_GOOD = 1e12
"""Seconds for which freed pages stay."""
COUNTS, MEMBERS = (10, 100, 1000, 10_000), 64
FEW_BLOCKS, FEW_MEMBERS = 10, 2
STEPS = ("publish", "publish after another", "attach")


class Member:
    """A process's part in some arenas: the blocks that it keeps in each of them."""

    def __init__(self, arenas: dict[str, Arena]) -> None:
        self.arenas, self.kept = arenas, {name: [] for name in arenas}

    def keep(self, name: str, count: int) -> None:
        """Publish blocks of one page each until there are ``count``."""
        kept: list[Block] = self.kept[name]
        while len(kept) < count:
            with self.arenas[name].draft(8) as draft:
                draft.write(0, memoryview(np.random.default_rng(len(kept)).bytes(8)))
                kept.append(draft.seal())

    def publish(self, name: str, x: np.ndarray) -> tuple[float, Block]:
        """Publish an array, and return the time and the block."""
        start = time.perf_counter()
        with self.arenas[name].draft(x.nbytes) as draft:
            draft.write(0, memoryview(x))
            block = draft.seal()
        return time.perf_counter() - start, block

    def publish_and_release(self, name: str, x: np.ndarray) -> float:
        """Publish an array, release it, and return the time of the first."""
        seconds, block = self.publish(name, x)
        self.release(name, block)
        return seconds

    def release(self, name: str, block: Block) -> None:
        """Release a block, and wait until it is free."""
        block.close()
        self.arenas[name].holdings.tidy()

    def attach(self, name: str, descriptor: Descriptor, size: int) -> tuple[float, bytes]:
        """Return the time until there is an array of a block, and the bytes of the block."""
        start = time.perf_counter()
        x = np.frombuffer(self.arenas[name].view(descriptor, 0, size), np.uint8)
        seconds = time.perf_counter() - start
        content = x.tobytes()
        del x
        self.arenas[name].holdings.tidy()
        return seconds, content


@contextlib.contextmanager
def leaving(it: Member) -> Iterator[Member]:
    """Leave all arenas at the end."""
    yield it
    for name, arena in it.arenas.items():
        for block in it.kept[name]:
            block.close()
        arena.close()


def member(places: dict[str, Any]) -> contextlib.AbstractContextManager[Member]:
    """Join some arenas until the end."""
    return leaving(Member({name: Arena.attach(*place, warm=FOR_GOOD) for name, place in places.items()}))


def fill(here: Member, name: str, others: list[Remote], count: int) -> None:
    """Let this process and others together keep ``count`` small blocks in an arena."""
    share = count // (len(others) + 1)
    for other in others:
        other.ask(Member.keep, name, share)
    here.keep(name, count - share * len(others))
    stats = here.arenas[name].stats()
    assert (stats.blocks, stats.members) == (count, len(others) + 1), stats


def one_round(here: Member, name: str, reader: Remote, seed: int) -> tuple[float, ...]:
    """Publish an array here and attach it there; publish it again after the reader has published. Return three times."""
    x = np.frombuffer(np.random.default_rng(seed).bytes(MIB), np.uint8)
    published, block = here.publish(name, x)
    attached, content = reader.ask(Member.attach, name, block.descriptor, x.nbytes)
    assert content == x.tobytes(), "wrong value"
    here.release(name, block)
    # What this process knows of the table is out of date after this.
    reader.ask(Member.publish_and_release, name, x[:8])
    return published, here.publish_and_release(name, x), attached


def many_blocks(*, is_quick: bool) -> dict[str, Any]:
    """Fill one arena step by step, and publish and attach in it and in a small one in turn."""
    counts, many = ((10, 100), 4) if is_quick else (COUNTS, MEMBERS)
    arenas = {name: Arena.create(CAPACITY, warm=FOR_GOOD) for name in ("few", "many")}
    places = {name: (arena.segment.whereabouts, arena.arena_id) for name, arena in arenas.items()}
    done: dict[int, dict[str, np.ndarray]] = {}
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(leaving(Member(arenas)))
        # This process is a member of both arenas, and so is the reader; the others are in the large one.
        reader = stack.enter_context(remote(member, places))
        others = [stack.enter_context(remote(member, {"many": places["many"]})) for _ in range(many - FEW_MEMBERS)]
        fill(here, "few", [reader], FEW_BLOCKS)
        for count in counts:
            fill(here, "many", [reader, *others], count)
            orders = {name: lambda number, name=name: one_round(here, name, reader, number + 3) for name in arenas}
            done[count] = take_turns(10 if is_quick else 200, orders, unmeasured=3)
    against = f"{counts[-1]} blocks and {many} members, over {FEW_BLOCKS} and {FEW_MEMBERS}"
    slower = done[counts[-1]]["many"] / done[counts[-1]]["few"]
    figures = [figure(f"{step}, 1 MiB: {against}", slower[:, n], "×", 1.5) for n, step in enumerate(STEPS)]
    series = {step: {str(c): spread(done[c]["many"][:, n]) for c in counts} for n, step in enumerate(STEPS)}
    return {"figures": figures, "series": {"by": "blocks", "members": many, "seconds": series}}
