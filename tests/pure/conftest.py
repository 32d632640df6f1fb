"""Fixtures for the layers that know nothing of Dask: other processes, and the promise that nothing leaks. No clusters."""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from other_processes import JOIN, Process, wait_until

from dask_shm_plugin import membership, rendezvous, segment
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.layout import TABLE_BYTES
from dask_shm_plugin.memberbook import Member
from dask_shm_plugin.segment import PAGE, Segment
from dask_shm_plugin.table import Table
from dask_shm_plugin.views import ATLAS

KIB = 1024
MIB = 1024 * KIB

_SAME_NAMES = "segment.NAME_PREFIX = rendezvous.NAME_PREFIX = prefix"
_SMALL_TMPFS = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=48m tmpfs /dev/shm && exec "$@"', "sh"]

#: How long an example takes is the machine's affair.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def prefix() -> str:
    """Return what the names of this run begin with: what it leaves is not purged by others, nor theirs by it."""
    return f"dask-shm-{os.getpid()}-test-"


@pytest.fixture(scope="module", autouse=True)
def own_names(prefix: str) -> Iterator[None]:
    """Let the tests of these layers alone use such names: the clusters of the others must find each other."""
    # So that collecting garbage after each test does not search all modules of Dask, which the other tests need.
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        for module in (segment, rendezvous):
            patch.setattr(module, "NAME_PREFIX", prefix)
        yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def nursery(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Start the process from which all others are forked; it is a member of nothing."""
    first = Process.start(tmp_path_factory.mktemp("nursery"))
    first(_SAME_NAMES, prefix=prefix)
    yield first
    first.kill_all()


@pytest.fixture
def process(nursery: Process) -> Iterator[Callable[[], Process]]:
    """Start another process; all are killed at the end."""
    started: list[Process] = []

    def start() -> Process:
        started.append(nursery.fork())
        return started[-1]

    yield start
    for one in started:
        one.kill_all()
        nursery.forked.remove(one)


@pytest.fixture
def in_small_shm(tmp_path: Path, prefix: str) -> Iterator[Process]:
    """Start a process whose ``/dev/shm`` has 48 MiB."""
    try:
        subprocess.run([*_SMALL_TMPFS, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a tmpfs is not permitted: {error}")
    started = Process.start(tmp_path, *_SMALL_TMPFS)
    started(_SAME_NAMES, prefix=prefix)
    yield started
    started.kill_all()


@pytest.fixture
def buffer() -> memoryview:
    """Return zeroed memory for a table, of which only the pages exist that are touched."""
    return np.zeros(TABLE_BYTES, np.uint8).data


@pytest.fixture
def table(buffer: memoryview) -> Table:
    """Lay out an empty table for an arena of 16 pages."""
    return Table.format(buffer, bytes(range(16)), 16 * PAGE)


@pytest.fixture
def alice(table: Table) -> Member:
    """Enter a first member."""
    return table.join(0, pid=11, started=111)


@pytest.fixture
def bob(table: Table, alice: Member) -> Member:
    """Enter a second member."""
    return table.join(1, pid=22, started=222)


@pytest.fixture(name="segment")
def one_segment() -> Iterator[Segment]:
    """Make a segment of one MiB."""
    one = Segment.create(MIB)
    yield one
    one.close()


@pytest.fixture(params=["POSIX shared memory", "memfd"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Segment]:
    """Make a segment of one MiB in both ways."""
    monkeypatch.setattr(segment, "_posix_memory_free", lambda: 1 << 40 if request.param != "memfd" else 0)
    one = Segment.create(MIB)
    yield one
    one.close()


@pytest.fixture
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    """Make an arena of one MiB with this process as its first member; its table is checked at the end.

    All of it stays warm: trimming takes free space for a moment, which would disturb those who count.
    """
    one = Arena.create(MIB, warm=MIB)
    yield one
    if not one.has_left and not request.node.stash.get(_FAILED, False):
        one.validate()
    one.close()


@pytest.fixture
def joined(arena: Arena, process: Callable[[], Process]) -> Callable[[], Process]:
    """Start another process that is a member of ``arena``, under that name."""

    def start() -> Process:
        other = process()
        other("arena = Arena.attach(at, arena_id, warm=1 << 20)", at=arena.segment.whereabouts, arena_id=arena.arena_id)
        return other

    return start


@pytest.fixture
def cluster() -> Iterator[str]:
    """Name a cluster that no other test has."""
    name = f"tcp://{secrets.token_hex(8)}"
    yield name
    while (joined := membership._by_cluster.get(name)) is not None:
        membership.leave(name, *joined.roles[0][:2])
    # What those have left that were killed at the end.
    rendezvous.purge()


@pytest.fixture
def name(cluster: str) -> Iterator[str]:
    """Return the name of a rendezvous that does not exist yet."""
    yield rendezvous.name_for(cluster)
    Path(f"/dev/shm{rendezvous.name_for(cluster)}").unlink(missing_ok=True)


@pytest.fixture
def meet(name: str) -> Iterator[Callable[..., rendezvous.Rendezvous]]:
    """Enter the rendezvous, and leave it at the end."""
    with contextlib.ExitStack() as stack:

        def meet(*, create: bool = True) -> rendezvous.Rendezvous:
            one = rendezvous.enter(name, create=create)
            assert one is not None
            stack.callback(one.close)
            return one

        yield meet


@pytest.fixture
def member(process: Callable[[], Process], cluster: str) -> Callable[[], Process]:
    """Start another process that joins."""

    def start(how: str = JOIN) -> Process:
        other = process()
        other(how, cluster=cluster)
        return other

    return start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Remember whether a test has failed."""
    report = yield
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report


_FAILED = pytest.StashKey[bool]()


@pytest.fixture(scope="module", autouse=True)
def nothing_leaks() -> None:
    """Take the place of the check for tests with clusters: ``nothing_is_left`` is exact, and looks after every test."""


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest, prefix: str) -> Iterator[None]:
    """After each test that passed: no names, no descriptors of shared memory, no views, no threads are left."""
    before = _left(prefix)
    yield
    gc.collect()
    if not request.node.stash.get(_FAILED, False):
        wait_until(lambda: not (_left(prefix) - before), "all is given back: " + str(_left(prefix) - before))


def _left(prefix: str) -> set[Any]:
    names = {entry.name for entry in Path("/dev/shm").glob(f"{prefix}*")}
    threads = {thread for thread in threading.enumerate() if thread.name.startswith("dask-shm")}
    descriptors = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            descriptors.add((number, os.readlink(f"/proc/self/fd/{number}")))
    memory = {entry for entry in descriptors if prefix in entry[1]}
    return names | threads | memory | {("views", count) for count in range(len(ATLAS))}
