"""Processes of one user that are on one machine and cannot share are told why, once, with the remedy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from namespaces import can_unshare, root
from other_processes import join, wait_until

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import ArenaFull
from dask_shm_plugin.node import membership, strangers
from dask_shm_plugin.notices import warn_once

MIB = 1 << 20
pytestmark = [root, pytest.mark.skipif(not can_unshare(), reason="needs namespaces")]

#: A member of the cluster in other surroundings. It ends when its input does, and prints its capacity at each line.
STRANGER = """
import logging, sys
from dask_shm_plugin.linux import segment
from dask_shm_plugin.node import membership, rendezvous, strangers
from dask_shm_plugin.table import layout
logging.basicConfig(stream=sys.stdout, format="%(message)s")
prefix, cluster, capacity, is_newer = sys.argv[1:]
layout.VERSION += int(is_newer)
segment.NAME_PREFIX = rendezvous.NAME_PREFIX = prefix
try:
    arena = membership.join(cluster, "nanny", "tcp://there", capacity=lambda: int(capacity), is_share=True)
except Exception as error:
    print(error)
    print(*strangers.reasons(), flush=True)
    sys.exit()
print("joined", flush=True)
for _ in sys.stdin:
    print(arena.stats().capacity, flush=True)
membership.leave(cluster, "nanny", "tcp://there")
"""

PID = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
TIME = ["unshare", "--time", "--fork", "--kill-child", "--boottime", "1000"]
USER_ID = ["unshare", "--user", "--map-user=1000"]
USER = ["unshare", "--user", "--map-current-user"]
GROUP = ["setpriv", "--regid", "65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"]
CAPABILITIES = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


class Stranger:
    """A member in other surroundings."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def line(self) -> str:
        """Return the next line that it prints."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def capacity(self) -> int:
        """Return the capacity of its arena now."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self.line())


@contextmanager
def stranger(prefix: str, cluster: str, wrapper: list[str], *, is_newer: bool = False) -> Iterator[Stranger]:
    """Start a member in other surroundings, of this layout or a newer one; skip the test if these cannot be made."""
    if not shutil.which(wrapper[0]) or subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip(f"not permitted here: {' '.join(wrapper)}")
    line = [*wrapper, sys.executable, "-c", STRANGER, prefix, cluster, str(64 * MIB), str(int(is_newer))]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=os.getcwd()) as process:
        yield Stranger(process)
        process.communicate()


@pytest.mark.parametrize(
    ("wrapper", "why", "is_newer"),
    [(PID, "process (pid)", False), (PID, "process (pid)", True), (TIME, "time", False), (USER_ID, "user", False)],
    ids=["pid", "pid, with another layout", "time", "user"],
)
def test_processes_in_other_namespaces_have_an_arena_of_their_own(
    cluster: str, prefix: str, caplog: pytest.LogCaptureFixture, wrapper: list[str], why: str, is_newer: bool
) -> None:
    """Both sides are told, once; the arenas divide a capacity that is a share of the machine's memory."""
    warn_once.cache_clear()
    arena = membership.join(cluster, "nanny", "tcp://here", capacity=lambda: 64 * MIB, is_share=True)
    assert arena is not None
    reserve(arena, 40 * MIB)
    with stranger(prefix, cluster, wrapper, is_newer=is_newer) as other:
        said = other.line()
        assert f"another {why} namespace; " in said
        assert other.line() == "joined"
        assert other.capacity() == 32 * MIB
        wait_until(lambda: arena.stats().capacity == 32 * MIB, "the first arena has noticed the second")
        with pytest.raises(ArenaFull):
            reserve(arena, 40 * MIB)
        reserve(arena, 20 * MIB)
        (reason,) = [one for one in strangers.reasons() if f"another {why} namespace" in one]
        assert reason in said
    wait_until(lambda: arena.stats().capacity == 64 * MIB, "the first arena has all of the capacity again")
    reserve(arena, 40 * MIB)
    assert [record.message for record in caplog.records].count(said) == 1
    membership.leave(cluster, "nanny", "tcp://here")


def reserve(arena: Arena, size: int) -> None:
    """Reserve room in an arena, and give it up."""
    with arena.draft(size):
        pass


@pytest.mark.parametrize(
    ("wrapper", "why"),
    [
        (USER, "another user namespace; "),
        (GROUP, "their primary group differs; "),
        (CAPABILITIES, "capabilities that this process lacks; "),
    ],
    ids=["user", "group", "capabilities"],
)
def test_processes_whose_memory_is_refused_are_told_why(
    cluster: str, prefix: str, wrapper: list[str], why: str
) -> None:
    """The kernel does not say why it refuses, so the differences are looked for; ``dask shm doctor`` says the same."""
    join(cluster)
    with stranger(prefix, cluster, wrapper) as other:
        said = other.line()
        assert why in said
        assert said in other.line()
    membership.leave(cluster, "nanny", "tcp://here")
