"""Work for a thread is done exactly once, whether a thread can be had or not."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import distributed.utils
import pytest

from dask_shm_plugin.threads import call_in, in_thread


def where(calls: list[threading.Thread]) -> threading.Thread:
    """Return the thread in which this runs, and record the call."""
    calls.append(threading.current_thread())
    return calls[-1]


def run_with(executor: ThreadPoolExecutor, calls: list[threading.Thread]) -> threading.Thread:
    """Return the thread in which `in_thread` runs a function on a loop with this executor."""

    async def run() -> threading.Thread:
        asyncio.get_running_loop().set_default_executor(executor)
        return await in_thread(where, calls)

    return asyncio.run(run())


def test_in_thread_uses_the_executor_of_the_loop() -> None:
    """The event loop must be able to go on meanwhile."""
    calls: list[threading.Thread] = []
    assert run_with(ThreadPoolExecutor(1), calls) is not threading.current_thread()
    assert len(calls) == 1


def test_in_thread_runs_in_the_calling_thread_after_the_executor_has_ended() -> None:
    """The executor has ended when Python closes the clusters and clients that a script has left open."""
    executor, calls = ThreadPoolExecutor(1), list[threading.Thread]()
    executor.shutdown()
    assert run_with(executor, calls) is threading.current_thread()
    assert len(calls) == 1


def refuse(thread: threading.Thread) -> None:
    """Stand in for ``Thread.start`` at the limit of threads."""
    raise RuntimeError("can't start new thread")


def test_in_thread_runs_once_if_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """An executor that cannot start a thread keeps the work for its other threads: it must not be done twice."""
    executor, calls, busy = ThreadPoolExecutor(2), list[threading.Thread](), threading.Event()
    executor.submit(busy.wait)
    loop = asyncio.new_event_loop()
    loop.set_default_executor(executor)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert loop.run_until_complete(in_thread(where, calls)) is threading.current_thread()
    busy.set()
    executor.shutdown()
    loop.close()
    assert len(calls) == 1


def test_call_in_runs_in_the_calling_thread_if_dasks_thread_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The work is done once, and an error of the work itself is no reason to do it again."""
    calls = list[threading.Thread]()

    def fail() -> None:
        where(calls)
        raise RuntimeError("my own")

    monkeypatch.setattr(distributed.utils, "_offload_executor", ThreadPoolExecutor(1))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert asyncio.run(call_in(None, where, calls)) is threading.current_thread()
        with pytest.raises(RuntimeError, match="my own"):
            asyncio.run(call_in(None, fail))
    assert asyncio.run(call_in(None, where, calls)) is not threading.current_thread()
    with pytest.raises(RuntimeError, match="my own"):
        asyncio.run(call_in(None, fail))
    assert len(calls) == 4


def test_a_call_goes_on_without_a_word_after_its_caller_was_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    """Leaving an arena must be completed, and asyncio must not report an error that has no reader."""
    gc.collect()  # what earlier tests have left may be logged when it is collected
    caplog.clear()
    has_begun, go_on, done = threading.Event(), threading.Event(), []

    def work() -> None:
        has_begun.set()
        assert go_on.wait(10)
        done.append(True)

    async def cancel() -> None:
        task = asyncio.create_task(in_thread(work))
        await asyncio.to_thread(has_begun.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        await asyncio.get_running_loop().shutdown_default_executor()
        gc.collect()

    asyncio.run(cancel())
    assert done == [True]
    assert not caplog.records
