"""A worker receives values of another node: they land, are found at home, and are right whoever answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from two_arenas import *  # noqa: F403 - pytest looks for fixtures here
from two_arenas import fill, published_in, received

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.seams import requests
from dask_shm_plugin.transfer import landing as landing_module
from dask_shm_plugin.transfer.between_nodes import NodeRequest
from dask_shm_plugin.transfer.flights import AnswerToNode, Flights
from dask_shm_plugin.transfer.landing import Landing
from dask_shm_plugin.values import index, parcels
from dask_shm_plugin.values.handles import Deferred, Unresolved

HERE = "tcp://10.0.0.1:1"


def request(arena: Arena) -> NodeRequest:
    """Return the request of a member of an arena."""
    return NodeRequest(arena.arena_id.hex(), arena.member, frozenset(), frozenset())


def with_landing(arena: Arena, test: Callable[[Landing], Awaitable[None]]) -> None:
    """Run a test on an event loop, with the landing of a worker."""

    async def run() -> None:
        landing = Landing(arena, HERE, lambda key: True)
        try:
            await test(landing)
        finally:
            landing.stop()

    asyncio.run(run())


def test_a_value_that_had_no_room_is_not_listed_as_a_value(
    two_arenas: tuple[Arena, Arena], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker that stores it would answer its neighbours with nothing, and their tasks would wait for ever."""
    here, there = two_arenas
    value = np.random.default_rng(0).random(100_000)
    parcel = received(parcels.message_of(published_in(here, value), here))

    async def test(landing: Landing) -> None:
        fill(monkeypatch)
        arrived = await landing.land("x", parcel, HERE)
        np.testing.assert_array_equal(arrived, value)
        assert landing.handle_of("x", arrived) is None

    with_landing(there, test)


def test_a_value_that_has_landed_is_listed_by_the_worker_that_stores_it(two_arenas: tuple[Arena, Arena]) -> None:
    """And only if it stores this very object."""
    here, there = two_arenas
    sent = published_in(here, np.random.default_rng(0).random(100_000))

    async def test(landing: Landing) -> None:
        for is_same in (True, False):
            arrived = await landing.land("x", received(parcels.message_of(sent, here)), HERE)
            handle = landing.handle_of("x", arrived if is_same else arrived.copy())
            assert (handle is not None and handle.version == sent.handle.version) is is_same

    with_landing(there, test)


def test_a_member_that_answers_as_such_is_understood(two_arenas: tuple[Arena, Arena]) -> None:
    """The process may not know yet that the worker is in its arena; a handle that cannot be used is asked for again."""
    _, there = two_arenas
    value = np.random.default_rng(0).random(100_000)
    published = published_in(there, value)
    asked: list[Any] = []

    async def ask(keys: Any, names: list[str]) -> Any:
        asked.append((sorted(keys), requests.BYTES_PLEASE in requests.untag(names)[0]))
        first = {"x": Deferred(published.handle), "y": Unresolved("stale", 1), "z": 1}
        data = first if len(asked) == 1 else {"y": 2}
        return {"status": "OK", "data": {key: data[key] for key in keys}}

    async def test(landing: Landing) -> None:
        response = await landing.fetch(ask, answers, ["x", "y", "z"], [], "tcp://there", None)
        np.testing.assert_array_equal(response["data"].pop("x"), value)
        assert response["data"] == {"y": 2, "z": 1}
        assert asked == [(["x", "y", "z"], False), (["y"], True)]

    with_landing(there, test)


async def answers(address: str) -> bool:
    """Say that a sender answers."""
    return True


@pytest.mark.parametrize("is_soon", [True, False])
def test_a_sender_that_is_busy_in_between_is_asked_again(
    two_arenas: tuple[Arena, Arena], monkeypatch: pytest.MonkeyPatch, is_soon: bool
) -> None:
    """Dask would drop what has arrived; a sender that stays busy is left to Dask, as one that is busy at first."""
    monkeypatch.setattr(landing_module, "_BUSY_S", 0.001)
    _, there = two_arenas
    asked: list[Any] = []

    async def ask(keys: Any, names: list[str]) -> Any:
        asked.append(sorted(keys))
        if len(asked) == 1:
            return {"status": "OK", "data": {"x": 1, "y": Unresolved("stale", 1)}}
        return {"status": "OK", "data": {"y": 2}} if is_soon and len(asked) == 4 else {"status": "busy"}

    async def test(landing: Landing) -> None:
        response = await landing.fetch(ask, answers, ["x", "y"], [], "tcp://there", None)
        assert response == ({"status": "OK", "data": {"x": 1, "y": 2}} if is_soon else {"status": "busy"})
        assert asked[1:] == [["y"]] * (len(asked) - 1)
        count = len(asked)
        assert (await landing.fetch(ask, answers, ["x"], [], "tcp://there", None))["status"] == "busy"
        assert len(asked) == count + 1

    with_landing(there, test)


@pytest.mark.parametrize("count", [1, 5, 30, 100])
def test_a_value_whose_handle_cannot_be_listed_is_not_waited_for(two_arenas: tuple[Arena, Arena], count: int) -> None:
    """Its neighbours could not find it. The rule is the same on each node, whatever the places of the frames are."""
    here, there = two_arenas
    sent = published_in(here, [np.random.default_rng(n).random(10_000) for n in range(count)])
    listable = index.is_listable(sent.handle)
    landed, _ = received(parcels.message_of(sent, here)).landed(there)
    assert landed is not None
    for arena, handle in ((here, sent.handle), (there, landed.handle)):
        if listable:
            assert arena.directory.add(b"name", handle.to_bytes())
            arena.directory.remove(b"name")
    flights = Flights()
    answer = AnswerToNode(flights, request(there), here)
    answer.message_for(sent)
    assert (flights.receiver_of(request(there), sent.handle.version) is None) is not listable
    answer.over(has_arrived=False)
    assert listable is (count <= 5)
