"""Without a feature of Python or the kernel, values are shared in a slower way or sent; nothing fails or leaks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import poor_kernel
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not poor_kernel.can_be_had(), reason="no numbers of its system calls are known"),
]

ALL_BUT_LOCKS = [feature for feature in poor_kernel.LACKS if feature != "locks"]

#: Scatters, changes, forks, fetches and gathers; prints the results, and the warnings of the client and the workers.
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
    """Run the script in an environment that lacks some features, and return the values that it prints."""
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
    """Run some of the other tests in an environment that lacks some features."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(Path(__file__).parents[1] / n for n in names),
    ]
    environment = poor_kernel.environment(folder, lacks)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 0, done.stdout


@pytest.mark.long
@pytest.mark.parametrize("lacks", ALL_BUT_LOCKS)
def test_blocks_work_without_one_feature(lacks: str, tmp_path: Path) -> None:
    """The tests of drafts, blocks and views pass if one feature other than the locks is missing."""
    run_tests(tmp_path, [lacks], "arena/test_block.py")


@pytest.mark.long
def test_blocks_and_forks_work_without_any_optional_feature(tmp_path: Path) -> None:
    """The tests of drafts, blocks, views and forked children pass if all features but the locks are missing."""
    run_tests(tmp_path, ALL_BUT_LOCKS, "arena/test_block.py", "arena/test_forks.py")


def test_a_cluster_shares_without_any_optional_feature(tmp_path: Path) -> None:
    """Scattered values are mapped by all workers, and no process logs a warning."""
    said = work(tmp_path, ALL_BUT_LOCKS)
    assert said == {"shared": [True, True], "workers": [[], []], "client": []}


def test_a_cluster_without_open_file_locks_sends_and_warns_once(tmp_path: Path) -> None:
    """Without these locks, dead members cannot be told from living ones: each process warns once and does not share."""
    said = work(tmp_path, ["locks"])
    assert said["shared"] == [False, False]
    for heard in [*said["workers"], said["client"]]:
        assert len(heard) == 1
        assert "F_OFD_SETLK" in heard[0]


def test_the_error_for_a_full_dev_shm_without_memfd_names_the_remedy(tmp_path: Path) -> None:
    """There is no place for an arena until the user makes room, so the error must say how to do that."""
    lines = """
import pytest
from dask_shm_plugin.linux import segment
from dask_shm_plugin.exceptions import ArenaUnavailable
segment._posix_memory_free = lambda: 0
with pytest.raises(ArenaUnavailable, match="make /dev/shm larger"):
    segment.Segment.create(1 << 20)
"""
    subprocess.run([sys.executable, "-c", lines], env=poor_kernel.environment(tmp_path, ["memfd"]), check=True)
