"""The sender decides which worker of a node receives a value, and what the others are told."""

from __future__ import annotations

import asyncio
import runpy
from types import SimpleNamespace
from typing import Any

import pytest

import dask_shm_plugin
from dask_shm_plugin.seams import requests
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.transfer import between_nodes, flights, rounds
from dask_shm_plugin.transfer.between_nodes import NodeRequest
from dask_shm_plugin.transfer.flights import Flights

VERSION = b"v" * 16
FIRST, SECOND = Member(1, 10), Member(2, 11)


def request(member: Member, *lost: Member, arena: str = "b") -> NodeRequest:
    """Return a request of a member of another node."""
    return NodeRequest(arena, member, frozenset(), frozenset(lost))


def test_a_request_is_read_as_it_was_written() -> None:
    """It passes through a list of serializers, behind the memberships of the process."""
    one = NodeRequest("ab", FIRST, frozenset({VERSION.hex()}), frozenset({SECOND}))
    asked_by, _ = requests.untag(requests.tagged(["ab:1:10", one.asker]))
    assert NodeRequest.among(asked_by) == one


@pytest.mark.parametrize("said", ["", "[1]", '["ab", 1, [], []]', "{"])
def test_a_damaged_request_is_none(said: str) -> None:
    """The process gets bytes."""
    assert NodeRequest.among([between_nodes._NODE + said, "bytes", "ab:1:2"]) is None


def test_a_request_of_another_version_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parcels may have another form, so its process gets bytes, also if the form of the request is the same."""
    theirs = []
    for version in ("0.0.9", "0.1.0.dev1", "99.0"):
        with monkeypatch.context() as patch:
            patch.setattr(dask_shm_plugin, "__version__", version)
            module = runpy.run_path(str(between_nodes.__file__))
        theirs.append(module["NodeRequest"]("ab", FIRST, frozenset(), frozenset()).asker)
    assert [NodeRequest.among([one]) for one in theirs] == [None] * 3
    assert NodeRequest.among([theirs[0].replace("0.0.9", dask_shm_plugin.__version__)]) == request(FIRST, arena="ab")


@pytest.mark.parametrize("version", ["99.0", None])
def test_workers_of_another_version_get_no_parcels(version: str | None) -> None:
    """A broadcast serves each of them as a worker without an arena."""

    async def identity(n_workers: int) -> Any:
        ours, theirs = {"arena": "ab", "version": dask_shm_plugin.__version__}, {"arena": "cd", "version": version}
        return {"workers": {"a": {"metrics": {"shm": ours}}, "b": {"metrics": {"shm": theirs}}, "c": {"metrics": {}}}}

    arenas = asyncio.run(rounds.arenas_of(SimpleNamespace(identity=identity), "abcd"))
    assert arenas == {"a": "ab", "b": None, "c": None, "d": None}


def test_neighbours_wait_for_the_first_one_and_other_nodes_do_not() -> None:
    """While a value is on its way to a node, later askers of that node are sent to its receiver."""
    all_flights = Flights()
    assert all_flights.receiver_of(request(FIRST), VERSION) is None
    all_flights.begin(request(FIRST), VERSION, 1)
    assert all_flights.receiver_of(request(SECOND), VERSION) == FIRST
    assert all_flights.receiver_of(request(SECOND), b"w" * 16) is None
    assert all_flights.receiver_of(request(SECOND, arena="c"), VERSION) is None


def test_nobody_waits_for_a_receiver_that_is_lost() -> None:
    """A worker that has waited in vain receives the value itself, and the others wait for it then."""
    all_flights = Flights()
    all_flights.begin(request(FIRST), VERSION, 1)
    assert all_flights.receiver_of(request(SECOND, FIRST), VERSION) is None
    all_flights.begin(request(SECOND, FIRST), VERSION, 1)
    assert all_flights.receiver_of(request(Member(3, 12), FIRST), VERSION) == SECOND


def test_a_failed_flight_is_forgotten_at_once_and_an_arrived_one_when_it_has_landed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the bytes have arrived, the receiver needs some time to put them into its arena."""
    now = [0.0]
    monkeypatch.setattr(flights.time, "monotonic", lambda: now[0])
    all_flights = Flights()
    all_flights.end(*all_flights.begin(request(FIRST), VERSION, 1), has_arrived=False)
    assert all_flights.receiver_of(request(SECOND), VERSION) is None
    all_flights.end(*all_flights.begin(request(FIRST), VERSION, 10**9), has_arrived=True)
    now[0] = 2.4
    assert all_flights.receiver_of(request(SECOND), VERSION) == FIRST
    now[0] = 2.6
    assert all_flights.receiver_of(request(SECOND), VERSION) is None


def test_the_end_of_an_earlier_flight_does_not_end_a_later_one() -> None:
    """The sender may notice the death of a receiver only after another worker has taken its place."""
    all_flights = Flights()
    earlier = all_flights.begin(request(FIRST), VERSION, 1)
    all_flights.begin(request(SECOND, FIRST), VERSION, 1)
    all_flights.end(*earlier, has_arrived=False)
    assert all_flights.receiver_of(request(FIRST), VERSION) == SECOND
