"""Where a Python or a kernel lacks something, values are shared in a slower way, or sent; nothing fails and nothing stays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import poor_kernel
import pytest
from sampling import sample

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not poor_kernel.can_be_had(), reason="no numbers of its system calls are known"),
]

ALL_BUT_LOCKS = [what for what in poor_kernel.LACKS if what != "locks"]

#: Scatters, changes, forks, fetches and gathers; says what came of it, and what the client's process and the workers were told.
WORK = """
import json, os

import numpy as np
from clusters import local_cluster, register

from dask_shm_plugin import is_shared


def listen():
    import logging
    from dask_shm_plugin import notices

    heard = logging.Handler()
    heard.records = []
    heard.emit = lambda record: heard.records.append(record.getMessage())
    logging.getLogger("dask_shm_plugin").addHandler(heard)
    os.heard = heard.records


def look(x):
    return float(x.sum()), is_shared(x)


def change(x):
    x[0] = 42
    return x


def of_child(x):
    # The child looks when its parent has made something new.
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.read(read, 1)
        os._exit(int(x[-1] == 1.0))
    del x
    os.write(write, b"x")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    listen()
    with local_cluster(2, None) as client:
        client.run(listen)
        register(client, threshold="64 KiB", capacity="64 MiB")
        a, b = client.scheduler_info()["workers"]
        data = np.ones(1 << 18)
        scattered = client.scatter(data, broadcast=True)
        seen = [client.submit(look, scattered, workers=[w], pure=False).result() for w in (a, b)]
        made = client.submit(np.ones, 1 << 18, workers=[a])
        changed = client.submit(change, made, workers=[b])
        assert client.submit(look, changed, workers=[a]).result()[0] == data.sum() + 41
        assert client.submit(of_child, scattered, workers=[b]).result() == 1
        assert np.array_equal(client.gather(scattered), data)
        assert client.gather(changed)[0] == 42
        assert all(seen_sum == data.sum() for seen_sum, _ in seen)
        warnings = list(client.run(lambda: os.heard).values())
        shared = [is_it for _, is_it in seen]
    print("said", json.dumps({"shared": shared, "workers": warnings, "client": os.heard}), flush=True)
"""


def work(folder: Path, lacks: list[str]) -> Any:
    """Let a cluster work that lacks something, and return what it says."""
    (folder / "work.py").write_text(WORK)
    done = subprocess.run(
        [sys.executable, folder / "work.py"],
        env=poor_kernel.environment(folder, lacks),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=100,
    )
    return json.loads(done.stdout.partition("said ")[2])


def run_tests(folder: Path, lacks: list[str], *names: str) -> None:
    """Let some of the other tests run in a process that lacks something."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(Path(__file__).parent / n for n in names),
    ]
    environment = poor_kernel.environment(folder, lacks)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("lacks", sample(ALL_BUT_LOCKS, 2))
def test_blocks_work_as_elsewhere(lacks: str, tmp_path: Path) -> None:
    """What is tested of drafts, blocks and views holds where one thing is missing."""
    run_tests(tmp_path, [lacks], "pure/test_block.py")


def test_blocks_and_forks_work_where_all_is_missing_that_can_be_done_without(tmp_path: Path) -> None:
    """What is tested of drafts, blocks, views and forked children holds where nearly everything is missing."""
    run_tests(tmp_path, ALL_BUT_LOCKS, "pure/test_block.py", "pure/test_forks.py")


def test_a_cluster_shares_where_all_is_missing_that_can_be_done_without(tmp_path: Path) -> None:
    """Scattered values are mapped by all, and nobody is told anything."""
    said = work(tmp_path, ALL_BUT_LOCKS)
    assert said == {"shared": [True, True], "workers": [[], []], "client": []}


def test_a_cluster_without_locks_of_open_files_sends_and_says_so_once(tmp_path: Path) -> None:
    """Nobody could tell the living from the dead, so sharing is off in each process, with a reason and a remedy."""
    said = work(tmp_path, ["locks"])
    assert said["shared"] == [False, False]
    for heard in [*said["workers"], said["client"]]:
        assert len(heard) == 1
        assert "F_OFD_SETLK" in heard[0]


def test_a_small_dev_shm_without_memfd_names_its_remedy(tmp_path: Path) -> None:
    """There is nowhere to put an arena, until somebody makes room."""
    lines = """
import pytest
from dask_shm_plugin import segment
from dask_shm_plugin.exceptions import ArenaUnavailable
segment._posix_memory_free = lambda: 0
with pytest.raises(ArenaUnavailable, match="make /dev/shm larger"):
    segment.Segment.create(1 << 20)
"""
    subprocess.run([sys.executable, "-c", lines], env=poor_kernel.environment(tmp_path, ["memfd"]), check=True)
