"""The publications of one worker, and what may happen while one is under way. Gates decide the order, never time."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import threading

import numpy as np
import pytest
from distributed.protocol.serialize import deserialize
from distributed.spill import SpillBuffer
from observing import wait_until

from dask_shm_plugin import codec, handles, membership, publisher
from dask_shm_plugin.codec import Published
from dask_shm_plugin.publisher import Publisher

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


def publisher_of(arena, data, inputs=set):
    """Return the publisher of a worker whose running tasks have these inputs."""
    return Publisher(arena, THRESHOLD, data, "tcp://here", inputs)


def big(seed=0):
    """Return an array above the threshold."""
    return np.random.default_rng(seed).random(THRESHOLD // 4)


@in_loop
async def test_a_result_is_published_once_and_adopted(arena):
    """The private copy gives way to the shared one, and the next asker gets the same handle."""
    data = {"x": big()}
    expected = data["x"].copy()
    ours = publisher_of(arena, data)
    first = await ours.publish("x", data["x"], expected.nbytes)
    assert codec.is_shared(data["x"])
    np.testing.assert_array_equal(data["x"], expected)
    assert await ours.publish("x", data["x"], expected.nbytes) is first
    ours.close()


@pytest.mark.parametrize("spills", [False, True])
@in_loop
async def test_one_object_under_two_keys_is_copied_once_and_stays_one(arena, tmp_path, spills):
    """A task that returns its input as it came makes no second value, here as in stock Dask."""
    data = SpillBuffer(str(tmp_path), target=1 << 24) if spills else {}
    data["x"] = data["y"] = value = big()
    ours = publisher_of(arena, data)
    await ours.publish("x", value, value.nbytes)
    assert data["y"] is data["x"]
    published = await ours.publish("y", data["y"], value.nbytes)
    assert published.copied == 0
    np.testing.assert_array_equal(handles.resolve(published.handle), big())
    assert arena.stats().blocks == 1
    ours.close()


@in_loop
async def test_a_small_value_takes_no_detour(arena):
    """It is serialized where the answer is made; what only looked small is published."""
    ours = publisher_of(arena, {})
    serialized = ours.small("x", (1, [2, 3]), 100)
    assert deserialize(serialized.header, serialized.frames) == (1, [2, 3])
    assert ours.small("x", Model(), 100) is None
    assert ours.small("x", (1, 2), THRESHOLD) is None
    ours.close()


@in_loop
async def test_many_askers_make_one_copy(arena, monkeypatch):
    """All that come while a publication is under way await that one."""
    gate = Gate(monkeypatch, codec, "publish", "before")
    data = {"x": big()}
    ours = publisher_of(arena, data)
    askers = [asyncio.create_task(ours.publish("x", data["x"], data["x"].nbytes)) for _ in range(20)]
    await gate.wait()
    gate.open()
    answers = await asyncio.gather(*askers)
    assert gate.calls == 1
    assert len({id(answer) for answer in answers}) == 1
    ours.close()


@in_loop
async def test_an_asker_that_goes_away_takes_nobody_along(arena, monkeypatch):
    """Cancelling the one that began a publication leaves the others theirs."""
    gate = Gate(monkeypatch, codec, "publish", "before")
    data = {"x": big()}
    ours = publisher_of(arena, data)
    first, second = (asyncio.create_task(ours.publish("x", data["x"], data["x"].nbytes)) for _ in range(2))
    await gate.wait()
    first.cancel()
    gate.open()
    assert isinstance(await second, Published)
    with pytest.raises(asyncio.CancelledError):
        await first
    ours.close()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["publish", "rebuild"])
@in_loop
async def test_a_key_released_meanwhile_stays_released(arena, monkeypatch, step, when):
    """Neither value nor record comes back, whichever step the release met."""
    gate = Gate(monkeypatch, *{"publish": (codec, "publish"), "rebuild": (publisher, "_rebuild")}[step], when)
    data = {"x": big()}
    ours = publisher_of(arena, data)
    asker = asyncio.create_task(ours.publish("x", data["x"], data["x"].nbytes))
    await gate.wait()
    del data["x"]
    ours.forget("x")
    gate.open()
    published = await asker
    assert isinstance(published, Published)
    assert data == {}
    assert "0 published, 0 under way" in repr(ours)
    ours.close()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["publish", "rebuild"])
@in_loop
async def test_a_key_used_again_meanwhile_keeps_its_new_value(arena, monkeypatch, step, when):
    """An old publication answers for nothing but the object that it was made from."""
    gate = Gate(monkeypatch, *{"publish": (codec, "publish"), "rebuild": (publisher, "_rebuild")}[step], when)
    old, new = big(1), big(2)
    data = {"x": old}
    ours = publisher_of(arena, data)
    asker = asyncio.create_task(ours.publish("x", old, old.nbytes))
    await gate.wait()
    ours.forget("x")
    data["x"] = new
    gate.open()
    await asker
    assert data["x"] is new
    published = await ours.publish("x", new, new.nbytes)
    np.testing.assert_array_equal(handles.resolve(published.handle), big(2))
    ours.close()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["publish", "rebuild"])
@in_loop
async def test_a_value_spilled_meanwhile_stays_on_disk(arena, monkeypatch, tmp_path, step, when):
    """Adoption does not bring it back, and its record does not keep its block."""
    gate = Gate(monkeypatch, *{"publish": (codec, "publish"), "rebuild": (publisher, "_rebuild")}[step], when)
    data = SpillBuffer(str(tmp_path), target=1 << 24)
    data["x"] = big()
    ours = publisher_of(arena, data)
    asker = asyncio.create_task(ours.publish("x", data["x"], data["x"].nbytes))
    await gate.wait()
    assert data.evict() > 0
    gate.open()
    await asker
    assert "x" not in data.fast
    np.testing.assert_array_equal(data["x"], big())
    assert "0 published, 0 under way" in repr(ours)
    ours.close()


@in_loop
async def test_a_value_that_is_spilled_gives_its_block_back(arena, tmp_path):
    """What only this worker holds is an ordinary value: on disk, it takes no shared memory."""
    data = SpillBuffer(str(tmp_path), target=1 << 24)
    data["x"] = big()
    ours = publisher_of(arena, data)
    await ours.publish("x", data["x"], data["x"].nbytes)
    assert codec.is_shared(data["x"])
    await asyncio.sleep(0)  # the loop itself still has the answer in its hand
    data.evict()
    wait_until_empty(arena)
    np.testing.assert_array_equal(data["x"], big())
    ours.close()


class Model:
    """What a user might write: pickling drops a cache."""

    def __init__(self):
        self.weights, self.cache = big(), {"warm": True}

    def __getstate__(self):
        return {"weights": self.weights, "cache": None}


@in_loop
async def test_a_class_of_the_users_is_shared_for_the_transport_only(arena):
    """Its owner keeps the object, cache and all; its readers get what Dask would have sent."""
    data = {"m": Model()}
    ours = publisher_of(arena, data)
    model = data["m"]
    published = await ours.publish("m", model, 100)
    assert data["m"] is model
    assert handles.resolve(published.handle).cache is None
    assert await ours.publish("m", model, 100) is published
    ours.close()


@in_loop
async def test_a_mapping_that_makes_a_new_object_each_time_is_not_remembered(arena):
    """With ``data=`` of the user's own, nothing can be told by identity."""

    class Fresh(dict):
        def __getitem__(self, key):
            return super().__getitem__(key).copy()

    data = Fresh(x=big())
    ours = publisher_of(arena, data)
    assert isinstance(await ours.publish("x", data["x"], data["x"].nbytes), Published)
    assert "0 published" in repr(ours)
    ours.close()


def listed(arena):
    """Return how many values are listed."""
    return len(arena.directory._names)


@pytest.mark.parametrize(("module", "step"), [(codec, "publish"), (publisher, "_rebuild")])
@pytest.mark.parametrize("when", ["before", "after"])
@in_loop
async def test_what_is_under_way_when_the_plugin_leaves_is_not_kept(arena, monkeypatch, module, step, when):
    """Nobody would take it back."""
    gate = Gate(monkeypatch, module, step, when)
    data = {"x": big()}
    ours = publisher_of(arena, data)
    asking = asyncio.create_task(ours.publish("x", data["x"], data["x"].nbytes))
    await gate.wait()
    ours.close()
    gate.open()
    await asyncio.wait([asking])
    assert asking.exception() is None or isinstance(asking.exception(), RuntimeError)
    assert not ours._records
    assert listed(arena) == 0


@in_loop
async def test_what_is_published_is_listed_until_it_goes(arena, tmp_path):
    """Released, spilled, in use by a task, or with the plugin."""
    data = SpillBuffer(str(tmp_path), target=1 << 24)
    ours = publisher_of(arena, data)

    async def publish():
        data["x"] = big()
        await ours.publish("x", data["x"], data["x"].nbytes)
        assert listed(arena) == 1

    await publish()
    del data["x"]
    ours.forget("x")
    assert listed(arena) == 0
    await publish()
    data.evict()
    assert listed(arena) == 0
    await publish()
    ours.task_begins(["y", "z"])
    assert listed(arena) == 1
    ours.task_begins(["y", "x"])
    assert listed(arena) == 0
    await ours.publish("x", data["x"], data["x"].nbytes)
    assert listed(arena) == 1
    ours.close()
    assert listed(arena) == 0
    assert not ours._uses._watches


@pytest.mark.parametrize("running", [{"x"}, {"alias"}])
@in_loop
async def test_what_a_task_is_using_is_neither_adopted_nor_listed(arena, running):
    """Under whichever of its keys; it is made up for when the task has ended."""
    data = {"x": big()}
    data["alias"] = value = data["x"]
    ours = publisher_of(arena, data, lambda: running)
    first = await ours.publish("x", value, value.nbytes)
    assert data["x"] is value
    assert listed(arena) == 0
    running.clear()
    assert await ours.publish("x", value, value.nbytes) is first
    assert data["x"] is data["alias"] is not value
    assert listed(arena) == 1
    ours.close()
    assert not ours._uses._watches


@pytest.mark.parametrize(("module", "step"), [(codec, "publish"), (publisher, "_rebuild")])
@pytest.mark.parametrize("when", ["before", "after"])
@in_loop
async def test_what_a_task_has_had_meanwhile_stays_as_the_task_leaves_it(arena, monkeypatch, module, step, when):
    """It writes in place, and what it returns is the same object."""
    gate = Gate(monkeypatch, module, step, when)
    data = {"x": big()}
    value = data["x"]
    ours = publisher_of(arena, data)
    asking = asyncio.create_task(ours.publish("x", value, value.nbytes))
    await gate.wait()
    ours.task_begins(["x"])
    data["y"] = value
    value[:] = 7
    gate.open()
    await asking
    assert data["x"] is data["y"] is value
    assert value[0] == 7
    assert listed(arena) == 0
    again = await ours.publish("y", value, value.nbytes)
    np.testing.assert_array_equal(handles.resolve(again.handle), np.full_like(value, 7))
    np.testing.assert_array_equal(data["x"], np.full_like(value, 7))
    ours.close()


@in_loop
async def test_keys_that_are_equal_are_one(arena):
    """Dask finds under 1.0 what it has under 1."""
    data = {("x", 1): big()}
    ours = publisher_of(arena, data)
    await ours.publish(("x", 1.0), data["x", 1], data["x", 1].nbytes)
    assert listed(arena) == 1
    del data["x", 1]
    ours.forget(("x", 1))
    assert listed(arena) == 0
    ours.close()
