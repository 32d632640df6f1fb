"""The raw arena, without Dask: what publish and attach cost when there are many live blocks and many members."""

from __future__ import annotations

import itertools
import time

import numpy as np
from members import Member, keep_small, members
from report import MIB, Figure, Measurement, Round, median

from dask_shm_plugin.arena import Arena
from dask_shm_plugin.block import Block

CAPACITY = 256 * MIB
COUNTS, MEMBERS = (10, 100, 1000, 10_000), 64
FEW_BLOCKS, FEW_MEMBERS = 10, 2

Keeper = tuple[Member, int]
"""Another process, and which of its arenas is meant."""


def fill(arena: Arena, own: list[Block], keepers: list[Keeper], count: int) -> None:
    """Let this process and others together keep so many small blocks."""
    share = count // (len(keepers) + 1)
    for keeper, which in keepers:
        keeper.ask("keep", which, share)
    keep_small(arena, own, count - share * len(keepers))
    stats = arena.stats()
    assert (stats.blocks, stats.members) == (count, len(keepers) + 1), stats


def publish(arena: Arena, x: np.ndarray) -> tuple[float, Block]:
    """Publish an array, and return how long that took, and its block."""
    start = time.perf_counter()
    with arena.draft(x.nbytes) as draft:
        draft.write(0, memoryview(x))
        block = draft.seal()
    return time.perf_counter() - start, block


def one_round(arena: Arena, reader: Keeper, x: np.ndarray) -> Round:
    """Publish an array here and attach it there; publish it once more when somebody else has published meanwhile."""
    process, which = reader
    published, block = publish(arena, x)
    attached, content = process.ask("attach", which, block.descriptor, x.nbytes)
    assert content == x.tobytes(), "wrong value"
    block.close()
    arena.holdings.tidy()
    process.ask("come and go", which)
    after_another, block = publish(arena, x)
    block.close()
    arena.holdings.tidy()
    return {"publish": published, "publish after another": after_another, "attach": attached}


def many_blocks(*, is_quick: bool) -> Measurement:
    """Fill one arena step by step, and publish and attach in it and in a small one in turn."""
    counts, many = ((10, 100), 4) if is_quick else (COUNTS, MEMBERS)
    arenas = {"few": Arena.create(CAPACITY, warm=CAPACITY), "many": Arena.create(CAPACITY, warm=CAPACITY)}
    small, large = ((arena.segment.whereabouts, arena.arena_id) for arena in arenas.values())
    kept: dict[str, list[Block]] = {name: [] for name in arenas}
    rounds: list[Round] = []
    # This process is a member of both arenas, and so is the one that reads; the others are in the large one.
    with members([[small, large], *([[large]] * (many - 2))]) as [reader, *others]:
        readers = {"few": (reader, 0), "many": (reader, 1)}
        keepers = [readers["many"], *((other, 0) for other in others)]
        fill(arenas["few"], kept["few"], [readers["few"]], FEW_BLOCKS)
        for count in counts:
            fill(arenas["many"], kept["many"], keepers, count)
            for number in range(-3, 10 if is_quick else 200):
                x = np.frombuffer(np.random.default_rng(number + 3).bytes(MIB), np.uint8)
                turn = list(arenas) if number % 2 else list(arenas)[::-1]
                one = {name: one_round(arenas[name], readers[name], x) for name in turn}
                rounds += [{"blocks": count, **one}] if number >= 0 else []
        for block in itertools.chain(*kept.values()):
            block.close()
        for arena in arenas.values():
            arena.close()
    return _measurement(rounds, counts, many)


def _measurement(rounds: list[Round], counts: tuple[int, ...], many: int) -> Measurement:
    last = [one for one in rounds if one["blocks"] == counts[-1]]
    figures, series = [], {}
    for what in ("publish", "publish after another", "attach"):
        slower = median(last, lambda one, what=what: one["many"][what] / one["few"][what])
        against = f"{counts[-1]} blocks and {many} members, over {FEW_BLOCKS} and {FEW_MEMBERS}"
        figures.append(Figure(f"{what}, 1 MiB: {against}", slower, "×", 1.5))
        for name in ("few", "many"):
            figures.append(
                Figure(f"{what}, 1 MiB, {name}", 1e6 * median(last, lambda one, n=name, w=what: one[n][w]), "µs")
            )
        series[what] = {
            str(count): median((r for r in rounds if r["blocks"] == count), lambda one, what=what: one["many"][what])
            for count in counts
        }
    return Measurement(rounds, figures, {"by": "blocks", "members": many, "seconds": series})
