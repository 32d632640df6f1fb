"""Kill processes of real clusters at random moments; ``python tests/stress/chaos`` does the same for hours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[1] / "stress" / "chaos"


@pytest.fixture
def chaos_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Make the modules of the chaos run importable, and yield the folder to which they write their notes."""
    monkeypatch.syspath_prepend(str(CHAOS))
    monkeypatch.setenv("CHAOS_FOLDER", str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(CHAOS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(400)
def test_random_kills_cause_no_wrong_value_no_hang_and_no_leak(tmp_path: Path) -> None:
    """Dozens of workers, nannies and clients die: all values are right, no call hangs, and the arena ends empty."""
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
    assert report["list_and_kernel"]["samples"] > 0


def test_a_wrong_value_would_be_noticed(chaos_folder: Path) -> None:
    """The chaos run detects and notes the bytes of another value, and a single changed byte."""
    import logs
    import tasks

    value = tasks.value(5)
    assert tasks.is_right(value, 5, "here")
    assert not tasks.is_right(tasks.value(6), 5, "here")
    value[1000] ^= 1
    assert not tasks.is_right(value, 5, "here")
    assert logs.summary(chaos_folder)["wrong"] == 2


def test_a_traceback_of_the_package_would_be_noticed(chaos_folder: Path) -> None:
    """The chaos run counts a logged error that the package raised, and none of Dask's that only passed through it."""
    import logs

    frame = '  File "/here/dask_shm_plugin/worker.py", line 1, in write\n    something()\n'
    deeper = '  File "/there/distributed/comm/tcp.py", line 1, in write\n    something()\n'
    head = "Traceback (most recent call last):\n"
    (chaos_folder / "a.log").write_text(f"{head}{frame}{deeper}OSError: theirs\n")
    assert logs.tracebacks_of_ours(chaos_folder) == {}
    (chaos_folder / "b.log").write_text(
        f"{head}{deeper}{frame}KeyError: 1\n{head}{deeper}dask_shm_plugin.exceptions.X: 1\n"
    )
    assert sum(logs.tracebacks_of_ours(chaos_folder).values()) == 2


def test_values_that_were_lost_or_computed_again_would_be_noticed(chaos_folder: Path) -> None:
    """Only those count that had a second holder before."""
    import logs
    import tasks

    for number in (1, 1, 2, 3):
        tasks.note("made", number=number)
    for number in (2, 3, 4):
        tasks.note("settled", number=number)
    tasks.note("made", number=2)
    tasks.note("lost", number=4, status="lost")
    summary = logs.summary(chaos_folder)
    assert summary["recomputed"] == 2
    assert summary["recomputed_though_published"] == 1
    assert summary["lost"] == 1
    assert summary["large_values_with_two_holders"] == 3


def test_memory_that_is_not_listed_would_be_noticed(chaos_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference counts once, with its largest size and its duration."""
    import sums

    seen = iter([0, 0, -sums.MIB, 50 * sums.MIB, 60 * sums.MIB, 0, -90 * sums.MIB])
    monkeypatch.setattr(sums.Sums, "_difference", lambda self: next(seen))
    monkeypatch.setattr(sums, "_INTERVAL_S", 0)
    compared = sums.Sums(chaos_folder)
    for number in range(6):
        compared.sample(f"after {number}")
    report = compared.report()
    assert (report["samples"], report["outliers"], report["largest_mib"]) == (4, 2, 90)
    assert report["largest_outliers"][1].startswith("+60.0 MiB for 0.00 s after 2")
    assert compared.lasting() == []


def test_a_seed_reproduces_the_schedule_of_kills(chaos_folder: Path) -> None:
    """A run can be repeated: its seed kills the same roles in the same ways, and another seed kills others."""
    import kills

    def first(seed: int) -> list[kills.Kill]:
        return list(islice(kills.schedule(seed, 1.0), 50))

    assert first(1) == first(1) != first(2)
    assert {kill.kind for kill in first(1)} >= {"SIGKILL", "in the lock", "SIGSTOP"}
