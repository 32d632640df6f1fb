"""The comparison with distributed's own tests finds the tests that differ, and no others; checked on planted tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parents[1] / "stress" / "suite"

PLANTED = """
from pathlib import Path
from distributed.utils_test import gen_cluster


@gen_cluster(client=True)
async def test_same(c, s, a, b):
    assert await c.submit(len, await c.scatter(b"1" * 10_000)) == 10_000


@gen_cluster(client=True)
async def test_planted(c, s, a, b):
    assert "dask-shm" not in a.plugins


@gen_cluster(client=True)
async def test_now_and_then(c, s, a, b):
    once = Path(__file__).with_name("once")
    if "dask-shm" in a.plugins and not once.exists():
        once.touch()
        raise AssertionError("the first time only")


def test_stock_fails():
    raise AssertionError("both ways")
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux")
def test_a_test_that_always_fails_with_the_plugin_is_reported_and_one_that_fails_once_is_not(tmp_path: Path) -> None:
    """Only the planted difference is reported, with exit status 1, and the counts show that values were shared."""
    tests = tmp_path / "distributed" / "tests"
    tests.mkdir(parents=True)
    (tests / "test_planted.py").write_text(PLANTED)
    command = [
        sys.executable,
        str(SUITE),
        "--distributed",
        str(tmp_path),
        "--at-once",
        "--logs",
        str(tmp_path / "logs"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("DIFFERS")] == [
        "DIFFERS distributed/tests/test_planted.py::test_planted"
    ]
    assert "unsteady with the plugin (1): distributed/tests/test_planted.py::test_now_and_then" in lines
    assert "tests: 4 run both ways, 3 pass stock, 1 of these with the plugin, too" in lines
    assert "values: 0 published" not in done.stdout


def test_a_folder_without_tests_is_reported_and_is_no_success(tmp_path: Path) -> None:
    """A run that compares nothing has another exit status than a run without differences."""
    command = [sys.executable, str(SUITE), "--distributed", str(tmp_path), "--logs", str(tmp_path / "logs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "nothing was compared: there is no distributed/tests" in done.stdout
