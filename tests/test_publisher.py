"""The publications of one worker, and what may happen while one is under way. Gates decide the order, never time."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from distributed.spill import SpillBuffer
from observing import wait_until

from dask_shm_plugin import codec, handles, membership, publisher
from dask_shm_plugin.codec import Context, Published, Serialized
from dask_shm_plugin.publisher import Publisher
from dask_shm_plugin.worker_data import WorkerData

THRESHOLD = 1 << 16

#: No other run of these tests has it.
CLUSTER = f"test-{os.getpid()}"


def in_loop(test):
    """Run a test that is a coroutine."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return run


@pytest.fixture
def arena():
    """An arena that this process is a member of, and that must be empty in the end."""
    arena = membership.join(CLUSTER, "worker", "here", capacity=lambda: 1 << 26)
    yield arena
    try:
        wait_until_empty(arena)
    finally:
        membership.leave(CLUSTER, "worker", "here")


def wait_until_empty(arena):
    """Wait until nothing is held; the thread that made a value may hold it a moment longer than the loop."""
    wait_until(lambda: (gc.collect(), arena.holdings.tidy(), arena.stats().used)[2] == 0, "the arena is empty")


class Gate:
    """Stops whoever calls a function, until it is opened."""

    def __init__(self, monkeypatch, module, name, when):
        self.reached, self._open = threading.Event(), threading.Event()
        self.calls = 0
        before = getattr(module, name)

        def gated(*args):
            self.calls += 1
            result = before(*args) if when == "after" else None
            self.reached.set()
            assert self._open.wait(30)
            return before(*args) if when == "before" else result

        monkeypatch.setattr(module, name, gated)

    async def wait(self):
        """Wait until somebody stands before the gate."""
        assert await asyncio.to_thread(self.reached.wait, 30)

    def open(self):
        """Let everybody pass."""
        self._open.set()


@pytest.fixture(params=["dict", "spilling"])
def data(request, tmp_path):
    """The data of a worker: Dask's own dict, or one that spills."""
    return {} if request.param == "dict" else SpillBuffer(str(tmp_path), target=1 << 24)


class Worker:
    """The data of one worker, and what it publishes of them."""

    def __init__(self, arena, data, **values):
        owners = (SimpleNamespace(data=data), SimpleNamespace(data=data))
        watched = WorkerData(data, owners)
        self.data = owners[0].data
        for key, value in values.items():
            self.data[key] = value
        self.publisher = Publisher(arena, THRESHOLD, watched, "tcp://here")

    async def answer(self, key):
        """Answer a request, and wait until what may follow has followed."""
        ask = self.publisher.ask([key])
        value = self.data[key]
        ask.has_read()
        try:
            published = await self.publisher.publish(key, value, functools.partial(serialize, value))
        finally:
            del value
            self.publisher.answered(ask)
        await self.settled()
        return published

    async def settled(self):
        """Wait until nothing is under way."""
        while self.publisher._background:
            await asyncio.wait(self.publisher._background)

    def is_shared(self, key):
        """Tell whether the value of a key lies in the arena; reads nothing that counts."""
        return codec.is_shared(self.publisher._data.in_memory(key))

    def close(self):
        """Drop everything."""
        self.publisher.close()


async def serialize(value):
    """Serialize a value as for nobody in particular."""
    return Serialized.of(value, {})


def big(seed=0):
    """Return an array above the threshold."""
    return np.random.default_rng(seed).random(THRESHOLD // 4)


def listed(arena):
    """Return how many values are listed."""
    return len(arena.directory._names)


@in_loop
async def test_a_result_is_published_once_adopted_and_listed(arena, data):
    """The private copy gives way to the shared one, and the next asker gets the same handle."""
    ours = Worker(arena, data, x=big())
    first = await ours.answer("x")
    assert ours.is_shared("x")
    np.testing.assert_array_equal(ours.data["x"], big())
    assert listed(arena) == 0, "it was just read"
    assert await ours.answer("x") is first
    assert listed(arena) == 1
    ours.close()


@in_loop
async def test_one_object_under_two_keys_stays_private_and_one(arena, data):
    """A task that returns its input as it came makes no second value, here as in stock Dask."""
    value = big()
    ours = Worker(arena, data, x=value, y=value)
    del value
    published = await ours.answer("x")
    assert ours.data["y"] is ours.data["x"]
    assert not ours.is_shared("x")
    assert listed(arena) == 0
    ours.data["y"][0] = 7
    again = await ours.answer("x")
    assert again is not published
    assert handles.resolve(again.handle)[0] == 7
    ours.close()


@in_loop
async def test_what_is_too_small_is_serialized_once(arena, data):
    """To find out that it is small, and for the answer."""
    ours = Worker(arena, data, x=(1, [2, 3]))
    serialized = await ours.answer("x")
    assert isinstance(serialized, Serialized)
    assert serialized.size < THRESHOLD
    assert not ours.publisher._entries
    ours.close()


@in_loop
async def test_many_askers_make_one_copy(arena, monkeypatch, data):
    """All that come while a publication is under way await that one, and the last one leaves the value alone."""
    gate = Gate(monkeypatch, codec, "publish", "before")
    ours = Worker(arena, data, x=big())
    askers = [asyncio.create_task(ours.answer("x")) for _ in range(20)]
    await gate.wait()
    gate.open()
    answers = await asyncio.gather(*askers)
    assert gate.calls == 1
    assert len({id(answer) for answer in answers}) == 1
    assert ours.is_shared("x")
    assert listed(arena) == 1
    ours.close()


@in_loop
async def test_an_asker_that_goes_away_takes_nobody_along(arena, monkeypatch, data):
    """Cancelling the one that began a publication leaves the others theirs."""
    gate = Gate(monkeypatch, codec, "publish", "before")
    ours = Worker(arena, data, x=big())
    first, second = (asyncio.create_task(ours.answer("x")) for _ in range(2))
    await gate.wait()
    first.cancel()
    gate.open()
    assert isinstance(await second, Published)
    with pytest.raises(asyncio.CancelledError):
        await first
    ours.close()


STEPS = {"publish": (codec, "publish"), "rebuild": (publisher, "_rebuild")}
at_each_step = pytest.mark.parametrize("step", STEPS)
before_and_after = pytest.mark.parametrize("when", ["before", "after"])


@before_and_after
@at_each_step
@in_loop
async def test_a_key_released_meanwhile_stays_released(arena, monkeypatch, data, step, when):
    """Neither value nor record comes back, whichever step the release met."""
    gate = Gate(monkeypatch, *STEPS[step], when)
    ours = Worker(arena, data, x=big())
    asker = asyncio.create_task(ours.answer("x"))
    await gate.wait()
    del ours.data["x"]
    gate.open()
    assert isinstance(await asker, Published)
    assert not ours.data
    assert "0 published, 0 under way" in repr(ours.publisher)
    ours.close()


@before_and_after
@at_each_step
@in_loop
async def test_a_key_used_again_meanwhile_keeps_its_new_value(arena, monkeypatch, data, step, when):
    """An old publication answers for nothing but the object that it was made from."""
    gate = Gate(monkeypatch, *STEPS[step], when)
    ours = Worker(arena, data, x=big(1))
    asker = asyncio.create_task(ours.answer("x"))
    await gate.wait()
    ours.data["x"] = new = big(2)
    gate.open()
    await asker
    assert ours.data["x"] is new
    del new
    published = await ours.answer("x")
    np.testing.assert_array_equal(handles.resolve(published.handle), big(2))
    ours.close()


@before_and_after
@at_each_step
@in_loop
async def test_a_value_spilled_meanwhile_stays_on_disk(arena, monkeypatch, tmp_path, step, when):
    """Adoption does not bring it back, and its record does not keep its block."""
    gate = Gate(monkeypatch, *STEPS[step], when)
    ours = Worker(arena, SpillBuffer(str(tmp_path), target=1 << 24), x=big())
    asker = asyncio.create_task(ours.answer("x"))
    await gate.wait()
    assert ours.data.evict() > 0
    gate.open()
    await asker
    assert "x" not in ours.data.fast
    np.testing.assert_array_equal(ours.data["x"], big())
    assert "0 published, 0 under way" in repr(ours.publisher)
    ours.close()


@in_loop
async def test_a_value_that_is_spilled_gives_its_block_back(arena, tmp_path):
    """What only this worker holds is an ordinary value: on disk, it takes no shared memory."""
    ours = Worker(arena, SpillBuffer(str(tmp_path), target=1 << 24), x=big())
    await ours.answer("x")
    assert ours.is_shared("x")
    await asyncio.sleep(0)  # the loop itself still has the answer in its hand
    ours.data.evict()
    wait_until_empty(arena)
    np.testing.assert_array_equal(ours.data["x"], big())
    ours.close()


class Model:
    """What a user might write: pickling drops a cache."""

    def __init__(self):
        self.weights, self.cache = big(), {"warm": True}

    def __getstate__(self):
        return {"weights": self.weights, "cache": None}


@in_loop
async def test_a_class_of_the_users_is_shared_for_the_transport_only(arena, data):
    """Its owner keeps the object, cache and all; its readers get what Dask would have sent, and ask for it."""
    ours = Worker(arena, data, m=Model())
    model = ours.data["m"]
    published = await ours.answer("m")
    assert ours.data["m"] is model
    assert handles.resolve(published.handle).cache is None
    assert await ours.answer("m") is published
    assert listed(arena) == 0
    model.weights[0] = 7
    assert handles.resolve((await ours.answer("m")).handle).weights[0] == 7
    ours.close()


class Fresh(dict):
    """A mapping that makes a new object each time."""

    def __getitem__(self, key):
        return super().__getitem__(key).copy()


@pytest.mark.parametrize("kind", [dict, Fresh])
@in_loop
async def test_of_a_mapping_of_the_users_nothing_is_remembered(arena, kind):
    """Nobody is told who reads it, and it may make a new object each time."""
    data = kind(x=big())
    ours = Publisher(arena, THRESHOLD, WorkerData(data), "tcp://here")
    ask, value = ours.ask(["x"]), data["x"]
    ask.has_read()
    assert isinstance(await ours.publish("x", value, functools.partial(serialize, value)), Published)
    ours.answered(ask)
    assert "0 published" in repr(ours)
    assert listed(arena) == 0
    ours.close()


@before_and_after
@at_each_step
@in_loop
async def test_what_is_under_way_when_the_plugin_leaves_is_not_kept(arena, monkeypatch, data, step, when):
    """Nobody would take it back."""
    gate = Gate(monkeypatch, *STEPS[step], when)
    ours = Worker(arena, data, x=big())
    asking = asyncio.create_task(ours.answer("x"))
    await gate.wait()
    ours.close()
    gate.open()
    await asyncio.wait([asking])
    assert asking.exception() is None or isinstance(asking.exception(), RuntimeError)
    assert not ours.publisher._entries
    assert listed(arena) == 0


def read(data):
    """Read as a task does, or whoever knows the worker."""
    assert len(data["x"])


def read_all(data):
    """Read all values, whatever their keys."""
    assert all(len(value) for value in data.values())


def read_memory(data):
    """Read what is in memory."""
    memory = data.memory if hasattr(data, "memory") else data
    assert all(len(value) for _, value in memory.items())


def drop(data):
    """Release."""
    del data["x"]


def replace(data):
    """Put another value in its place."""
    data["x"] = big(3)


@pytest.mark.parametrize("how", [read, read_all, read_memory, drop, replace])
@in_loop
async def test_what_is_published_is_listed_until_somebody_comes_by_it(arena, data, how):
    """Whoever reads, replaces or drops a value withdraws its listing before anything else happens."""
    ours = Worker(arena, data, x=big())
    await ours.answer("x")
    assert listed(arena) == 1
    how(ours.data)
    assert listed(arena) == 0
    ours.close()


@in_loop
async def test_what_somebody_still_holds_is_not_listed_again(arena, data):
    """Only when nothing else reaches it."""
    ours = Worker(arena, data, x=big())
    await ours.answer("x")
    held = ours.data["x"][:5]
    await ours.answer("x")
    assert listed(arena) == 0
    held[0] = 42
    assert handles.resolve((await ours.answer("x")).handle)[0] == 42
    del held
    await ours.answer("x")
    assert listed(arena) == 1
    ours.close()


@before_and_after
@at_each_step
@in_loop
async def test_what_somebody_has_had_meanwhile_stays_as_it_is_left(arena, monkeypatch, data, step, when):
    """It writes in place and lets go before the copy is made, or the private value given up."""
    gate = Gate(monkeypatch, *STEPS[step], when)
    ours = Worker(arena, data, x=big())
    asking = asyncio.create_task(ours.answer("x"))
    await gate.wait()
    ours.data["x"][:] = 7
    gate.open()
    await asking
    assert ours.data["x"][0] == 7
    assert listed(arena) == 0
    again = await ours.answer("x")
    np.testing.assert_array_equal(handles.resolve(again.handle), np.full_like(big(), 7))
    ours.close()


@in_loop
async def test_who_asks_after_a_write_joins_no_publication_from_before(arena, monkeypatch, data):
    """Though it is under way: its copy was made of what the value was."""
    gate = Gate(monkeypatch, codec, "publish", "after")
    ours = Worker(arena, data, x=big())
    before = asyncio.create_task(ours.answer("x"))
    await gate.wait()
    ours.data["x"][:] = 7
    after = asyncio.create_task(ours.answer("x"))
    await asyncio.sleep(0)
    gate.open()
    np.testing.assert_array_equal(handles.resolve((await after).handle), np.full_like(big(), 7))
    assert isinstance(await before, Published)
    ours.close()


@in_loop
async def test_what_is_written_while_a_value_is_given_up_is_not_lost(arena, monkeypatch, data):
    """Somebody takes the value after it was last seen to be alone, and has not told yet."""
    ours = Worker(arena, data, x=big())
    settled, watched = Publisher._is_settled, ours.publisher._data

    async def write_afterwards(self, key, entry, known):
        answer = await settled(self, key, entry, known)
        if answer and not ours.is_shared("x"):
            ours.data["x"][0] = 42
        return answer

    monkeypatch.setattr(Publisher, "_is_settled", write_afterwards)
    await ours.answer("x")
    assert watched.in_memory("x")[0] == 42
    assert handles.resolve((await ours.answer("x")).handle)[0] == 42
    ours.close()


@in_loop
async def test_what_cannot_be_published_is_offered_once(arena, data):
    """Nobody has asked: it is not serialized again and again."""
    ours, times = Worker(arena, data, x=np.ones(10)), []

    async def counting(value):
        times.append(1)
        return Serialized.of(value, {})

    await ours.publisher.offer("x", counting)
    for _ in range(3):
        ours.publisher.prune(counting)
        await ours.settled()
    assert len(times) == 1
    assert not ours.publisher._entries
    ours.close()


@in_loop
async def test_keys_that_are_equal_are_one(arena, data):
    """Dask finds under 1.0 what it has under 1."""
    ours = Worker(arena, data)
    ours.data["x", 1] = big()
    await ours.answer(("x", 1.0))
    assert listed(arena) == 1
    del ours.data["x", 1]
    assert listed(arena) == 0
    ours.close()


class Once:
    """A class whose instances pickle once only, at some size."""

    def __init__(self, size):
        self.data, self.pickles = np.ones(size), 0

    def __getstate__(self):
        self.pickles += 1
        assert self.pickles == 1, "pickled twice"
        return {"data": self.data, "pickles": 0}


@pytest.mark.parametrize("size", [10, THRESHOLD])
@in_loop
async def test_a_value_is_pickled_once_for_an_answer(arena, data, size):
    """Whether it turns out to be shared or not."""
    ours = Worker(arena, data, x=Once(size))
    await ours.answer("x")
    assert ours.data["x"].pickles == 1
    ours.close()


LOOKS = {
    "item": lambda context: context["recipient"],
    "get": lambda context: context.get("recipient"),
    "in": lambda context: "recipient" in context,
    "dict": dict,
    "unpacked": lambda context: {**context},
    "merged": lambda context: {} | context,
    "list": list,
    "reversed": lambda context: list(reversed(context)),
    "items": lambda context: list(context.items()),
    "values": lambda context: list(context.values()),
    "text": str,
    "formatted": lambda context: f"{context}",
    "compared": lambda context: context == {},
    "pop": lambda context: context.pop("recipient"),
    "popitem": lambda context: context.popitem(),
    "setdefault": lambda context: context.setdefault("recipient", 1),
    "copied": lambda context: context.copy()["recipient"],
}


@pytest.mark.parametrize("how", LOOKS)
def test_a_serializer_that_looks_for_whom_it_works_is_noticed(how):
    """In whichever way it looks; the version of pickle is everybody's."""
    context = Context({"sender": 1, "recipient": 2, "pickle-protocol": 5})
    assert context
    assert context.get("pickle-protocol") == context["pickle-protocol"] == 5
    assert not context.is_personal
    LOOKS[how](context)
    assert context.is_personal


class Personal:
    """A value whose serializer asks for whom it is."""


@in_loop
async def test_what_is_meant_for_one_recipient_is_sent_to_no_other(arena, data):
    """Each asker gets what was serialized for it."""
    ours = Worker(arena, data, x=Personal())

    async def serialize_for(recipient):
        return Serialized({}, [recipient * THRESHOLD], THRESHOLD, True)

    value = ours.data["x"]
    answers = await asyncio.gather(
        *(ours.publisher.publish("x", value, functools.partial(serialize_for, name)) for name in (b"a", b"b", b"c"))
    )
    assert [answer.frames[0][:1] for answer in answers] == [b"a", b"b", b"c"]
    assert arena.stats().blocks == 0
    ours.close()
