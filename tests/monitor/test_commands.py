"""The commands of ``dask shm`` print what a user asks for, as text and as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import secrets
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from other_processes import JOIN, LEAVE, Process, wait_until

from dask_shm_plugin.monitor import commands, doctor, top
from dask_shm_plugin.monitor.doctor import Finding
from dask_shm_plugin.node import rendezvous


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory, nothing_leaks: None) -> Iterator[Process]:
    """Start a process that is the only member of an arena, and holds a view of a block."""
    process = Process.start(tmp_path_factory.mktemp("meet"))
    process(JOIN, cluster=secrets.token_hex(8))
    process("block = publish(arena, bytes(10_000)); view = arena.view(block.descriptor, 0, 10_000)")
    process("arena.labels.write()")
    yield process
    process(LEAVE)
    process.kill_all()


def run(*arguments: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(commands.shm, arguments)


def own(result: Result, member: Process) -> dict:
    """Return the arena of the member from the JSON of a command."""
    arena = member("arena.arena_id.hex()")
    return next(one for one in json.loads(result.output) if one["arena"] == arena)


def test_the_commands_are_found_by_dask() -> None:
    """``dask shm`` is an entry point of this package."""
    line = [sys.executable, "-m", "dask", "shm", "--help"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in ("doctor", "list", "purge", "show", "top"):
        assert f"  {name} " in done.stdout


def test_list_prints_a_line_for_each_arena(member: Process) -> None:
    """The line has the beginning of the arena's id, its size and its kind of memory."""
    result = run("list")
    [line] = [line for line in result.output.splitlines() if line.startswith(member("arena.arena_id.hex()")[:8])]
    assert "1.00 MiB" in line
    assert line.endswith(member("arena.segment.kind"))
    listed = own(run("list", "--json"), member)
    assert (listed["capacity"], listed["used"]) == (1 << 20, 12_288)


def test_show_prints_the_blocks_of_one_arena_with_the_reasons(member: Process) -> None:
    """The reason names the process that has a view."""
    arena = member("arena.arena_id.hex()")
    result = run("show", arena[:8])
    assert result.exit_code == 0
    assert f"a view lives in pid {member.pid}" in result.output
    assert "largest value that fits" in result.output
    assert own(run("show", arena, "--json"), member)["blocks"][0]["size"] == 10_000


def test_another_system_is_told_that_shared_memory_needs_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands exist on each system, because ``dask`` loads them for all of its commands."""
    monkeypatch.setattr(sys, "platform", "darwin")
    result = run("list")
    assert result.exit_code == 1
    assert "needs Linux" in result.output


def test_show_says_which_arena_is_not_there() -> None:
    """The status tells, too."""
    result = run("show", "nonsense")
    assert result.exit_code == 1
    assert "there is no arena nonsense" in result.output


def test_the_order_and_the_number_of_blocks_can_be_chosen(member: Process) -> None:
    """The largest come first, or the oldest."""
    member("more = [publish(arena, bytes(n * 5000)) for n in (4, 1)]")
    arena = member("arena.arena_id.hex()")
    by_size = run("show", arena, "--limit", "1").output
    assert "19.53 kiB" in by_size
    assert "2 more blocks" in by_size
    assert "9.77 kiB" in run("show", arena, "--by", "age", "--limit", "1").output
    member("[block.close() for block in more]; arena.holdings.tidy()")


def test_purge_removes_only_what_the_dead_have_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial removes nothing; the rendezvous of the living stays in any case."""
    # Under the usual names, any process of this user that creates an arena removes them first.
    prefix = f"dask-shm-{os.getpid()}-test-purge-"
    monkeypatch.setattr(rendezvous, "NAME_PREFIX", prefix)
    living = Process.start(tmp_path)
    living("segment.NAME_PREFIX = rendezvous.NAME_PREFIX = prefix", prefix=prefix)
    dead = living.fork()
    clusters = [secrets.token_hex(8) for _ in range(2)]
    for process, cluster in zip((dead, living), clusters, strict=True):
        process(JOIN, cluster=cluster)
    left, alive = (f"/dev/shm{rendezvous.name_for(cluster)}" for cluster in clusters)
    dead.kill()
    trial = run("purge", "--dry-run").output
    assert f"{left}: no process attends it; would be removed" in trial
    assert alive not in trial
    assert Path(left).exists()
    assert f"{left}: no process attends it; removed" in run("purge").output
    assert not Path(left).exists()
    assert Path(alive).exists()
    living(LEAVE)
    living.kill_all()


def test_top_shows_rates_between_two_looks(member: Process) -> None:
    """The counters come from the members, by way of the arena."""
    arena = member("arena.arena_id.hex()")

    def look() -> top.Look:
        # Other processes of this user may count at the same time.
        seen = top._look()
        return seen._replace(found=[one for one in seen.found if one.arena == arena])

    before = look()
    member("from dask_shm_plugin.metrics import COUNTERS")
    member("COUNTERS.count('published', 5 << 20); COUNTERS.count_sent('arena-full', 7); arena.labels.write()")
    now = look()
    lines = "\n".join(top.rates(now._replace(at=before.at + 1), before))
    assert "published 5.00 MiB/s" in lines
    assert "sent (arena-full) 7 B/s" in lines
    assert "blocks by age" in "\n".join(top.frame(now, before, "a"))


def test_top_without_a_terminal_prints_frames(member: Process) -> None:
    """The number of frames can be limited."""
    result = run("top", "--count", "2", "--interval", "0.01")
    assert result.exit_code == 0
    assert result.output.count("blocks by size") == 2


def test_top_follows_keys_in_a_terminal(member: Process) -> None:
    """It draws in place, takes another order, and quits."""
    leader, follower = pty.openpty()
    line = [sys.executable, "-m", "dask", "shm", "top", "--interval", "0.05"]
    env = os.environ | {"TERM": "xterm", "LINES": "30", "COLUMNS": "120"}
    with subprocess.Popen(line, stdin=follower, stdout=follower, stderr=follower, env=env) as process:
        try:
            os.close(follower)
            read_until(leader, b"blocks by size")
            os.write(leader, b"aq")  # only the cells that differ are drawn anew, so no text can be waited for
            wait_until(lambda: (read_some(leader), process.poll())[1] == 0, "it has ended", 60)
        finally:
            process.kill()
            os.close(leader)


def read_some(leader: int) -> bytes:
    """Read from a terminal, if there is anything to be read now."""
    with contextlib.suppress(OSError):  # the other end is closed
        return os.read(leader, 65536) if select.select([leader], [], [], 0.1)[0] else b""
    return b""


def read_until(leader: int, text: bytes) -> None:
    """Read from a terminal until it has shown a text."""
    shown = b""

    def is_shown() -> bool:
        nonlocal shown
        shown += read_some(leader)
        return text in shown

    wait_until(is_shown, f"the terminal shows {text!r}", 60)


def test_doctor_finds_nothing_wrong_here_and_measures() -> None:
    """On a machine on which the tests run, sharing works."""
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "attach" in result.output
    assert {one["subject"] for one in json.loads(run("doctor", "--json").output)} >= {
        "versions",
        "/dev/shm",
        "ulimit -n",
    }


def test_doctor_ends_with_status_1_if_sharing_would_be_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy is printed."""
    monkeypatch.setenv("DASK_SHM__CAPACITY", "0")
    import dask

    with dask.config.set({"shm.capacity": 0}):
        result = run("doctor")
    assert result.exit_code == 1
    assert "set shm.capacity" in result.output


def test_doctor_says_why_processes_of_this_machine_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reason comes with its remedy; `test_strangers` has the reasons."""
    monkeypatch.setattr(doctor.strangers, "reasons", lambda: ["they are elsewhere; start them here"])
    monkeypatch.setattr(doctor, "_CHECKS", (doctor._namespace,))
    finding = Finding("other processes", doctor.SLOWER, "they are elsewhere", "start them here")
    assert finding in doctor.examine()
    assert {"        → start them here"} < set(doctor.report(doctor.examine()))


def test_a_check_that_fails_does_not_end_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are still made, and the error is a finding."""

    def _odd() -> list[Finding]:
        raise ValueError("odd")

    monkeypatch.setattr(doctor, "_CHECKS", (_odd, doctor._versions))
    odd, *others = doctor.examine()
    assert odd == Finding("odd", doctor.SLOWER, "ValueError: odd")
    assert others
