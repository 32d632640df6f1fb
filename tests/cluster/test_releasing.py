"""Released, cancelled, timed-out and killed work gives its memory back, and the cluster goes on."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import logging.handlers
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import dask
import numpy as np
import psutil
import pytest
from clusters import local_cluster, register
from describing import assert_descriptions_equal, assert_same, describe
from distributed import Client, wait
from distributed.comm import connect
from observing import (
    BIG,
    MIB,
    addresses,
    arena_pages,
    array,
    fresh,
    lies_in_arena,
    loopback,
    names,
    pids,
    see,
    see_on,
    shmem,
    totals,
    wait_until,
)

from dask_shm_plugin.seams import requests
from dask_shm_plugin.transfer import fetch

pytestmark = pytest.mark.slow


def assert_empties(client: Client) -> None:
    """Fail unless the arena becomes empty.

    An exception that the client has raised may be in a cycle with its traceback, which only a collection finds. Workers
    look for those of failed tasks themselves.
    """
    gc.collect()
    wait_until(lambda: not any(held(client)), lambda: f"the arena empties: {totals(client)}")


def held(client: Client) -> tuple[int, int]:
    """Return the bytes and blocks in use."""
    now = totals(client)
    return now.used, now.blocks


def assert_usable(client: Client) -> None:
    """Fail unless values still move, through the arena."""
    seed = fresh()
    future = client.scatter(array(seed), broadcast=True)
    for seen in see_on(client, future, addresses(client)):
        assert_descriptions_equal(seen.description, describe(array(seed)))
        assert seen.shared


# -------------------------------------------------------------------------------------------------------- releasing


def test_the_space_of_a_released_value_is_free_again(four: Client) -> None:
    """The arena is empty as soon as the last future and the last view have gone."""
    a, b, *_ = addresses(four)
    scattered = four.scatter(array(fresh()), broadcast=True)
    made = four.submit(array, fresh(), workers=[a])
    views = [made.result(), four.gather(scattered)[10:20]]
    see_on(four, made, [b])
    assert totals(four).used >= 2 * BIG * 8
    del scattered, made
    wait_until(lambda: not any(four.run(keys).values()), "the workers forget the keys")
    assert totals(four).used >= 2 * BIG * 8, "the views of the client still refer to the blocks"
    del views
    assert_empties(four)


def keys(dask_worker: Any) -> list[str]:
    """Return the keys in a worker's data."""
    return list(dask_worker.data)


def test_many_rounds_leave_nothing(four: Client) -> None:
    """Values are made, fetched, gathered, scattered and released, 25 times: all are right, and the arena ends empty."""
    a, b, c, d = addresses(four)
    for number in range(25):
        seeds = [fresh() for _ in range(4)]
        made = [four.submit(array, seed, workers=[w]) for seed, w in zip(seeds, (a, b, c, d), strict=True)]
        sums = [four.submit(np.sum, f, workers=[w]) for f, w in zip(made, (b, c, d, a), strict=True)]
        values = four.gather(made, direct=bool(number % 2))
        for seed, value in zip(seeds, values, strict=True):
            assert_same(value, array(seed))
        returned = four.scatter([value[::-1] for value in values], direct=bool(number % 3))
        np.testing.assert_allclose(four.gather(sums), four.gather([four.submit(np.sum, f) for f in returned]))
        del value, values, returned, made, sums
    assert_empties(four)


def test_a_failed_task_does_not_keep_its_shared_input(four: Client) -> None:
    """The traceback of a task that raises must not keep its shared input."""
    a, b, *_ = addresses(four)
    made = four.submit(array, fresh(), workers=[a])
    failed = four.submit(fail, made, workers=[b])
    wait(failed)
    assert isinstance(failed.exception(), ZeroDivisionError)
    del made, failed
    assert_empties(four)


def test_a_worker_that_is_idle_does_not_keep_the_shared_input_of_a_failed_task(four: Client) -> None:
    """The error refers to itself, and Python looks for such cycles only where objects are made."""
    a, b, *_ = addresses(four)
    four.run(gc.disable)
    try:
        failed = four.submit(fail, four.submit(array, fresh(), workers=[a]), workers=[b])
        wait(failed)
        del failed
        assert_empties(four)
    finally:
        four.run(gc.enable)


def fail(value: np.ndarray) -> None:
    """Raise with a shared value in the traceback."""
    _ = value[0] / 1
    raise ZeroDivisionError


# -------------------------------------------------------------------------- scatters that are cancelled or time out


def forgotten(client: Client) -> set[Any]:
    """Return the keys in the workers' data that the scheduler no longer knows.

    On stock Dask, a scatter ends so, too, if its client leaves during the replication ("Key lost during replication").
    """
    known = client.run_on_scheduler(lambda dask_scheduler: set(dask_scheduler.tasks))
    return {key for held in client.run(keys).values() for key in held} - known


def assert_only_forgotten_values_stay(client: Client) -> None:
    """Fail unless the arena comes to hold only values that the scheduler no longer knows."""
    gc.collect()
    wait_until(
        lambda: totals(client).blocks <= len(forgotten(client)),
        lambda: f"{totals(client)} in spite of {forgotten(client)}",
    )


def test_a_cancelled_scatter_leaves_nothing_behind() -> None:
    """A scatter is cancelled at some moment and its client closed: the plugin keeps no block, and values still move."""

    async def cancel_after(turns: int) -> None:
        async with Client(four.scheduler.address, asynchronous=True, set_as_default=False) as client:
            scatter = asyncio.ensure_future(client.scatter(array(fresh()), broadcast=True))
            for _ in range(turns):
                await asyncio.sleep(0)
            scatter.cancel()
            await asyncio.wait([scatter])
            seed = fresh()
            future = await client.scatter(array(seed), broadcast=True)
            assert_same(await client.gather(future), array(seed))

    with local_cluster(2) as four:
        with dask.config.set({"distributed.client.preload": ["dask_shm_plugin"]}):
            for turns in (0, 1, 2, 3, 5, 8, 13, 21, 50, 200):
                asyncio.run(cancel_after(turns))
        assert_only_forgotten_values_stay(four)
        assert_usable(four)


def test_a_scatter_that_times_out_leaves_nothing_behind() -> None:
    """The space of a scatter must be free again after its user has given up waiting."""

    async def give_up_after(seconds: float) -> None:
        async with Client(four.scheduler.address, asynchronous=True, set_as_default=False) as client:
            with suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(client.scatter(array(fresh(), 8 * BIG), broadcast=True), seconds)
            seed = fresh()
            future = await client.scatter(array(seed), broadcast=True)
            assert_same(await client.gather(future), array(seed))

    with local_cluster(2) as four:
        with dask.config.set({"distributed.client.preload": ["dask_shm_plugin"]}):
            for milliseconds in (0, 1, 3, 10, 30):
                asyncio.run(give_up_after(milliseconds / 1000))
        assert_only_forgotten_values_stay(four)
        assert_usable(four)


def test_a_scatter_to_a_worker_that_does_not_exist_fails_as_in_stock_dask(four: Client) -> None:
    """The error is one of Dask's own, and no block stays claimed."""
    with pytest.raises((ValueError, KeyError, OSError, RuntimeError)):
        four.scatter(array(fresh()), workers=["tcp://127.0.0.1:1"])
    assert_empties(four)
    assert_usable(four)


def test_a_scatter_without_workers_times_out_as_in_stock_dask() -> None:
    """Without a worker, `scatter` raises `TimeoutError`; with the first worker, it works."""
    with local_cluster(0) as client:
        with pytest.raises((TimeoutError, asyncio.TimeoutError), match="No valid workers"):
            client.scatter(array(fresh()), timeout=0.1)
        client.cluster.scale(2)
        client.wait_for_workers(2)
        assert_usable(client)
        assert_empties(client)


def test_a_cancelled_fetch_leaves_nothing_behind(four: Client) -> None:
    """Futures are released while their values are on the way: no process keeps the blocks."""
    a, *others = addresses(four)
    for _ in range(10):
        made = four.submit(array, fresh(), workers=[a])
        tasks = [four.submit(see, made, workers=[other], pure=False) for other in others]
        four.cancel([made, *tasks])
        del made, tasks
    assert_empties(four)
    assert_usable(four)


# ---------------------------------------------------------------------------------------------------------- deaths


@pytest.fixture
def expendable() -> Iterator[Client]:
    """A client of two workers that a test may kill."""
    with local_cluster(2) as client:
        yield client


def kill(client: Client, address: str) -> None:
    """Kill a worker process, and wait until its nanny has started another one."""
    before = pids(client)
    os.kill(before[address], signal.SIGKILL)

    def replaced() -> bool:
        with suppress(OSError):
            found = pids(client)
            return len(found) == len(before) and before[address] not in found.values()
        return False

    wait_until(replaced, "the nanny restarts the worker", seconds=60)


def test_the_claims_of_a_killed_reader_are_reclaimed(expendable: Client) -> None:
    """A dead worker must not keep a block, and the worker that replaces it shares again."""
    a, b = addresses(expendable)
    seed = fresh()
    made = expendable.submit(array, seed, workers=[a])
    see_on(expendable, made, [b])
    kill(expendable, b)
    for seen in see_on(expendable, made, addresses(expendable)):
        assert_descriptions_equal(seen.description, describe(array(seed)))
        assert seen.shared
    del made
    assert_empties(expendable)
    assert_usable(expendable)


def test_a_killed_publisher_takes_nothing_from_its_readers(expendable: Client) -> None:
    """A worker that has mapped a value goes on reading it after its publisher died, and serves it to others."""
    a, b = addresses(expendable)
    seed = fresh()
    made = expendable.submit(array, seed, workers=[a])
    view = made.result()
    see_on(expendable, made, [b])
    kill(expendable, a)
    assert_same(view, array(seed))
    (restarted,) = set(addresses(expendable)) - {b}
    for seen in see_on(expendable, made, [b, restarted]):
        assert_descriptions_equal(seen.description, describe(array(seed)))
    del made, view
    assert_empties(expendable)
    assert_usable(expendable)


def test_a_value_is_released_if_the_requesting_process_hangs_up(four: Client) -> None:
    """The worker's log keeps the traceback of the failed answer, but not the values in its frames."""
    a, *_ = addresses(four)
    made = four.submit(array, fresh(), workers=[a])
    wait(made)
    four.sync(ask_and_hang_up, a, made.key)
    wait_until(
        lambda: any("failed during get data" in text for _, text in four.get_worker_logs()[a]),
        "the worker logs the failed answer",
    )
    del made
    assert_empties(four)


async def ask_and_hang_up(address: str, key: str) -> None:
    """Request a value as a member of the arena, and close the connection instead of confirming the answer."""
    comm = await connect(address)
    await comm.write({"op": "get_data", "keys": [key], "who": None, "serializers": requests.tagged(fetch.askers())})
    assert (await comm.read())["status"] == "OK"
    comm.abort()


def test_a_worker_that_retires_leaves_its_values_to_the_others(expendable: Client) -> None:
    """Dask moves its values, through the arena, to another worker, and they stay valid after the worker has gone."""
    a, b = addresses(expendable)
    seed = fresh()
    made = expendable.submit(array, seed, workers=[a], allow_other_workers=True)
    wait(made)
    expendable.retire_workers([a], close_workers=True)
    wait_until(lambda: a not in addresses(expendable), "the worker leaves")
    (seen,) = see_on(expendable, made, [b])
    assert_descriptions_equal(seen.description, describe(array(seed)))
    assert lies_in_arena(expendable, made, b)
    del made
    assert_empties(expendable)


SCRIPT = """
import sys
import numpy as np
from distributed import Client, LocalCluster
from dask_shm_plugin import SharedMemoryPlugin, stats

if __name__ == "__main__":
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", memory_limit="1 GiB")
    client = Client(cluster)
    client.register_plugin(SharedMemoryPlugin())
    future = client.scatter(np.random.default_rng(0).random(8 << 20), broadcast=True)
    print(*[arena["used"] for arena in stats(client).values()], flush=True)
    sys.stdin.read()
"""


def test_when_all_processes_are_killed_the_memory_is_free_and_the_name_is_purged(tmp_path: Path) -> None:
    """No command is needed after SIGKILL: the kernel frees the memory, and the next cluster purges the name."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    before, others = shmem(), names()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, script],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert int(process.stdout.readline()) >= 64 * MIB
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        assert arena_pages(family) > 48 * MIB
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    # Other tests on this machine use shared memory, too.
    wait_until(lambda: shmem() - before < 16 * MIB, "the kernel frees the memory", seconds=60)
    left = names() - others
    left = {name for name in left if Path("/dev/shm", name).exists()}  # other tests run at the same time
    assert sum(Path("/dev/shm", name).stat().st_size for name in left) < MIB
    with local_cluster(1) as client:
        assert_usable(client)
        wait_until(lambda: not names() & left, "the next cluster purges the names of the dead one")


# ------------------------------------------------------------ full arenas, refused mappings, repeated registration


def test_a_full_arena_is_no_error(nothing_leaks: None) -> None:
    """A value that does not fit is sent and counted, and released values make room again."""
    with local_cluster(2, {"threshold": "64 KiB", "capacity": "1 MiB"}) as client:
        a, b = addresses(client)
        seeds = [fresh() for _ in range(8)]
        before, start = loopback(), totals(client)
        futures = [client.submit(array, seed, workers=[a]) for seed in seeds]
        for seed, future in zip(seeds, futures, strict=True):
            (seen,) = see_on(client, future, [b])
            assert_descriptions_equal(seen.description, describe(array(seed)))
        scattered = client.scatter(array(1, 8 * BIG), broadcast=True)
        for seen in see_on(client, scattered, [a, b]):
            assert_descriptions_equal(seen.description, describe(array(1, 8 * BIG)))
            assert not seen.shared
        counted = totals(client) - start
        assert 0 < counted.published < 8
        assert counted.sent_bytes >= BIG * 8
        assert counted.used <= MIB < loopback() - before
        del futures, future, scattered
        assert_empties(client)
        assert_usable(client)


def test_a_worker_that_can_make_no_mapping_copies_values(expendable: Client) -> None:
    """Scattered, fetched and gathered values are right; one warning names the remedy, and no log has a traceback."""
    a, b, *_ = addresses(expendable)
    start = totals(expendable)
    expendable.run(refuse_mappings, workers=[b])
    try:
        seed = fresh()
        scattered, made = (
            expendable.scatter(array(seed), broadcast=True),
            expendable.submit(array, 2 * seed, workers=[a]),
        )
        for future, expected in ((scattered, array(seed)), (made, array(2 * seed))):
            (seen,) = see_on(expendable, future, [b])
            assert_descriptions_equal(seen.description, describe(expected))
            assert seen.writeable
            assert not seen.shared
        assert_same(expendable.gather(expendable.submit(np.negative, scattered, workers=[b])), -array(seed))
    finally:
        (warnings,) = expendable.run(allow_mappings, workers=[b]).values()
    counted = totals(expendable) - start
    assert counted.sent == 2
    assert counted.sent_bytes == 2 * 8 * BIG
    logs = [
        text for log in (expendable.get_scheduler_logs(), *expendable.get_worker_logs().values()) for _, text in log
    ]
    assert not [text for text in logs if "Traceback" in text]
    assert len(warnings) == 1
    assert "raise vm.max_map_count" in warnings[0]
    assert_usable(expendable)


def refuse_mappings() -> None:
    """Make each private mapping of this process fail, as the kernel does at ``vm.max_map_count``."""
    from dask_shm_plugin.linux import syscalls

    def refuse(fd: int, offset: int, length: int) -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    syscalls.allowed, syscalls.map_private = syscalls.map_private, refuse
    syscalls.said = logging.handlers.BufferingHandler(1000)
    logging.getLogger("dask_shm_plugin").addHandler(syscalls.said)


def allow_mappings() -> list[str]:
    """Undo :func:`refuse_mappings`, and return the warnings that were logged meanwhile."""
    from dask_shm_plugin.linux import syscalls

    syscalls.map_private = syscalls.allowed
    logging.getLogger("dask_shm_plugin").removeHandler(syscalls.said)
    return [record.getMessage() for record in syscalls.said.buffer if record.levelno >= logging.WARNING]


def test_registering_twice_does_not_disturb_living_values(expendable: Client) -> None:
    """Values that lie in the arena stay valid, and no second arena is made."""
    seed = fresh()
    future = expendable.scatter(array(seed), broadcast=True)
    register(expendable, threshold="64 KiB", capacity="256 MiB")
    for seen in see_on(expendable, future, addresses(expendable)):
        assert_descriptions_equal(seen.description, describe(array(seed)))
    assert totals(expendable).arenas == 1
    assert_usable(expendable)
    del future
    assert_empties(expendable)
