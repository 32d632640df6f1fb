"""The examples, which users copy first, run unchanged and stay short."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

#: For each example, an argument that keeps it quick, and a pattern of its output.
CASES = {
    "quickstart.py": ("16", r"1 block\(s\), 1[67] MiB, for 4 workers"),
    "flights.py": ("20000", r"(?s)without the plugin: .* ([\d,]+) seats .*with the plugin: .* \1 seats .*gain: "),
    "workflow_from_task.py": ("16", r"slope (1\.99|2\.00)\d ± 0\.00\d"),
    "scatter_without_a_copy.py": ("16", r"1 array\(s\) shared in place, 0 copied"),
    "preload.sh": ("16", r"the array is shared on 4 of 4 workers"),
}

linux = pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux")


def run(example: str, *arguments: str) -> str:
    """Run an example as a user does, and return its output."""
    interpreter = "sh" if example.endswith(".sh") else sys.executable
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    with subprocess.Popen(
        [interpreter, str(EXAMPLES / example), *arguments],
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, logged = process.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            # Kill the whole session: the cluster would survive the death of its shell.
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("".join(process.communicate()))
    assert process.returncode == 0, printed + logged
    return printed


@linux
@pytest.mark.parametrize(
    "example",
    [case if case == "quickstart.py" else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_an_example_runs_and_prints_the_expected_result(example: str) -> None:
    """Each example ends with status 0 and prints its result."""
    argument, expected = CASES[example]
    printed = run(example, argument)
    assert re.search(expected, printed), printed


def test_every_example_is_run_by_a_test() -> None:
    """No example is missing in this module."""
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == set(CASES)


@pytest.mark.parametrize("example", CASES)
def test_an_example_has_at_most_forty_lines(example: str) -> None:
    """An example is short enough to be read at one glance."""
    assert len((EXAMPLES / example).read_text().splitlines()) <= 40
