"""Of the workers of a node that want one value from several senders, one asks, and the others wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from distributed.comm import CommClosedError, listen

from dask_shm_plugin.table.members import Member
from dask_shm_plugin.transfer import asking, fetch
from dask_shm_plugin.transfer.asking import Turn

KEYS = ["x"]


class Node:
    """The directories of the workers of a node."""

    def __init__(self) -> None:
        self.listed: dict[Member, dict[bytes, bytes]] = {}
        self.step: Callable[[], None] = lambda: None
        """Called before each access to a directory."""

    def arena(self, slot: int) -> Any:
        """Return the arena from the point of view of a worker."""
        member = Member(slot, 1)
        own = self.listed.setdefault(member, {})

        def add(name: bytes, data: bytes) -> None:
            self.step()
            own[name] = data

        def find(other: Member, name: bytes) -> bytes | None:
            self.step()
            return self.listed[other].get(name)

        directory = SimpleNamespace(add=add, find=find, remove=lambda name: own.pop(name, None))
        roster = SimpleNamespace(workers=lambda: {f"tcp://{one.slot}": [one] for one in self.listed})
        return SimpleNamespace(member=member, directory=directory, roster=roster)


def turn_of(arena: Any, keys: list[str], sender: str, *gone: str) -> Turn:
    """Return the turn of a worker that gets answers from all senders but some."""

    async def answers(address: str) -> bool:
        return address not in gone

    return Turn(arena, keys, sender, answers)


def may_ask(turn: Turn) -> bool:
    """Return whether it is the turn of a worker."""
    return turn._take("x")


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
def test_a_worker_waits_while_a_neighbour_asks_another_sender(first: int, second: int) -> None:
    """It goes on when the neighbour ends, and so does one that the neighbour's death has set free."""
    node = Node()
    one, other = turn_of(node.arena(first), KEYS, "tcp://a"), turn_of(node.arena(3), KEYS, "tcp://b")
    assert may_ask(one)
    late = turn_of(node.arena(second), KEYS, "tcp://b")
    assert [may_ask(late), may_ask(other), may_ask(one)] == [False, False, True]
    one.end()
    assert may_ask(late)
    assert may_ask(other)  # the same sender decides for these two
    late.end()
    other.end()
    assert not any(node.listed.values())


def test_a_worker_waits_for_one_neighbour_at_most() -> None:
    """A value that does not land would otherwise reach the workers of a node one after the other."""
    node = Node()
    all_turns = [turn_of(node.arena(slot), KEYS, f"tcp://{slot}") for slot in (1, 2, 3)]
    assert [may_ask(turn) for turn in all_turns] == [True, False, False]
    all_turns[0].end()
    assert [may_ask(turn) for turn in all_turns[1:]] == [True, True]


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped neighbour keeps nobody waiting for ever, and other keys of the request do not wait for it."""
    node = Node()
    assert may_ask(turn_of(node.arena(1), KEYS, "tcp://a"))
    turn = turn_of(node.arena(2), ["x", "y"], "tcp://b")
    assert asyncio.run(turn.of(["x", "y"])) == ["y"]
    assert len(node.listed[turn._arena.member]) == 1, "a neighbour need not wait for a key that is not asked for"
    turn.end(["y"])
    monkeypatch.setattr(asking.time, "monotonic", lambda: float("inf"))
    assert asyncio.run(turn.of(["x"])) == ["x"]
    assert asyncio.run(turn.of([])) == []


def test_a_neighbour_whose_sender_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker asks its own sender then, and another neighbour waits for that, and for no other one."""
    monkeypatch.setattr(asking, "_LOOK_S", 0.01)
    monkeypatch.setattr(asking, "_PATIENCE_S", float("inf"))
    node = Node()
    assert may_ask(turn_of(node.arena(1), KEYS, "tcp://down"))

    async def run() -> None:
        turn = turn_of(node.arena(2), KEYS, "tcp://b", "tcp://down")
        late = turn_of(node.arena(3), KEYS, "tcp://c", "tcp://down")
        assert await turn.of(KEYS) == KEYS
        waiting = asyncio.ensure_future(late.of(KEYS))
        while b"tcp://down" not in late._gone:
            await asyncio.sleep(0.001)
        assert not may_ask(late)
        turn.end()
        assert await waiting == KEYS

    asyncio.run(run())


def test_a_neighbour_is_waited_for_while_its_sender_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often that is asked; the looks end with the waiting."""
    monkeypatch.setattr(asking, "_LOOK_S", 0.001)
    node, looks = Node(), list[str]()

    async def answers(address: str) -> bool:
        looks.append(address)
        if len(looks) == 5:
            first.end()
        return True

    first = turn_of(node.arena(1), KEYS, "tcp://a")
    assert may_ask(first)
    turn = Turn(node.arena(2), KEYS, "tcp://b", answers)

    async def run() -> None:
        assert await turn.of(KEYS) == KEYS
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:  # it is cancelled, and may wait for what it has cancelled itself
            await asyncio.wait(left, timeout=60)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
    assert len(looks) >= 5
    assert set(looks) == {"tcp://a"}


@pytest.mark.parametrize("state", ["answers", "gone", "stopped"])
def test_a_sender_answers_only_if_its_process_runs(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    """The kernel accepts connections for a stopped process, too. No connection is left."""
    rpc, closed = SimpleNamespace(connection_args={}), asyncio.Event()

    async def handle(comm: Any) -> None:
        with contextlib.suppress(CommClosedError):
            await comm.read()
        closed.set()

    async def run() -> bool:
        if state == "answers":
            async with await listen("tcp://127.0.0.1:0", handle) as listener:
                does_answer = await fetch._answers(rpc, listener.contact_address)
                await closed.wait()
                return does_answer
        monkeypatch.setattr(fetch, "_ANSWER_TIMEOUT_S", 0.1)
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
            if state == "stopped":
                return await fetch._answers(rpc, address)
        return await fetch._answers(rpc, address)

    assert asyncio.run(run()) is (state == "answers")


def orders(lengths: tuple[int, int]) -> Iterator[list[int]]:
    """Return all orders of the steps of two workers, as the numbers of the workers."""
    count = sum(lengths)
    for places in itertools.combinations(range(count), lengths[0]):
        yield [0 if place in places else 1 for place in range(count)]


@pytest.mark.parametrize("slots", [(1, 2), (2, 1)])
def test_two_workers_never_ask_both(slots: tuple[int, int]) -> None:
    """Whatever the order of their steps, and one of them asks in the end."""
    for order in orders((6, 6)):
        asked = run_in(order, slots)
        assert sum(asked) <= 1, order


def run_in(order: list[int], slots: tuple[int, int]) -> list[bool]:
    """Let two workers make their accesses to the directories in some order; return which of them ask then."""
    node, asked = Node(), [False, False]
    arenas = [node.arena(slot) for slot in slots]
    following, changed = iter([*order, None]), threading.Condition()
    state: dict[str, Any] = {"next": next(following), "done": set()}
    numbers: dict[int, int] = {}

    def advance() -> None:
        state["next"] = next(following, None)
        while state["next"] in state["done"]:
            state["next"] = next(following, None)
        changed.notify_all()

    def step() -> None:
        number = numbers[threading.get_ident()]
        with changed:
            changed.wait_for(lambda: state["next"] in (number, None))
            if state["next"] == number:
                advance()

    def work(number: int) -> None:
        numbers[threading.get_ident()] = number
        turn = turn_of(arenas[number], KEYS, f"tcp://{number}")
        asked[number] = may_ask(turn)
        with changed:
            state["done"].add(number)
            if state["next"] == number:
                advance()

    node.step = step
    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return asked
