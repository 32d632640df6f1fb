"""Fixtures for tests of the layers below Dask: other processes, arenas and checks for leaks. They start no clusters."""

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

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.linux import segment
from dask_shm_plugin.linux.segment import Segment
from dask_shm_plugin.mapping.atlas import ATLAS
from dask_shm_plugin.node import membership, rendezvous
from dask_shm_plugin.table.layout import TABLE_BYTES
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.table.table import Table
from dask_shm_plugin.units import PAGE

KIB = 1024
MIB = 1024 * KIB

_SET_NAME_PREFIX = "segment.NAME_PREFIX = rendezvous.NAME_PREFIX = prefix"
_SMALL_TMPFS = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=48m tmpfs /dev/shm && exec "$@"', "sh"]

#: Examples have no deadline, because their duration depends on the machine.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def prefix() -> str:
    """Return the prefix of all names of this run. Runs with different prefixes do not purge each other's files."""
    return f"dask-shm-{os.getpid()}-test-"


@pytest.fixture(scope="module", autouse=True)
def own_names(prefix: str) -> Iterator[None]:
    """Use the prefix only in tests of these layers. In other tests, all processes of a cluster need the usual names."""
    # The garbage collection after each test then skips existing objects, such as the modules of Dask.
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        for module in (segment, rendezvous):
            patch.setattr(module, "NAME_PREFIX", prefix)
        yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def first_process(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Start the process from which all others are forked. It joins no arena."""
    first = Process.start(tmp_path_factory.mktemp("first_process"))
    first(_SET_NAME_PREFIX, prefix=prefix)
    yield first
    first.kill_all()


@pytest.fixture
def process(first_process: Process) -> Iterator[Callable[[], Process]]:
    """Return a function that forks another process. All of these processes are killed after the test."""
    started: list[Process] = []

    def start() -> Process:
        started.append(first_process.fork())
        return started[-1]

    yield start
    for one in started:
        one.kill_all()
        first_process.forked.remove(one)


@pytest.fixture
def in_small_shm(tmp_path: Path, prefix: str) -> Iterator[Process]:
    """Start a process that has a ``/dev/shm`` of 48 MiB."""
    try:
        subprocess.run([*_SMALL_TMPFS, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a tmpfs is not permitted: {error}")
    started = Process.start(tmp_path, *_SMALL_TMPFS)
    started(_SET_NAME_PREFIX, prefix=prefix)
    yield started
    started.kill_all()


@pytest.fixture
def buffer() -> memoryview:
    """Return zeroed memory for a table. Only pages that are touched take memory."""
    return np.zeros(TABLE_BYTES, np.uint8).data


@pytest.fixture
def table(buffer: memoryview) -> Table:
    """Return an empty table for an arena of 16 pages."""
    return Table.format(buffer, bytes(range(16)), 16 * PAGE)


@pytest.fixture
def alice(table: Table) -> Member:
    """Add a first member to the table."""
    return table.join(0, pid=11, started=111)


@pytest.fixture
def bob(table: Table, alice: Member) -> Member:
    """Add a second member to the table."""
    return table.join(1, pid=22, started=222)


@pytest.fixture(name="segment")
def one_segment() -> Iterator[Segment]:
    """Create a segment of one MiB."""
    one = Segment.create(MIB)
    yield one
    one.close()


@pytest.fixture(params=["POSIX shared memory", "memfd"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Segment]:
    """Create a segment of one MiB: once in POSIX shared memory, and once as a memfd."""
    monkeypatch.setattr(segment, "_posix_memory_free", lambda: 1 << 40 if request.param != "memfd" else 0)
    one = Segment.create(MIB)
    yield one
    one.close()


@pytest.fixture
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    """Create an arena of one MiB with this process as its first member, and validate its table after the test.

    All free space stays warm: the trimmer takes free space for a moment, which would disturb tests that count blocks.
    """
    one = Arena.create(MIB, warm=MIB)
    yield one
    if not one.has_left and not request.node.stash.get(_FAILED, False):
        one.validate()
    one.close()


@pytest.fixture
def joined(arena: Arena, process: Callable[[], Process]) -> Callable[[], Process]:
    """Return a function that starts another member of ``arena``. The other process has it in a variable ``arena``."""

    def start() -> Process:
        other = process()
        other("arena = Arena.attach(at, arena_id, warm=1 << 20)", at=arena.segment.whereabouts, arena_id=arena.arena_id)
        return other

    return start


@pytest.fixture
def cluster() -> Iterator[str]:
    """Return the address of a cluster that no other test uses, and leave the cluster after the test."""
    name = f"tcp://{secrets.token_hex(8)}"
    yield name
    while (joined := membership._by_cluster.get(name)) is not None:
        membership.leave(name, *joined.roles[0][:2])
    # Remove the files of processes that were killed after the test.
    rendezvous.purge()


@pytest.fixture
def name(cluster: str) -> Iterator[str]:
    """Return the name of a rendezvous that does not exist yet."""
    yield rendezvous.name_for(cluster)
    Path(f"/dev/shm{rendezvous.name_for(cluster)}").unlink(missing_ok=True)


@pytest.fixture
def meet(name: str) -> Iterator[Callable[..., rendezvous.Rendezvous]]:
    """Return a function that enters the rendezvous, and leave the rendezvous after the test."""
    with contextlib.ExitStack() as stack:

        def meet(*, create: bool = True) -> rendezvous.Rendezvous:
            one = rendezvous.enter(name, create=create)
            assert one is not None
            stack.callback(one.close)
            return one

        yield meet


@pytest.fixture
def member(process: Callable[[], Process], cluster: str) -> Callable[[], Process]:
    """Return a function that starts another process, which joins the arena of ``cluster``."""

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
    """Replace the leak check of tests with clusters: ``nothing_is_left`` is exact, and runs after every test."""


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest, prefix: str) -> Iterator[None]:
    """Check after each test that passed: no names, descriptors of shared memory, views or threads are left."""
    before = _leftovers(prefix)
    yield
    gc.collect()
    if not request.node.stash.get(_FAILED, False):
        wait_until(
            lambda: not (_leftovers(prefix) - before), "everything is released: " + str(_leftovers(prefix) - before)
        )


def _leftovers(prefix: str) -> set[Any]:
    names = {entry.name for entry in Path("/dev/shm").glob(f"{prefix}*")}
    threads = {thread for thread in threading.enumerate() if thread.name.startswith("dask-shm")}
    descriptors = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            descriptors.add((number, os.readlink(f"/proc/self/fd/{number}")))
    memory = {entry for entry in descriptors if prefix in entry[1]}
    return names | threads | memory | {("views", count) for count in range(len(ATLAS))}
