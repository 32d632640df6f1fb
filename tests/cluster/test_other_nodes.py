"""A worker outside of the arena gets bytes, as if there were no plugin."""

from __future__ import annotations

import logging
import logging.handlers
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusters import local_cluster, register
from describing import assert_descriptions_equal, assert_same, describe
from distributed import Client, Worker, wait
from namespaces import PRIVATE_NODE, can_unshare, root
from observing import BIG, LITTLE, addresses, array, fresh, holders, see, see_on, settle, stored_type, totals
from processes import cluster, environment, run_script, workers

pytestmark = pytest.mark.slow

#: The capacity is left to the configuration, so that one worker can have none.
OPTIONS = {"threshold": "64 KiB"}
CONFIG = {"DASK_SHM__CAPACITY": "256 MiB"}

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dask_shm_plugin":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


@contextmanager
def without_package(client: Client, tmp_path: Path) -> Iterator[str]:
    """Run a worker in which the package cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    with workers(client, env=environment(CONFIG, first=str(tmp_path))) as (address,):
        yield address


@contextmanager
def without_nanny_and_package(client: Client, tmp_path: Path) -> Iterator[str]:
    """Run a worker without nanny, in which the package cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    with workers(client, "--no-nanny", env=environment(CONFIG, first=str(tmp_path))) as (address,):
        yield address


@contextmanager
def without_capacity(client: Client, tmp_path: Path) -> Iterator[str]:
    """Run a worker on which the plugin cannot start."""
    with workers(client, env=environment({"DASK_SHM__CAPACITY": "0"})) as (address,):
        yield address


@contextmanager
def in_a_container(client: Client, tmp_path: Path) -> Iterator[str]:
    """Run a worker with its own pid namespace and its own ``/dev/shm``."""
    if os.geteuid() or not can_unshare():
        pytest.skip("needs root and namespaces")
    wrapper = ["unshare", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", PRIVATE_NODE, "sh"]
    with workers(client, env=environment(CONFIG), wrapper=wrapper) as (address,):
        yield address


@contextmanager
def of_another_user(client: Client, tmp_path: Path) -> Iterator[str]:
    """Run a worker as an unprivileged user."""
    nobody: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []}
    try:
        if os.geteuid() or subprocess.run([sys.executable, "-c", "import dask_shm_plugin"], **nobody).returncode:
            pytest.skip("another user cannot import the package here")
    except PermissionError:
        pytest.skip("another user cannot run this Python")
    env = environment(CONFIG | {"HOME": str(tmp_path), "DASK_CONFIG": str(tmp_path)})
    with workers(client, env=env, **nobody) as (address,):
        yield address


@contextmanager
def of_another_group(client: Client, tmp_path: Path) -> Iterator[str]:
    """Run a worker of the same user with another primary group, which may not inspect other processes."""
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv")
    wrapper = ["setpriv", "--regid", "65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
    with workers(client, env=environment(CONFIG), wrapper=wrapper) as (address,):
        yield address


Outsider = Callable[[Client, Path], AbstractContextManager[str]]
OUTSIDERS: list[Outsider] = [
    without_package,
    without_nanny_and_package,
    without_capacity,
    in_a_container,
    of_another_user,
    of_another_group,
]


def assert_everything_works(client: Client, members: list[str], outsider: str, *, lands: bool = False) -> None:
    """Fail unless values are right wherever they go, and mapped only among the members.

    If the outsider has an arena of its own, its values land in that of the members, and those of a broadcast in its own.
    """
    a, b = members
    # between workers, in both directions
    for source, reader, shared in [(a, b, True), (a, outsider, False), (outsider, a, lands), (b, a, True)]:
        seed = fresh()
        made = client.submit(array, seed, workers=[source])
        (seen,) = see_on(client, made, [reader])
        assert_descriptions_equal(seen.description, describe(array(seed)))
        assert (source, reader, seen.shared) == (source, reader, shared)
        assert_same(client.gather(made), array(seed))
        assert_same(client.gather(made, direct=True), array(seed))
    # scattered to the outsider, to all workers, and to workers of Dask's choice
    for options in (
        {"workers": [outsider]},
        {"workers": [outsider], "direct": True},
        {"broadcast": True},
        {"broadcast": True, "direct": True},
        {"workers": [outsider, a], "broadcast": True},
    ):
        seed = fresh()
        future = client.scatter(array(seed), **options)
        arrived = holders(client, future)
        assert outsider in arrived
        for address in arrived:
            (seen,) = see_on(client, future, [address])
            assert_descriptions_equal(seen.description, describe(array(seed)))
            assert lands or not (address == outsider and seen.shared)
        assert set(client.run(stored_type, future.key, workers=list(arrived)).values()) == {"ndarray"}
    for direct in (False, True):
        seeds = [fresh() for _ in range(6)]
        futures = client.scatter([array(seed) for seed in seeds], direct=direct)
        for seed, future in zip(seeds, futures, strict=True):
            for seen in see_on(client, future, [outsider, a]):
                assert_descriptions_equal(seen.description, describe(array(seed)))
    # a value that the outsider received is passed on, its large and small parts together
    seeds = [fresh(), fresh()]
    mixed = client.submit(mixture, *seeds, workers=[a])
    passed = client.submit(identity, client.submit(identity, mixed, workers=[outsider], pure=False), workers=[b])
    assert_same(passed.result(), mixture(*seeds))


def mixture(first: int, second: int) -> dict[str, object]:
    """Return a container of large and small values."""
    return {"big": array(first), "little": array(second, LITTLE), "text": "text"}


def identity(value: object) -> object:
    """Pass a value on."""
    return value


@pytest.fixture(scope="module")
def members(nothing_leaks: None) -> Iterator[Client]:
    """A client of a cluster of two members of an arena, started by commands, that others may join."""
    with cluster(count=2, env=environment(CONFIG)) as client:
        register(client, **OPTIONS | {"capacity": None})
        yield client


@pytest.mark.parametrize("start", OUTSIDERS)
def test_an_outsider_that_joins_later_gets_bytes(members: Client, start: Outsider, tmp_path: Path) -> None:
    """For each reason that keeps a worker out of the arena, all values are right, and the members go on sharing."""
    settle(members)
    pair = addresses(members)
    with start(members, tmp_path) as outsider:
        assert_everything_works(members, pair, outsider, lands=start is in_a_container)


def test_an_outsider_that_was_there_first_gets_bytes(tmp_path: Path) -> None:
    """A worker without the package does not prevent the registration for other workers, present or later."""
    with cluster(count=2, env=environment(CONFIG)) as client:
        pair = addresses(client)
        with without_package(client, tmp_path) as outsider:
            register(client, **OPTIONS)
            assert_everything_works(client, pair, outsider)
            with workers(client, env=environment(CONFIG)) as (later,):
                assert_everything_works(client, [pair[0], later], outsider)
        assert_same(client.submit(array, 1, workers=pair[1:]).result(), array(1))


@pytest.mark.parametrize("start", [without_package, in_a_container])
def test_values_for_an_outsider_are_counted_as_sent(members: Client, start: Outsider, tmp_path: Path) -> None:
    """`stats` counts these values as sent, so that a user can see that they are not shared."""
    a, _ = addresses(members)
    with start(members, tmp_path) as outsider:
        before = totals(members)
        made = members.submit(array, fresh(), workers=[a])
        see_on(members, made, [outsider])
        grown = totals(members) - before
    assert grown.sent >= 1
    assert grown.sent_bytes >= BIG * 8


def test_an_outsider_logs_nothing_while_values_are_moved(members: Client, tmp_path: Path) -> None:
    """A worker without capacity has said so when it started, and does not repeat it for each value."""
    pair = addresses(members)
    with without_capacity(members, tmp_path) as outsider:
        members.run(record_warnings, workers=[outsider])
        for _ in range(5):
            made = members.submit(array, fresh(), workers=[outsider])
            see_on(members, made, pair)
        logs = members.get_worker_logs(workers=[outsider])[outsider]
        assert members.run(recorded_warnings, workers=[outsider])[outsider] == ["the record works"]
    assert [text for level, text in logs if level == "ERROR"] == []


def record_warnings(dask_worker: Worker) -> None:
    """Begin to record the plugin's warnings in this process."""
    dask_worker.recorder = logging.handlers.BufferingHandler(1000)
    logging.getLogger("dask_shm_plugin").addHandler(dask_worker.recorder)


def recorded_warnings(dask_worker: Worker) -> list[str]:
    """Return the recorded warnings, and one more."""
    logging.getLogger("dask_shm_plugin").warning("the record works")
    return [one.getMessage() for one in dask_worker.recorder.buffer if one.levelno >= logging.WARNING]


# ------------------------------------------------------------------------------------------------- one process only


def test_in_one_process_everything_works_and_nothing_is_copied() -> None:
    """With `processes=False`, the value of a worker is the very object that the client scattered."""
    with local_cluster(2, processes=False) as client:
        a, b = addresses(client)
        before = totals(client)
        seed = fresh()
        value = array(seed)
        place = value.__array_interface__["data"][0]
        for options in ({"workers": [a]}, {"workers": [a], "direct": True}, {"broadcast": True}):
            future = client.scatter(value, **options)
            assert client.submit(address_of, future, workers=[a], pure=False).result() == place
            assert set(client.run(stored_type, future.key, workers=list(holders(client, future))).values()) == {
                "ndarray"
            }
        made = client.submit(array, 2 * seed, workers=[a])
        (seen,) = see_on(client, made, [b])
        assert_descriptions_equal(seen.description, describe(array(2 * seed)))
        place = client.submit(address_of, made, workers=[a], pure=False).result()
        assert client.submit(address_of, made, workers=[b], pure=False).result() == place
        assert address_of(client.gather(made)) == place
        wait(client.submit(see, made, workers=[b], pure=False))
        counted = totals(client) - before
        assert (counted.blocks_made, counted.sent) == (0, 0)


def address_of(value: np.ndarray) -> int:
    """Return the address of an array's memory."""
    return int(value.__array_interface__["data"][0])


# ----------------------------------------------------------------------------------------------------- small /dev/shm

SMALL = """
import numpy as np
from distributed import Client, LocalCluster
from dask_shm_plugin import SharedMemoryPlugin, is_shared

if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", memory_limit="1 GiB") as cluster:
        with Client(cluster) as client:
            client.register_plugin(SharedMemoryPlugin())
            value = np.random.default_rng(0).random(4 << 20)
            future = client.scatter(value, broadcast=True)
            print(set(client.run(lambda key, dask_worker: is_shared(dask_worker.data[key]), future.key).values()))
            print(np.array_equal(client.gather(future), value))
"""


@root
@pytest.mark.parametrize("size", ["2m", "64k"])
def test_a_tiny_dev_shm_is_no_obstacle(size: str) -> None:
    """Values are shared even if ``/dev/shm`` is smaller than one value, as in plain containers."""
    if not can_unshare():
        pytest.skip("needs namespaces")
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    assert run_script(SMALL, "unshare", "--mount", "sh", "-c", mount, "sh").split() == ["{True}", "True"]


# --------------------------------------------------------------------------------------------- other operating systems

OTHER_SYSTEM = """
import logging, sys, warnings
import numpy as np
from distributed import Client, LocalCluster

records = []

class Collector(logging.Handler):
    def emit(self, record):
        if record.levelno >= logging.WARNING and "shm" in record.name:
            records.append(record.getMessage())

logging.getLogger().addHandler(Collector())

if __name__ == "__main__":
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with LocalCluster(n_workers=2, processes=False, dashboard_address=":0") as cluster, Client(cluster) as client:
            sys.platform = "SYSTEM"
            from dask_shm_plugin import SharedMemoryPlugin, is_shared, stats, unregister
            client.register_plugin(SharedMemoryPlugin())
            value = np.ones(1 << 20)
            future = client.scatter(value, broadcast=True)
            assert client.submit(np.sum, future).result() == 1 << 20
            assert not is_shared(client.gather(future))
            assert sum(arena["used"] for arena in stats(client).values()) == 0
            unregister(client)
    texts = records + [str(w.message) for w in caught if "shared memory" in str(w.message) or "shm" in str(w.message)]
    print(len(texts), *texts)
"""


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_on_systems_other_than_linux_registering_warns_once_and_does_nothing(system: str) -> None:
    """On macOS and Windows, the import works, values move as ever, and one warning says that nothing is shared."""
    printed = run_script(OTHER_SYSTEM.replace("SYSTEM", system))
    assert printed.startswith("1 "), printed
    assert "Linux" in printed
