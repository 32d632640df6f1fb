"""Whole clusters with a small ``/dev/shm``, with one that other programs fill, and in a control group."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from control_groups import ControlGroup, make_control_group
from namespaces import can_unshare, root
from observing import MIB, wait_until
from processes import run_script

pytestmark = [root, pytest.mark.slow]

BEGIN = """
import json, os, signal, subprocess, sys
from clusters import local_cluster
from observing import *
from surroundings import *
from dask_shm_plugin import stats

KIB8, MIB1, MIB8 = 1 << 10, 1 << 17, 1 << 20  # in doubles

def main(client):
    a, b = addresses(client)
    client.run(listen)
    before = pids(client)
    said = {}
"""
END = """
    said |= {"sent": sent(client), "alive": pids(client) == before, "warnings": warnings_of(client, a)[a]}
    (arena,) = stats(client).values()
    print(json.dumps(said | {"capacity": arena["capacity"], "arena": [text for level, text in heard() if level == "INFO"]}))

if __name__ == "__main__":
    listen()
    with local_cluster(2, {"threshold": "64 KiB"} | OPTIONS, memory_limit="1 GiB") as client:
        main(client)
"""


def run(lines: str, options: dict[str, Any], *wrapper: str) -> dict[str, Any]:
    """Run a script with a cluster of two workers, and return its report."""
    printed = run_script(BEGIN + lines + END.replace("OPTIONS", repr(options)), *wrapper)
    said: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return said


def with_dev_shm(size: str) -> list[str]:
    """Return the start of a command that runs a script with a ``/dev/shm`` of another size."""
    if not can_unshare():
        pytest.skip("needs namespaces")
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", mount, "sh"]


WITHIN = """
    said["shared"] = [move(client, a, b, MIB8) for _ in range(3)]
    future = client.scatter(array(1, 3 * MIB8), broadcast=True)
    said["broadcast"] = [see.shared for see in see_on(client, future, [a, b])]
"""


@pytest.mark.parametrize("size", ["16m", pytest.param("64m", marks=pytest.mark.long)])
def test_a_memfd_takes_the_place_of_a_small_dev_shm(size: str) -> None:
    """As in a plain container, no setting is needed, and values larger than ``/dev/shm`` are shared."""
    said = run(WITHIN, {}, *with_dev_shm(size))
    assert said["shared"] == [True] * 3
    assert said["broadcast"] == [True] * 2
    assert said["sent"] == {}
    assert said["warnings"] == []
    assert said["alive"]
    assert said["capacity"] > 256 * MIB
    (line,) = said["arena"]
    assert "memfd" in line


FILLED = """
    filler = "/dev/shm/of somebody else"

    def eat():
        with open(filler, "wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(1 << 20)):
                pass

    said["before"] = [move(client, a, b, MIB1), move(client, b, a, MIB1)]
    eat()
    said["filled"] = [move(client, a, b, MIB8) for _ in range(3)]
    seed = fresh()
    said["scattered"] = client.submit(describe, client.scatter(array(seed, MIB8), broadcast=True)).result() == describe(array(seed, MIB8))
    os.unlink(filler)
    said["emptied"] = [move(client, a, b, MIB8), move(client, b, a, MIB8)]

    # Now it comes and goes while values are on their way.
    subprocess.Popen
    eater = subprocess.Popen([sys.executable, "-c", EATER, filler])
    said["meanwhile"] = [move(client, *order, MIB1 << n % 4) for n in range(12) for order in ((a, b), (b, a))]
    eater.kill()
    eater.wait()
    with suppress(OSError):
        os.unlink(filler)
    said["after"] = [move(client, a, b, MIB8), move(client, b, a, MIB8)]
"""
EATER = """
import os, sys
while True:
    try:
        with open(sys.argv[1], "wb", buffering=0) as file:
            while file.write(bytes(1 << 20)):
                pass
    except OSError:
        os.unlink(sys.argv[1])
"""


@pytest.mark.long
def test_values_are_sent_while_another_program_fills_dev_shm(tmp_path: Path) -> None:
    """Values are right while it is full, and while it fills and empties; while it is empty, they are shared."""
    source = f"    EATER = {EATER!r}\n{FILLED}".replace("    subprocess.Popen\n", "")
    said = run(source, {"capacity": "96 MiB"}, *with_dev_shm("176m"))
    assert said["before"] == [True] * 2
    assert said["filled"] == [False] * 3
    assert said["scattered"]
    assert said["emptied"] == [True] * 2
    assert said["after"] == [True] * 2
    assert said["alive"]
    assert said["sent"]["memory-exhausted"] >= 4
    (line,) = said["arena"]
    assert "POSIX shared memory" in line
    (warning,) = said["warnings"]
    assert "memory-exhausted" in warning
    assert "make room in /dev/shm or lower shm.capacity" in warning


@pytest.fixture
def group() -> Iterator[ControlGroup]:
    """Make a control group of 1000 MiB."""
    group = make_control_group(f"dask-shm-test-cluster-{os.getpid()}", 1000 * MIB)
    yield group
    wait_until(group.remove, "the control group is empty")


FULL_GROUP = """
    # A block that leaves room for some values.
    from dask_shm_plugin.linux import limits
    from dask_shm_plugin.node import membership
    (mine,) = membership.all_arenas()
    with mine.draft(limits.head_room() - (96 << 20)) as draft:
        ballast = draft.seal()
    kept = []
    for n in range(30):
        seed = fresh()
        made = client.submit(array, seed, MIB8, workers=[a])
        (seen,) = see_on(client, made, [b])
        assert_descriptions_equal(seen.description, describe(array(seed, MIB8)))
        if not seen.shared:
            break
        kept.append((seed, made))
    said["kept"], said["full"] = len(kept), not seen.shared
    said["right"] = client.submit(describe, kept[0][1], workers=[b]).result() == describe(array(kept[0][0], MIB8))
    kept.clear()
    del made
    ballast.close()
    settle(client)
    said["after"] = [move(client, a, b, MIB8), move(client, b, a, MIB8)]
"""


def test_no_process_is_killed_in_a_control_group_that_is_nearly_full(group: ControlGroup) -> None:
    """The capacity is more than the group allows: values for which the group has no room are sent."""
    enter = f'echo $$ > {group.procs} && exec "$@"'
    said = run(FULL_GROUP, {"capacity": "100%", "warm": 0}, "sh", "-c", enter, "sh")
    assert said["alive"]
    assert group.killed() == 0
    assert said["right"]
    assert said["kept"] > 0
    assert said["full"]
    assert said["after"] == [True] * 2
    assert said["sent"]["no-head-room"] >= 1
    assert said["capacity"] <= 1000 * MIB
    (line,) = said["arena"]
    assert f"{1000 * MIB} bytes (control group {group.folder})" in line
    (warning,) = said["warnings"]
    assert "no-head-room" in warning
    assert "raise the limit" in warning
