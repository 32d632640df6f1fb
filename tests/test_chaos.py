"""Processes of real clusters are killed at random moments; ``python benchmarks/chaos`` does the same for hours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

CHAOS = Path(__file__).parent.parent / "benchmarks" / "chaos"


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Make the parts of the chaos run importable, and let them write their notes to a folder of the test."""
    monkeypatch.syspath_prepend(str(CHAOS))
    monkeypatch.setenv("CHAOS_FOLDER", str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(CHAOS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_what_is_killed_at_any_moment_makes_nothing_wrong_and_leaves_nothing(tmp_path: Path) -> None:
    """Dozens of workers, nannies and clients die: all values are right, nothing hangs, the arena ends empty."""
    options = f"--kills 24 --gap 0.2 --seed 13 --kinds commands --json --folder {tmp_path}".split()
    done = subprocess.run([sys.executable, str(CHAOS), *options], capture_output=True, text=True, timeout=390)
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["kills"] >= 24
    assert report["checked"] > 0
    assert report["shared"] > 0
    never = ("wrong", "hangs", "leaked_bytes", "names_left_in_dev_shm", "tracebacks_of_ours", "findings")
    assert not any(report[what] for what in never), report
    assert report["dead_members"]["never"] == 0


def test_a_wrong_value_would_be_noticed(parts: Path) -> None:
    """Another value's bytes, and a single changed byte, are told apart from the right ones and noted at once."""
    import logs
    import tasks

    value = tasks.value(5)
    assert tasks.is_right(value, 5, "here")
    assert not tasks.is_right(tasks.value(6), 5, "here")
    value[1000] ^= 1
    assert not tasks.is_right(value, 5, "here")
    assert logs.summary(parts)["wrong"] == 2


def test_a_traceback_of_the_package_would_be_noticed(parts: Path) -> None:
    """In a log, an error that was raised in the package counts, and one of Dask's that only passed through does not."""
    import logs

    frame = '  File "/here/dask_shm_plugin/worker.py", line 1, in write\n    something()\n'
    deeper = '  File "/there/distributed/comm/tcp.py", line 1, in write\n    something()\n'
    head = "Traceback (most recent call last):\n"
    (parts / "a.log").write_text(f"{head}{frame}{deeper}OSError: theirs\n")
    assert logs.tracebacks_of_ours(parts) == {}
    (parts / "b.log").write_text(f"{head}{deeper}{frame}KeyError: 1\n{head}{deeper}dask_shm_plugin.exceptions.X: 1\n")
    assert sum(logs.tracebacks_of_ours(parts).values()) == 2


def test_a_seed_makes_the_schedule_of_kills_again(parts: Path) -> None:
    """Whoever has the seed of a run kills the same roles in the same ways, and another seed others."""
    import kills

    def first(seed: int) -> list[kills.Kill]:
        return list(islice(kills.schedule(seed, 1.0), 50))

    assert first(1) == first(1) != first(2)
    assert {kill.kind for kill in first(1)} >= {"SIGKILL", "in the lock", "SIGSTOP"}
