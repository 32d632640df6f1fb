"""What comes from another node is received into the arena and sealed there, or is right all the same."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from distributed.comm import CommClosedError, connect, listen
from distributed.comm.tcp import TCP
from distributed.security import Security
from observing import wait_until
from two_arenas import *  # noqa: F403 - pytest looks for fixtures here
from two_arenas import published_in

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.receptions import Reception
from dask_shm_plugin.exceptions import NoHeadRoom
from dask_shm_plugin.metrics import COUNTERS
from dask_shm_plugin.transfer import receiving
from dask_shm_plugin.transfer.receiving import Receiving
from dask_shm_plugin.values import codec, handles, parcels
from dask_shm_plugin.values.codec import Published, Serialized

MIB = 1 << 20


def array(seed: int = 0, size: int = 2 * MIB) -> np.ndarray:
    """Return random doubles, which cannot be compressed."""
    return np.random.default_rng(seed).random(size // 8)


def frame() -> pd.DataFrame:
    """Return a DataFrame of several blocks, of which the lengths are no multiples of 64 bytes."""
    flags = np.random.default_rng(0).random(300_001) < 0.5
    return pd.DataFrame({"flag": flags, "x": array(0, 300_001 * 8), "n": np.arange(300_001, dtype="i2")})


VALUES: dict[str, Callable[[], Any]] = {
    "array": array,
    "Fortran": lambda: np.asfortranarray(array().reshape(-1, 512)),
    "DataFrame": frame,
    "dict": lambda: {"one": array(1), "text": "text", "two": array(2, 3 * MIB), "small": np.arange(10)},
}


def assert_equal(one: Any, other: Any) -> None:
    """Fail unless two of these values are equal."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other)
    else:
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def counted() -> Callable[[], dict[str, int]]:
    """Return how many values have been counted since the test began, by event."""
    before = COUNTERS.snapshot()
    return lambda: {
        event: COUNTERS.snapshot()[event]["count"] - before[event]["count"] for event in ("landed", "received")
    }


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pages of 256 KiB at a time."""
    monkeypatch.setattr(receiving, "_FIRST_STEP_BYTES", MIB // 4)
    monkeypatch.setattr(receiving, "_MAX_STEP_BYTES", MIB // 4)


@contextlib.contextmanager
def receiving_into(arena: Arena) -> Iterator[Receiving]:
    """Let the connections of this process receive into an arena."""
    one = Receiving(arena)
    try:
        yield one
    finally:
        one.stop()


@contextlib.asynccontextmanager
async def sender(
    send: Callable[[Any], Awaitable[Any]], scheme: str = "tcp", security: Security | None = None
) -> AsyncIterator[Any]:
    """Connect to a process that calls ``send`` with its end of each connection; yield the other end."""
    is_over, is_closed = asyncio.Event(), asyncio.Event()

    async def handle(comm: Any) -> None:
        await send(comm)
        await is_over.wait()
        comm.abort()
        is_closed.set()

    ours, theirs = (
        (security.get_connection_args("worker"), security.get_listen_args("scheduler")) if security else ({}, {})
    )
    async with await listen(f"{scheme}://127.0.0.1:0", handle, **theirs) as listener:
        comm = await connect(listener.contact_address, **ours)
        try:
            yield comm
        finally:
            comm.abort()
            is_over.set()
            await is_closed.wait()


def parcel_of(value: Any, arena: Arena) -> Any:
    """Return the message that carries a value from an arena to another node."""
    return parcels.message_of(published_in(arena, value), arena)


def send_all(*messages: Any) -> Callable[[Any], Awaitable[None]]:
    """Return a sender of some messages. Tornado keeps it after the test, but not the messages."""
    left = list(messages)

    async def send(comm: Any) -> None:
        while left:
            await comm.write(left.pop(0))

    return send


def landed(parcel: Any, arena: Arena) -> tuple[Published, Any]:
    """Let a parcel land."""
    published, value = parcel.landed(arena)
    assert published is not None
    return published, value


def assert_empty(arena: Arena) -> None:
    """Fail unless the arena has no block and no draft."""
    gc.collect()
    arena.holdings.tidy()
    assert arena.stats().blocks == 0
    assert arena.receptions.bytes_in_drafts() == 0


def deliver(here: Arena, there: Arena, value: Any, scheme: str = "tcp", security: Security | None = None) -> Any:
    """Send a value from one arena to the other, and return what has landed."""

    async def run() -> Any:
        message = {"status": "OK", "data": {"x": parcel_of(value, here)}}
        async with sender(send_all(message), scheme, security) as comm:
            return landed((await comm.read())["data"].pop("x"), there)

    with receiving_into(there):
        return asyncio.run(run())


# ------------------------------------------------------------------------------------------------------- into the arena


@pytest.mark.parametrize("kind", VALUES)
def test_a_value_is_received_into_one_block_and_not_copied(
    two_arenas: tuple[Arena, Arena], counted: Callable[[], dict[str, int]], kind: str
) -> None:
    """It is equal, aligned as if it had been copied, and the block goes with the value."""
    here, there = two_arenas
    value = VALUES[kind]()
    published, arrived = deliver(here, there, value)
    assert_equal(arrived, value)
    assert published.copied == 0
    assert counted() == {"landed": 1, "received": 1}
    assert there.stats().blocks == 1
    assert all(part.offset % 64 == 0 for part in published.handle.parts if isinstance(part, handles.Span))
    assert there.receptions.bytes_in_drafts() == 0
    del published, arrived
    assert_empty(there)


def test_what_a_task_writes_is_not_seen_by_neighbours(two_arenas: tuple[Arena, Arena]) -> None:
    """The received bytes were sealed: each view of them is copy-on-write."""
    here, there = two_arenas
    value = array()
    published, arrived = deliver(here, there, value)
    arrived[:] = 0
    assert_equal(handles.resolve(published.handle), value)


def test_two_values_of_one_message_have_a_block_each(
    two_arenas: tuple[Arena, Arena], counted: Callable[[], dict[str, int]]
) -> None:
    """The memory of one is free as soon as that value is dropped."""
    here, there = two_arenas
    values = {"x": array(1), "small": 1, "y": frame(), "z": array(2, 3 * MIB)}

    async def run() -> dict[str, Any]:
        data = {key: one if key == "small" else parcel_of(one, here) for key, one in values.items()}
        async with sender(send_all({"data": data})) as comm:
            received = (await comm.read())["data"]
            assert received.pop("small") == 1
            return {key: landed(parcel, there) for key, parcel in received.items()}

    with receiving_into(there):
        arrived = asyncio.run(run())
    for key, (published, value) in arrived.items():
        assert_equal(value, values[key])
        assert published.copied == 0
    assert counted() == {"landed": 3, "received": 3}
    del published, value, arrived["x"]
    gc.collect()
    there.holdings.tidy()
    assert there.stats().blocks == 2


@pytest.mark.parametrize("shard", [MIB, MIB + 24])
def test_sharded_frames_are_received_side_by_side(
    two_arenas: tuple[Arena, Arena],
    counted: Callable[[], dict[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    shard: int,
    small_steps: None,
) -> None:
    """Dask splits large frames, and each part arrives in memory of its own; here these lie one after the other."""
    here, there = two_arenas
    monkeypatch.setattr(TCP, "max_shard_size", shard)
    value = {"one": array(1, 5 * MIB), "two": array(2, 3 * MIB)}
    published, arrived = deliver(here, there, value)
    assert_equal(arrived, value)
    assert published.copied == 0
    assert counted() == {"landed": 1, "received": 1}


def test_a_scattered_value_is_received_behind_a_scheduler_that_hands_it_on(
    two_arenas: tuple[Arena, Arena], counted: Callable[[], dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler does not unpack it; the worker does, and the value is in the arena at once."""
    _, there = two_arenas
    monkeypatch.setattr(parcels.membership, "all_arenas", lambda: [there])
    value = {"one": array(1), "two": array(2)}

    async def run() -> Any:
        message = parcels.scatter_message_of(Serialized.of(value, {}))
        async with sender(send_all({"data": {"x": message}})) as first:
            first.deserialize = False
            handed_on = await first.read()
            async with sender(send_all(handed_on)) as comm:
                return (await comm.read())["data"]["x"]

    with receiving_into(there):
        arrived = asyncio.run(run())
    assert_equal(arrived, value)
    assert codec.is_shared(arrived)
    assert counted() == {"landed": 1, "received": 1}


def test_a_slow_connection_fills_the_memory_bit_by_bit(
    two_arenas: tuple[Arena, Arena], counted: Callable[[], dict[str, int]], small_steps: None
) -> None:
    """Each read of the socket gets less than was asked for."""
    here, there = two_arenas
    value = array(0, 3 * MIB)

    async def run() -> Any:
        async with sender(send_all(parcel_of(value, here))) as comm:
            read = comm.stream.read_from_fd
            comm.stream.read_from_fd = lambda buffer: read(memoryview(buffer)[:10_007])
            return landed(await comm.read(), there)

    with receiving_into(there):
        _, arrived = asyncio.run(run())
    assert_equal(arrived, value)
    assert counted() == {"landed": 1, "received": 1}


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_encrypted_values_are_received_into_the_arena(
    two_arenas: tuple[Arena, Arena], counted: Callable[[], dict[str, int]], tmp_path: Path
) -> None:
    """The connection decrypts them to where they shall lie."""
    here, there = two_arenas
    value = frame()
    cert, key = str(tmp_path / "cert"), str(tmp_path / "key")
    line = f"req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -keyout {key} -out {cert} -subj /CN=test"
    subprocess.run(["openssl", *line.split()], check=True, capture_output=True)
    files = {
        f"tls_{role}_{kind}": file for role in ("worker", "scheduler") for kind, file in (("cert", cert), ("key", key))
    }
    _, arrived = deliver(here, there, value, "tls", Security(tls_ca_file=cert, require_encryption=True, **files))
    assert_equal(arrived, value)
    assert counted() == {"landed": 1, "received": 1}


# ------------------------------------------------------------------------------------------------- landing by copying


def test_what_comes_by_a_web_socket_is_copied(
    two_arenas: tuple[Arena, Arena], counted: Callable[[], dict[str, int]]
) -> None:
    """That connection allocates its memory in another way."""
    here, there = two_arenas
    value = frame()
    _, arrived = deliver(here, there, value, "ws")
    assert_equal(arrived, value)
    assert counted() == {"landed": 1, "received": 0}


@pytest.mark.parametrize("kinds", ["small", "small random", "random small random", "random small"])
def test_compressed_frames_are_copied(
    two_arenas: tuple[Arena, Arena], counted: Callable[[], dict[str, int]], small_steps: None, kinds: str
) -> None:
    """Dask compresses those frames for which it is worth it, and unpacks them into memory of its own.

    A frame before them was received into a draft, all pages of which are not made.
    """
    here, there = two_arenas
    value = {
        number: np.zeros(MIB // 2) if kind == "small" else array(number) for number, kind in enumerate(kinds.split())
    }

    async def run() -> Any:
        async def send(comm: Any) -> None:
            comm.handshake_options["compression"] = "zlib"  # which Dask does not do between processes of one machine
            await comm.write({"x": parcel_of(value, here), "y": parcels.to_serialize(array(9, MIB))})

        async with sender(send) as comm:
            message = await comm.read()
            return message["y"], *landed(message.pop("x"), there)

    with receiving_into(there):
        beside, published, arrived = asyncio.run(run())
    assert_equal(arrived, value)
    assert_equal(beside, array(9, MIB))
    assert published.copied >= 4 * MIB
    assert counted() == {"landed": 1, "received": 0}
    del published, arrived
    assert_empty(there)  # a value beside it in the message, which still lives, does not lie there


def test_a_value_is_received_into_private_memory_where_the_arena_is_nearly_full(
    two_arenas: tuple[Arena, Arena], counted: Callable[[], dict[str, int]]
) -> None:
    """A quarter of the arena is for publishing; it lands all the same, as there is room."""
    here, there = two_arenas
    value = array(0, 4 * MIB)
    with there.draft(46 * MIB):
        _, arrived = deliver(here, there, value)
    assert_equal(arrived, value)
    assert counted() == {"landed": 1, "received": 0}


@pytest.mark.parametrize("made", [0, 1, 3])
def test_a_value_arrives_if_memory_ends_while_it_is_received(
    two_arenas: tuple[Arena, Arena], monkeypatch: pytest.MonkeyPatch, small_steps: None, made: int
) -> None:
    """What has arrived already is moved to private memory; a draft without all of its pages is never sealed."""
    here, there = two_arenas
    make_pages, calls = Reception.make_pages, []

    def until_none_are_left(self: Reception, end: int) -> None:
        calls.append(end)
        if len(calls) > made:
            raise NoHeadRoom("no memory")
        make_pages(self, end)

    monkeypatch.setattr(Reception, "make_pages", until_none_are_left)
    value = {"one": array(1), "two": array(2)}

    async def run() -> Any:
        async with sender(send_all(parcel_of(value, here))) as comm:
            return (await comm.read()).landed(there)

    with receiving_into(there):
        published, arrived = asyncio.run(run())
    assert len(calls) == made + 1
    assert_equal(arrived, value)
    arrived["one"][0] = arrived["two"][0] = 0
    del published, arrived
    assert_empty(there)


def test_a_value_that_does_not_land_gets_private_memory(two_arenas: tuple[Arena, Arena]) -> None:
    """A user's code must not have the memory into which was received: a forked child could not read it."""
    here, there = two_arenas
    value = array()

    async def run() -> Any:
        async with sender(send_all(parcel_of(value, here))) as comm:
            parcel = await comm.read()
            assert there.receptions.bytes_in_drafts() > 0
            return parcel.landed(None)

    with receiving_into(there):
        published, arrived = asyncio.run(run())
    assert published is None
    assert_empty(there)
    assert_equal(arrived, value)
    arrived[:] = 0


def test_other_messages_are_received_as_ever(two_arenas: tuple[Arena, Arena]) -> None:
    """Large arrays in them, and bytes that look like the end of an announcement, too."""
    _, there = two_arenas
    values = [array(), b"x" * MIB + parcels.announcement([MIB]), np.frombuffer(parcels.announcement([2**62]), "u1"), 1]

    async def run() -> Any:
        messages = [{"data": parcels.to_serialize(value)} for value in values]
        async with sender(send_all(*messages, *messages)) as comm:
            return [(await comm.read())["data"] for _ in range(2 * len(values))]

    with receiving_into(there):
        arrived = asyncio.run(run())
    for one, value in zip(arrived, values * 2, strict=True):
        assert_equal(one, value)
    del arrived, one
    assert_empty(there)


# ---------------------------------------------------------------------------------------------------------- interrupted


class Gate:
    """Holds up the making of pages after the first ones, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_reached, self.is_open = threading.Event(), threading.Event()
        make_pages, calls = Reception.make_pages, []

        def in_time(reception: Reception, end: int) -> None:
            calls.append(end)
            if len(calls) > 1:
                self.is_reached.set()
                assert self.is_open.wait(60)
            make_pages(reception, end)

        monkeypatch.setattr(Reception, "make_pages", in_time)

    async def reached(self) -> None:
        """Wait until the first bytes have been received."""
        while not self.is_reached.is_set():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("victim", ["sender", "receiver"])
def test_a_draft_is_given_up_if_its_message_breaks_off(
    two_arenas: tuple[Arena, Arena], monkeypatch: pytest.MonkeyPatch, small_steps: None, victim: str
) -> None:
    """The sender dies in the middle of it, or the receiver does not want it any more."""
    here, there = two_arenas
    gate, kept = Gate(monkeypatch), list[Any]()

    async def run() -> None:
        ends: list[Any] = []

        async def send(comm: Any) -> None:
            comm.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            await comm.write(parcel_of(array(0, 30 * MIB), here))
            ends.append(comm)

        async with sender(send) as comm:
            reading = asyncio.ensure_future(comm.read())
            await gate.reached()
            kept.extend(one() for one in there.receptions._open)  # as a closed stream keeps its memory
            assert there.receptions.bytes_in_drafts() > 0
            if victim == "sender":
                ends[0].abort()
            else:
                reading.cancel()
            gate.is_open.set()
            with pytest.raises((CommClosedError, asyncio.CancelledError)):
                await reading
            del reading

    with receiving_into(there):
        asyncio.run(run())
    wait_until(lambda: not there.receptions.bytes_in_drafts(), "the thread that makes pages is done")
    kept.clear()
    assert_empty(there)


@pytest.mark.parametrize("is_left", [False, True], ids=["switched off", "left"])
def test_a_message_that_is_under_way_when_sharing_ends_is_right(
    two_arenas: tuple[Arena, Arena], monkeypatch: pytest.MonkeyPatch, small_steps: None, is_left: bool
) -> None:
    """Its first bytes lie in the arena, the others do not; a process that leaves stays a member until then."""
    here, there = two_arenas
    gate, value = Gate(monkeypatch), array(0, 4 * MIB)

    async def run() -> Any:
        async with sender(send_all(parcel_of(value, here))) as comm:
            reading = asyncio.ensure_future(comm.read())
            await gate.reached()
            one.stop()
            if is_left:
                there.close()
            gate.is_open.set()
            return (await reading).landed(None if is_left else there)[1]

    one = Receiving(there)
    try:
        arrived = asyncio.run(run())
    finally:
        one.stop()
    assert_equal(arrived, value)
    arrived[:] = 0
    gc.collect()
    assert there.receptions.bytes_in_drafts() == 0


def test_what_is_being_received_is_the_process_s_own_memory(
    two_arenas: tuple[Arena, Arena], monkeypatch: pytest.MonkeyPatch, small_steps: None
) -> None:
    """It counts as stock Dask's private memory does, until it is sealed."""
    here, there = two_arenas
    gate, value = Gate(monkeypatch), array(0, 4 * MIB)

    async def run() -> Any:
        async with sender(send_all(parcel_of(value, here))) as comm:
            reading = asyncio.ensure_future(comm.read())
            await gate.reached()
            there.budget.measure()
            own = there.budget.own_memory(os.getpid()) - there.budget.private_memory(os.getpid())
            gate.is_open.set()
            return own, landed(await reading, there)

    with receiving_into(there):
        own, (published, _) = asyncio.run(run())
    assert 4 * MIB <= own <= 5 * MIB
    assert published.copied == 0
    assert there.receptions.bytes_in_drafts() == 0


def test_a_forked_child_receives_as_with_stock_dask(two_arenas: tuple[Arena, Arena]) -> None:
    """Its parent's arena is not its own, and the thread that makes pages does not exist in it."""
    _, there = two_arenas
    value = array()
    message = parcels.scatter_message_of(Serialized.of(value, {}))

    async def run() -> Any:
        async with sender(send_all(message)) as comm:
            return await comm.read()

    with receiving_into(there) as one:
        one.threads.submit(int).result()
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)  # a call in that thread would never end
            is_equal = False
            with contextlib.suppress(Exception):
                is_equal = np.array_equal(asyncio.run(run()), value)
            os._exit(not is_equal)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
