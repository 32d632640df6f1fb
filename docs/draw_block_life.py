"""Draw the life of a block, ``images/block-life.svg``, from the behaviour of the table.

    python docs/draw_block_life.py

Each operation, and each death, is tried on a block in each state. An arrow leads to the state of the block afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dask_shm_plugin.exceptions import StaleBlock
from dask_shm_plugin.table.layout import TABLE_BYTES, BlockId, Extent
from dask_shm_plugin.table.state_word import DRAFT, FREE, SEALED
from dask_shm_plugin.table.table import Table

PICTURE = Path(__file__).with_name("images") / "block-life.svg"
NAMES = {FREE: "FREE", DRAFT: "DRAFT", SEALED: "SEALED"}
CENTRES = {FREE: 110, DRAFT: 430, SEALED: 750}
MIDDLE, HALF_WIDTH, HALF_HEIGHT, LINE = 170, 70, 30, 18


class Scene:
    """A table with one block in a given state, its owner, another holder if ``shared``, and a member without it."""

    def __init__(self, state: int, *, shared: bool) -> None:
        self.table = Table.format(np.zeros(TABLE_BYTES, np.uint8).data, bytes(16), 4096)
        self.owner, self.other, self.stranger = (self.table.join(slot, slot, slot) for slot in range(3))
        self.row = BlockId(0, 1)
        if state != FREE:
            self.row = self.table.reserve(Extent(0, 4096), 4096, self.owner)
        if state == SEALED:
            self.table.seal(self.row, self.owner)
            if shared:
                self.table.acquire(self.row, self.other)

    @property
    def is_taken(self) -> bool:
        """Whether the table has a block."""
        return bool(len(self.table.blocks.taken()))

    def reserve(self) -> None:
        """Reserve the place of the block, if it is free."""
        if self.is_taken:
            refuse()
        self.table.reserve(Extent(0, 4096), 4096, self.owner)

    @property
    def state(self) -> int:
        """The state of the block."""
        if not self.is_taken:
            return FREE
        try:
            self.table.acquire(self.row, self.stranger)
        except StaleBlock:
            return DRAFT
        return SEALED


ALL, ONE_HOLDER, TWO_HOLDERS = tuple(NAMES), False, True
EVENTS: tuple[tuple[str, Callable[[Scene], object], tuple[int, ...], bool], ...] = (
    ("reserve", lambda s: s.reserve(), ALL, False),
    ("seal", lambda s: s.table.seal(s.row, s.owner), ALL, ONE_HOLDER),
    ("acquire", lambda s: s.table.acquire(s.row, s.other), ALL, ONE_HOLDER),
    ("the owner abandons it", lambda s: s.table.release(s.row, s.owner), (FREE, DRAFT), ONE_HOLDER),
    ("the owner dies", lambda s: s.table.reclaim(s.owner), (FREE, DRAFT), ONE_HOLDER),
    ("the last holder releases it", lambda s: s.table.release(s.row, s.owner), (SEALED,), ONE_HOLDER),
    ("the last holder dies", lambda s: s.table.reclaim(s.owner), (SEALED,), ONE_HOLDER),
    ("one of several holders releases it", lambda s: s.table.release(s.row, s.owner), (SEALED,), TWO_HOLDERS),
    ("one of several holders dies", lambda s: s.table.reclaim(s.owner), (SEALED,), TWO_HOLDERS),
    ("another member dies", lambda s: s.table.reclaim(s.stranger), ALL, ONE_HOLDER),
)


def refuse() -> None:
    """Fail, as the operation does not happen: placement never chooses a place that is taken."""
    raise StaleBlock


def arrows() -> dict[tuple[int, int], list[str]]:
    """Try every event in every state; return the arrows, from state to state, with their events."""
    found: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    for event, happen, states, shared in EVENTS:
        for state in states:
            scene = Scene(state, shared=shared)
            try:
                happen(scene)
            except StaleBlock:
                continue
            scene.table.validate()
            if (state, scene.state) != (FREE, FREE):
                found[state, scene.state].append(event)
    return dict(found)


def text(x: float, y: float, words: str, *, style: str = "") -> str:
    """Return the element of a text, centred at a point."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle" {style}>{words}</text>'


def box(state: int) -> list[str]:
    """Return the elements of a state."""
    x = CENTRES[state]
    left, top = x - HALF_WIDTH, MIDDLE - HALF_HEIGHT
    shape = (
        f'<rect x="{left}" y="{top}" width="{2 * HALF_WIDTH}" height="{2 * HALF_HEIGHT}" rx="8" '
        'fill="#eef" stroke="#336"/>'
    )
    return [shape, text(x, MIDDLE + 6, NAMES[state], style='font-weight="bold"')]


def arrow(start: int, end: int, events: list[str]) -> list[str]:
    """Return the elements of an arrow: straight if forward, below if backward, above if it returns to its state."""
    a, b = CENTRES[start], CENTRES[end]
    if start == end:
        path = (
            f"M {a - 25} {MIDDLE - HALF_HEIGHT} "
            f"C {a - 60} {MIDDLE - 100}, {a + 60} {MIDDLE - 100}, {a + 25} {MIDDLE - HALF_HEIGHT}"
        )
        middle, first = a, MIDDLE - 92 - LINE * (len(events) - 1)
    elif a < b:
        path = f"M {a + HALF_WIDTH} {MIDDLE} L {b - HALF_WIDTH} {MIDDLE}"
        middle, first = (a + b) / 2, MIDDLE - 10 - LINE * (len(events) - 1)
    else:
        depth = (a - b) / 2 - 60
        down = MIDDLE + HALF_HEIGHT
        path = f"M {a} {down} C {a} {down + depth}, {b} {down + depth}, {b} {down}"
        middle, first = (a + b) / 2, down + 0.75 * depth - LINE * len(events) + 10
    line = f'<path d="{path}" fill="none" stroke="#336" stroke-width="1.5" marker-end="url(#head)"/>'
    return [line, *(text(middle, first + LINE * n, event) for n, event in enumerate(events))]


def picture() -> str:
    """Return the whole picture."""
    parts = [part for state in NAMES for part in box(state)]
    parts += [part for (start, end), events in arrows().items() for part in arrow(start, end, events)]
    head = (
        '<marker id="head" markerWidth="9" markerHeight="9" refX="8" refY="4.5" orient="auto">'
        '<path d="M0,0 L9,4.5 L0,9 z" fill="#336"/></marker>'
    )
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 420" font-family="sans-serif" font-size="14">',
            '<rect width="900" height="420" fill="white"/>',
            f"<defs>{head}</defs>",
            *parts,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(picture())
