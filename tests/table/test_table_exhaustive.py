"""With two members and two blocks, every state that operations and deaths between two stores can reach is valid."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from dask_shm_plugin.exceptions import StaleBlock
from dask_shm_plugin.table import layout, members, placement, roles, state_word
from dask_shm_plugin.table.layout import TABLE_BYTES, BlockId, Extent
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.table.state_word import DRAFT, FREE, SEALED
from dask_shm_plugin.table.table import Table

pytestmark = pytest.mark.slow

SLOTS = ROWS = (0, 1)
CAPACITY = 2
"""A block takes one or two units, so there is no room for a third block."""
MEANINGLESS = 99
"""Written into words that have no meaning, so that an operation that reads them goes wrong."""
ENTERED = 1

_MEMBER = [layout.MEMBERS_AT + slot * members._ENTRY for slot in SLOTS]
_BLOCK = [layout.BLOCKS_AT + row * layout.BLOCK for row in ROWS]
_CLAIM = [[layout.CLAIMS_AT + slot * layout.BLOCKS + row for row in ROWS] for slot in SLOTS]
PLACES = np.array(
    [layout.INCARNATION_WORD, layout.ROWS_WORD, *_MEMBER]
    + [at + word for at in _BLOCK for word in (0, 1, 2, 4, 5)]
    + list(itertools.chain(*_CLAIM))
)
"""The words that make up a state."""
SIZES = [at + 3 for at in _BLOCK]
AT = {int(place): n for n, place in enumerate(PLACES)}
TIMES = [at + 6 for at in _BLOCK]
IGNORED = {at + n for at in _MEMBER for n in range(1, 8)} | {*SIZES, *TIMES}
"""Words that no operation reads: pids and start times, figures of memory, sizes, times of reservation."""

Words = tuple[int, ...]


class State(NamedTuple):
    """The words of the table in canonical form, and the slots whose process is dead."""

    words: Words
    dead: frozenset[int]


class Scene(NamedTuple):
    """A state as a reader sees it: the members, and for each row its kind, its extent, and its owner or holders."""

    members: frozenset[int]
    rows: tuple[tuple[int, int, int, frozenset[int]] | None, ...]


class Recorder:
    """Memory that records the order in which its words are written."""

    def __init__(self, memory: Any, log: list[tuple[int, int]], first: int = 0, width: int = 0) -> None:
        self.memory, self.log, self.first, self.width = memory, log, first, width

    def __getitem__(self, key: Any) -> Any:
        return self.memory[key]

    def __setitem__(self, key: Any, value: int) -> None:
        slot, where = key if isinstance(key, tuple) else (0, key)
        for index in range(*where.indices(self.width)) if isinstance(where, slice) else [where]:
            self.log.append((self.first + int(slot) * self.width + int(index), int(value)))
        self.memory[key] = value


class Machine:
    """A table that can be put into any state, and that records the stores of an operation."""

    def __init__(self) -> None:
        buffer = np.zeros(TABLE_BYTES, np.uint8).data
        self.table = Table.format(buffer, bytes(16), CAPACITY)
        self.words = np.frombuffer(buffer, np.uint64)
        self.log: list[tuple[int, int]] = []
        book = self.table.members
        book._words = Recorder(book._words, self.log, layout.MEMBERS_AT)  # type: ignore[assignment]
        claims, blocks = self.table._claims, self.table.blocks
        claims._words = Recorder(claims._words, self.log, layout.CLAIMS_AT)  # type: ignore[assignment]
        claims._claims = Recorder(claims._claims, self.log, layout.CLAIMS_AT, layout.BLOCKS)  # type: ignore[assignment]
        self.table._words = blocks._words = Recorder(self.table._words, self.log)  # type: ignore[assignment]

    def run(self, words: Words, action: Callable[[Table], Any]) -> tuple[Any, list[Words]]:
        """Return the result of an operation, and the states before each of its stores and after the last one."""
        self.words[PLACES] = words
        self.words[SIZES] = 1
        # As in a process that has just opened the table.
        self.table._rows_seen = 0
        self.log.clear()
        result = action(self.table)
        states = [words]
        for place, value in self.log:
            if place not in IGNORED:
                after = list(states[-1])
                after[AT[place]] = value
                states.append(tuple(after))
        assert states[-1] == tuple(self.words[PLACES].tolist())
        return result, states


def canonical(words: Words) -> Words:
    """Replace generations and incarnations by their ranks, and overwrite words that have no meaning."""
    new = list(words)
    entered = [AT[at] for at in _MEMBER if words[AT[at]] & 3 == ENTERED]
    owners = [AT[at] + 4 for at in _BLOCK if state_of(words, at) == DRAFT]
    used = sorted({words[at] >> 2 for at in entered} | {words[at] for at in owners})
    order = {incarnation: n for n, incarnation in enumerate(used, 1)}
    for at in (AT[at] for at in _MEMBER):
        new[at] = order[words[at] >> 2] << 2 | ENTERED if at in entered else 0
    for at in owners:
        new[at] = order[words[at]]
    new[AT[layout.INCARNATION_WORD]] = len(used)
    for row in ROWS:
        at, claims = AT[_BLOCK[row]], [AT[_CLAIM[slot][row]] for slot in SLOTS]
        generation, state = state_word.unpack(words[at])
        order = {n: k for k, n in enumerate(sorted({0, generation, *(words[claim] for claim in claims)}))}
        for claim in claims:
            new[claim] = order[words[claim]]
        if state == FREE:
            new[at + 1 : at + 3] = [MEANINGLESS] * 2
        if state != DRAFT:
            new[at + 3 : at + 5] = [MEANINGLESS] * 2
        body = [] if state == FREE else [*new[at + 1 : at + 3], 1, *new[at + 3 : at + 5]]
        new[at] = state_word.pack(order[generation], state, body)
    return tuple(new)


def state_of(words: Words, block: int) -> int:
    """Return the state of a block."""
    return state_word.unpack(words[AT[block]])[1]


def member(words: Words, slot: int) -> Member:
    """Return the member in a slot."""
    return Member(slot, words[AT[_MEMBER[slot]]] >> 2)


def row_of(words: Words, row: int) -> BlockId:
    """Return the block that is in a row, with its present generation."""
    return BlockId(row, state_word.unpack(words[AT[_BLOCK[row]]])[0])


def describe(words: Words) -> Scene:
    """Read a state without the help of the table."""
    members = frozenset(slot for slot in SLOTS if words[AT[_MEMBER[slot]]] & 3 == ENTERED)
    rows: list[Any] = []
    for row in ROWS:
        word, offset, length, owner, incarnation = words[AT[_BLOCK[row]] : AT[_BLOCK[row]] + 5]
        generation, state = state_word.unpack(word)
        if state == FREE:
            rows.append(None)
        elif state == DRAFT:
            assert incarnation == member(words, owner).incarnation
            rows.append((DRAFT, offset, length, frozenset([owner])))
        else:
            claims = {slot for slot in members if words[AT[_CLAIM[slot][row]]] == generation}
            rows.append((SEALED, offset, length, frozenset(claims)))
    return Scene(members, tuple(rows))


# ----------------------------------------------------------------------------- the expected results, without a table


def replaced(scene: Scene, row: int, entry: Any) -> Scene:
    """Replace the entry of a row."""
    return scene._replace(rows=tuple(entry if n == row else old for n, old in enumerate(scene.rows)))


def without(scene: Scene, slot: int, row: int, kinds: tuple[int, ...] = (DRAFT, SEALED)) -> Scene:
    """Drop the part of one member in a row; the row is free if no member is left."""
    if (entry := scene.rows[row]) is None or entry[0] not in kinds:
        return scene
    left = entry[3] - {slot}
    return replaced(scene, row, (*entry[:3], left) if left else None)


def departed(scene: Scene, slot: int) -> Scene:
    """Drop everything that a member has, and its slot."""
    for row in ROWS:
        scene = without(scene, slot, row)
    return scene._replace(members=scene.members - {slot})


class Move(NamedTuple):
    """An action of a process: the process, the call, the expected result, and the dead member that is reclaimed."""

    actor: int
    action: Callable[[Table], Any]
    outcome: Scene
    behind: int | None = None


def moves(words: Words, dead: frozenset[int]) -> Iterator[Move]:
    """Yield all actions of live processes in a state."""
    scene = describe(words)
    for slot in SLOTS:
        if slot not in scene.members:
            joined = scene._replace(members=scene.members | {slot})
            yield Move(slot, lambda t, slot=slot: t.join(slot, 1, 1), joined)
    for slot in scene.members - dead:
        who = member(words, slot)
        yield Move(slot, lambda t, who=who: t.reclaim(who), departed(scene, slot))
        for other in scene.members & dead:
            whom = member(words, other)
            yield Move(slot, lambda t, whom=whom: t.reclaim(whom), departed(scene, other), other)
            drafts = scene
            for row in ROWS:
                drafts = without(drafts, other, row, (DRAFT,))
            yield Move(slot, lambda t, whom=whom: t.reclaim_drafts(whom), drafts, other)
        yield from drafting(scene, slot, who)
        for row, entry in enumerate(scene.rows):
            yield from referring(scene, slot, who, row_of(words, row), entry)


def drafting(scene: Scene, slot: int, who: Member) -> Iterator[Move]:
    """Yield the reservations of a member."""
    for length in (1, 2):
        taken = np.array([entry[1:3] for entry in scene.rows if entry], np.uint64).reshape(-1, 2)
        offset = placement.Room(taken, CAPACITY).place(length)
        if offset is not None:
            extent = Extent(offset, length)
            drafted = replaced(scene, scene.rows.index(None), (DRAFT, *extent, frozenset([slot])))
            yield Move(slot, lambda t, extent=extent: t.reserve(extent, 1, who), drafted)


def referring(scene: Scene, slot: int, who: Member, row: BlockId, entry: Any) -> Iterator[Move]:
    """Yield the actions of a member on a row, with its present generation and with those before and after it."""
    is_draft, is_block = entry is not None and entry[0] == DRAFT, entry is not None and entry[0] == SEALED
    for stale in (row._replace(generation=row.generation + n) for n in (-1, 0, 1)):
        if not (is_block and stale == row):
            yield Move(slot, lambda t, stale=stale: refused(t, stale, who), scene)
    if is_block:
        shared = (*entry[:3], entry[3] | {slot})
        yield Move(slot, lambda t: t.acquire(row, who), replaced(scene, row.index, shared))
    if is_draft and slot in entry[3]:
        sealed = (SEALED, *entry[1:3], entry[3])
        yield Move(slot, lambda t: t.seal(row, who), replaced(scene, row.index, sealed))
    if entry is not None and slot in entry[3]:
        yield Move(slot, lambda t: t.release(row, who), without(scene, slot, row.index))


def refused(t: Table, row: BlockId, who: Member) -> None:
    """Check that a descriptor of a block that does not exist is refused."""
    with pytest.raises(StaleBlock):
        t.acquire(row, who)


# ------------------------------------------------------------------------------------------------------- the search


class Search:
    """A search of all states, breadth first."""

    def __init__(self) -> None:
        self.machine = Machine()
        start = State(canonical((0,) * len(PLACES)), frozenset())
        self.seen, self.waiting, self.transitions = {start}, [start], 0
        self.cleaned: dict[tuple[Words, tuple[int, ...]], Scene] = {}

    def run(self) -> None:
        """Search until no new state is found."""
        while self.waiting:
            todo, self.waiting = self.waiting, []
            for state in todo:
                self.check(state)
                self.expand(state)

    def reach(self, words: Words, dead: frozenset[int]) -> None:
        """Note that a state can be reached."""
        self.transitions += 1
        state = State(canonical(words), dead)
        if state not in self.seen:
            self.seen.add(state)
            self.waiting.append(state)

    def expand(self, state: State) -> None:
        """Run each action of each live process, to its end and up to each store; let each process die at any time."""
        words, dead = state
        before = describe(words)
        for slot in before.members - dead:
            self.reach(words, dead | {slot})
        for actor, action, outcome, behind in moves(words, dead):
            _, states = self.machine.run(words, action)
            assert describe(states[-1]) == outcome
            self.reach(states[-1], dead & outcome.members)
            for partly in states[1:-1]:
                members = describe(partly).members
                self.reach(partly, (dead | {actor}) & members)
                # As if the action was done, or was not begun; a member that is reclaimed in part is reclaimed by the
                # next member.
                gone = (actor,) if behind is None else (behind, actor)
                possible = [self.model_of(scene, gone) for scene in (before, outcome)]
                assert self.after_reclaiming(partly, gone) in possible

    def model_of(self, scene: Scene, gone: tuple[int, ...]) -> Scene:
        """Return the expected scene after some members were reclaimed."""
        for slot in gone:
            scene = departed(scene, slot)
        return scene

    def after_reclaiming(self, words: Words, gone: tuple[int, ...]) -> Scene:
        """Return the scene after some members were reclaimed."""
        key = canonical(words), gone
        if key not in self.cleaned:
            left = key[0]
            for slot in gone:
                who = member(left, slot)
                left = self.machine.run(left, lambda t, who=who: t.reclaim(who))[1][-1]
            self.cleaned[key] = describe(left)
        return self.cleaned[key]

    def check(self, state: State) -> None:
        """Check that the invariants hold, and that nothing is left after all are dead and reclaimed, in any order."""
        words = state.words
        self.machine.run(words, Table.validate)
        scene = describe(words)
        for slot in set(SLOTS) - scene.members:
            assert not any(words[AT[place]] for place in _CLAIM[slot]), "a slot without a member has a claim"
        extents = sorted(entry[1:3] for entry in scene.rows if entry)
        assert all(first[0] + first[1] <= second[0] for first, second in itertools.pairwise(extents))
        for order in (SLOTS, SLOTS[::-1]):
            assert self.after_reclaiming(words, order) == Scene(frozenset(), (None, None))


def test_every_reachable_state_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation has the expected result; if its process dies during it, a reclaim restores a valid state."""
    # There are no roles in these states, and looking for them would take most of the time.
    monkeypatch.setattr(roles, "WORDS", roles._ENTRY)
    search = Search()
    search.run()
    print(f"{len(search.seen)} states, {search.transitions} transitions")
    assert len(search.seen) > 1000
