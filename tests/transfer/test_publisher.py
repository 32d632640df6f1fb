"""The publications of one worker, and events during a publication: gates decide their order, and never time."""

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

from dask_shm_plugin.node import membership
from dask_shm_plugin.seams.worker_data import WorkerData
from dask_shm_plugin.transfer import adopter, publisher
from dask_shm_plugin.transfer.adopter import Adopter
from dask_shm_plugin.transfer.publisher import Publisher
from dask_shm_plugin.values import codec, handles, index
from dask_shm_plugin.values.codec import Published, Serialized
from dask_shm_plugin.values.context import Context

THRESHOLD = 1 << 16

#: Unique to this run of the tests.
CLUSTER = f"test-{os.getpid()}"


def in_loop(test):
    """Run a coroutine as a test."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return run


@pytest.fixture
def arena():
    """An arena with this process as a member; it must be empty at the end."""
    arena = membership.join(CLUSTER, "worker", "here", capacity=lambda: 1 << 26)
    yield arena
    try:
        wait_until_empty(arena)
    finally:
        membership.leave(CLUSTER, "worker", "here")


def wait_until_empty(arena):
    """Wait until the arena is empty; the thread that made a value may hold it a moment longer than the loop."""
    wait_until(lambda: (gc.collect(), arena.holdings.tidy(), arena.stats().used)[2] == 0, "the arena is empty")


class Gate:
    """Stops the callers of a function until the gate is opened."""

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
        """Wait until a caller has reached the gate."""
        assert await asyncio.to_thread(self.reached.wait, 30)

    def open(self):
        """Let all callers pass."""
        self._open.set()


@pytest.fixture(params=["dict", "spilling"])
def data(request, tmp_path):
    """The data of a worker: a dict as Dask makes it, or a mapping that spills."""
    return {} if request.param == "dict" else SpillBuffer(str(tmp_path), target=1 << 24)


class Worker:
    """The data of one worker, and its publisher."""

    def __init__(self, arena, data, **values):
        owners = (SimpleNamespace(data=data), SimpleNamespace(data=data))
        watched = WorkerData(data, owners)
        self.data = owners[0].data
        for key, value in values.items():
            self.data[key] = value
        self.publisher = Publisher(arena, THRESHOLD, watched, "tcp://here")

    async def answer(self, key):
        """Answer a request, and wait until the publisher has no more work."""
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
        """Wait until the publisher has no task in progress."""
        while self.publisher._background:
            await asyncio.wait(self.publisher._background)

    def is_shared(self, key):
        """Tell whether the value of a key lies in the arena; this is not counted as a read."""
        return codec.is_shared(self.publisher._entries._data.in_memory(key))

    def close(self):
        """Drop all published values."""
        self.publisher.close()


async def serialize(value):
    """Serialize a value for no connection in particular."""
    return Serialized.of(value, {})


def big(seed=0):
    """Return an array above the threshold."""
    return np.random.default_rng(seed).random(THRESHOLD // 4)


def listed(arena):
    """Return the number of listed values."""
    return len(arena.directory._names)


@in_loop
async def test_a_result_is_published_once_adopted_and_listed(arena, data):
    """The private copy gives way to the shared one, and the next request gets the same handle."""
    ours = Worker(arena, data, x=big())
    first = await ours.answer("x")
    assert ours.is_shared("x")
    np.testing.assert_array_equal(ours.data["x"], big())
    assert listed(arena) == 0, "the value was just read"
    assert await ours.answer("x") is first
    assert listed(arena) == 1
    ours.close()


@in_loop
async def test_one_object_under_two_keys_stays_private_and_one(arena, data):
    """A task that returns its input as it came makes no second value, here as on stock Dask."""
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
async def test_what_is_sent_to_another_node_is_found_by_its_version_until_it_is_forgotten(arena, data):
    """Even if its owner may change it; a listing that comes too late does not stay."""
    ours = Worker(arena, data, x=big())
    alias = ours.data["x"]
    published = await ours.answer("x")
    ours.publisher.sent_away("x", published)
    (found,) = index.find_at_home(arena, ["x"])
    assert found.version == published.handle.version
    np.testing.assert_array_equal(handles.resolve(found), alias)
    assert not index.find("tcp://here", ["x"]), "it says nothing about what would be sent now"
    del ours.data["x"]
    assert not index.find_at_home(arena, ["x"])
    ours.publisher.sent_away("x", published)
    assert listed(arena) == 0
    ours.close()


@in_loop
async def test_a_value_below_the_threshold_is_answered_with_its_serialized_form(arena, data):
    """The serialization that shows its size is the answer, and no entry is kept."""
    ours = Worker(arena, data, x=(1, [2, 3]))
    serialized = await ours.answer("x")
    assert isinstance(serialized, Serialized)
    assert serialized.size < THRESHOLD
    assert not ours.publisher._entries
    ours.close()


@in_loop
async def test_many_requests_make_one_copy(arena, monkeypatch, data):
    """All requests during a publication await it, and after the last answer the value is adopted and listed."""
    gate = Gate(monkeypatch, codec, "publish", "before")
    ours = Worker(arena, data, x=big())
    requests = [asyncio.create_task(ours.answer("x")) for _ in range(20)]
    await gate.wait()
    gate.open()
    answers = await asyncio.gather(*requests)
    assert gate.calls == 1
    assert len({id(answer) for answer in answers}) == 1
    assert ours.is_shared("x")
    assert listed(arena) == 1
    ours.close()


@in_loop
async def test_a_cancelled_request_does_not_cancel_the_others(arena, monkeypatch, data):
    """Even if the cancelled request began the publication, the other requests are answered."""
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


STEPS = {"publish": (codec, "publish"), "rebuild": (adopter, "_rebuild")}
at_each_step = pytest.mark.parametrize("step", STEPS)
before_and_after = pytest.mark.parametrize("when", ["before", "after"])


@before_and_after
@at_each_step
@in_loop
async def test_a_key_that_is_released_during_a_publication_stays_released(arena, monkeypatch, data, step, when):
    """Neither the value nor its entry comes back, at whichever step the key is released."""
    gate = Gate(monkeypatch, *STEPS[step], when)
    ours = Worker(arena, data, x=big())
    request_task = asyncio.create_task(ours.answer("x"))
    await gate.wait()
    del ours.data["x"]
    gate.open()
    assert isinstance(await request_task, Published)
    assert not ours.data
    assert "0 published, 0 under way" in repr(ours.publisher)
    ours.close()


@before_and_after
@at_each_step
@in_loop
async def test_a_key_that_is_reused_during_a_publication_keeps_its_new_value(arena, monkeypatch, data, step, when):
    """A publication answers only for the object from which it was made."""
    gate = Gate(monkeypatch, *STEPS[step], when)
    ours = Worker(arena, data, x=big(1))
    request_task = asyncio.create_task(ours.answer("x"))
    await gate.wait()
    ours.data["x"] = new = big(2)
    gate.open()
    await request_task
    assert ours.data["x"] is new
    del new
    published = await ours.answer("x")
    np.testing.assert_array_equal(handles.resolve(published.handle), big(2))
    ours.close()


@before_and_after
@at_each_step
@in_loop
async def test_a_value_that_is_spilled_during_a_publication_stays_on_disk(arena, monkeypatch, tmp_path, step, when):
    """Adoption does not read it back, and no entry keeps its block."""
    gate = Gate(monkeypatch, *STEPS[step], when)
    ours = Worker(arena, SpillBuffer(str(tmp_path), target=1 << 24), x=big())
    request_task = asyncio.create_task(ours.answer("x"))
    await gate.wait()
    assert ours.data.evict() > 0
    gate.open()
    await request_task
    assert "x" not in ours.data.fast
    np.testing.assert_array_equal(ours.data["x"], big())
    assert "0 published, 0 under way" in repr(ours.publisher)
    ours.close()


@in_loop
async def test_a_value_that_is_spilled_gives_its_block_back(arena, tmp_path):
    """A value that only this worker holds must take no shared memory once it is on disk."""
    ours = Worker(arena, SpillBuffer(str(tmp_path), target=1 << 24), x=big())
    await ours.answer("x")
    assert ours.is_shared("x")
    await asyncio.sleep(0)  # the loop itself still refers to the answer
    ours.data.evict()
    wait_until_empty(arena)
    np.testing.assert_array_equal(ours.data["x"], big())
    ours.close()


class Model:
    """A class of a user: a pickle of it drops a cache."""

    def __init__(self):
        self.weights, self.cache = big(), {"warm": True}

    def __getstate__(self):
        return {"weights": self.weights, "cache": None}


@in_loop
async def test_an_object_of_a_users_class_is_neither_adopted_nor_listed(arena, data):
    """The owner keeps the object and its cache; the readers request it, and get the same as from stock Dask."""
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
    """A mapping that makes a new object at each read."""

    def __getitem__(self, key):
        return super().__getitem__(key).copy()


@pytest.mark.parametrize("kind", [dict, Fresh])
@in_loop
async def test_values_of_a_users_mapping_are_not_remembered(arena, kind):
    """Reads of such a mapping are not reported, and it may make a new object at each read."""
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
async def test_a_publication_that_outlives_the_publisher_is_not_kept(arena, monkeypatch, data, step, when):
    """A closed publisher would never drop an entry or a listing that came after its end."""
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
    """Read a value by its key, as a task does."""
    assert len(data["x"])


def read_all(data):
    """Read all values."""
    assert all(len(value) for value in data.values())


def read_memory(data):
    """Read the values that are in memory."""
    memory = data.memory if hasattr(data, "memory") else data
    assert all(len(value) for _, value in memory.items())


def drop(data):
    """Release the key."""
    del data["x"]


def replace(data):
    """Give the key another value."""
    data["x"] = big(3)


@pytest.mark.parametrize("how", [read, read_all, read_memory, drop, replace])
@in_loop
async def test_each_access_to_a_value_withdraws_its_listing(arena, data, how):
    """The listing is withdrawn before a value is read, replaced or dropped."""
    ours = Worker(arena, data, x=big())
    await ours.answer("x")
    assert listed(arena) == 1
    how(ours.data)
    assert listed(arena) == 0
    ours.close()


@in_loop
async def test_a_value_with_an_alias_is_not_listed_again(arena, data):
    """A value may be listed only if nothing but its key reaches it."""
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
async def test_a_write_during_a_publication_is_not_lost(arena, monkeypatch, data, step, when):
    """A reader writes in place and lets go before the copy is made, or before the private value is replaced."""
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
async def test_a_request_after_a_write_joins_no_earlier_publication(arena, monkeypatch, data):
    """The copy of the publication in progress has the bytes from before the write."""
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
async def test_a_write_during_an_adoption_is_not_lost(arena, monkeypatch, data):
    """A reader may take the value after the last look for aliases, and before it has reported the read."""
    ours = Worker(arena, data, x=big())
    settled, watched = Adopter._is_settled, ours.publisher._entries._data

    async def write_afterwards(self, key, entry, known):
        answer = await settled(self, key, entry, known)
        if answer and not ours.is_shared("x"):
            ours.data["x"][0] = 42
        return answer

    monkeypatch.setattr(Adopter, "_is_settled", write_afterwards)
    await ours.answer("x")
    assert watched.in_memory("x")[0] == 42
    assert handles.resolve((await ours.answer("x")).handle)[0] == 42
    ours.close()


@in_loop
async def test_a_value_below_the_threshold_is_offered_once(arena, data, monkeypatch):
    """Without a request, a value must not be serialized again and again."""
    ours, times = Worker(arena, data, x=np.ones(10)), []

    async def counting(value):
        times.append(1)
        return Serialized.of(value, {})

    monkeypatch.setattr(publisher, "_serialize_unasked", counting)
    await ours.publisher.offer("x")
    for _ in range(3):
        ours.publisher.prune()
        await ours.settled()
    assert len(times) == 1
    assert not ours.publisher._entries
    ours.close()


@in_loop
async def test_equal_keys_have_one_entry(arena, data):
    """Dask finds under the key 1.0 the value that it stored under 1."""
    ours = Worker(arena, data)
    ours.data["x", 1] = big()
    await ours.answer(("x", 1.0))
    assert listed(arena) == 1
    del ours.data["x", 1]
    assert listed(arena) == 0
    ours.close()


class Once:
    """A class with instances of a given size that can be pickled only once."""

    def __init__(self, size):
        self.data, self.pickles = np.ones(size), 0

    def __getstate__(self):
        self.pickles += 1
        assert self.pickles == 1, "pickled twice"
        return {"data": self.data, "pickles": 0}


@pytest.mark.parametrize("size", [10, THRESHOLD])
@in_loop
async def test_a_value_is_pickled_once_for_an_answer(arena, data, size):
    """One serialization is enough, whether the value turns out to be shared or sent."""
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
def test_a_serializer_that_reads_its_context_is_noticed(how):
    """Each way to read the context counts, except for the version of pickle, which is the same for all recipients."""
    context = Context({"sender": 1, "recipient": 2, "pickle-protocol": 5})
    assert context
    assert context.get("pickle-protocol") == context["pickle-protocol"] == 5
    assert not context.is_personal
    LOOKS[how](context)
    assert context.is_personal


class Personal:
    """A value that is serialized for one recipient."""


@in_loop
async def test_frames_for_one_recipient_are_sent_to_no_other(arena, data):
    """Each request gets the frames that were serialized for it."""
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
