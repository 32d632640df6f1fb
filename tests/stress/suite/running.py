"""Runs of tests of `distributed` in processes of their own, stock or with the plugin in every cluster."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from overlay import RUNNERS
from watching import COUNTS, EVENTS, ONLY

ROOT = Path(__file__).parents[3]
SWITCHED_ON = {
    **{f"DASK_DISTRIBUTED__{role}__PRELOAD": f'["{RUNNERS}.switching"]' for role in ("SCHEDULER", "CLIENT", "WORKER")},
    "DASK_SHM__THRESHOLD": "1",
    "DASK_SHM__CAPACITY": "256 MiB",
}


class Outcome(NamedTuple):
    """The outcome of one test in one run."""

    outcome: str
    """The word of pytest, or "died" if the process died or was ended because the test took too long."""
    message: str = ""
    seconds: float = 0.0
    noise: tuple[str, ...] = ()
    """The logged errors and the printed tracebacks."""

    @property
    def is_good(self) -> bool:
        """Whether the test has passed."""
        return self.outcome in ("passed", "xpassed", "xfailed")


class Run(NamedTuple):
    """The outcomes of all tests of one run."""

    outcomes: dict[str, Outcome]
    uncollected: dict[str, str]
    counts: list[dict[str, Any]]
    """The plugin's counters of each process that was not killed."""
    seconds: float


class Runner:
    """Runs tests in a folder that contains `distributed` and its tests.

    Parameters
    ----------
    folder
        A folder that `overlay.lay_out` has filled.
    logs
        The folder for the output of pytest.
    arguments
        Further arguments for pytest.
    timeout
        Seconds for each test.
    """

    def __init__(self, folder: Path, logs: Path, arguments: Iterable[str], timeout: int) -> None:
        self._folder, self._logs, self._arguments, self._timeout = folder, logs, list(arguments), timeout
        self._numbers = itertools.count(1)
        self._running: list[subprocess.Popen[bytes]] = []
        self._is_over = False

    def end(self) -> None:
        """End all running processes. Any thread may call this."""
        self._is_over = True
        for process in list(self._running):
            _kill(process)

    def run(self, files: Iterable[str], *, shared: bool, only: Iterable[str] | None = None) -> Run:
        """Run all or only some tests of some files. If the process dies in a test, go on with the tests behind it."""
        begun = time.monotonic()
        outcomes: dict[str, Outcome] = {}
        uncollected: dict[str, str] = {}
        rest = None if only is None else set(only)
        with tempfile.TemporaryDirectory(prefix="stress-") as scratch:
            counts = Path(scratch, "counts")
            counts.mkdir()
            while (rest is None or rest) and not self._is_over:
                said = self._run_process(list(files), rest, Path(scratch), shared=shared)
                collected, finished = _apply_events(said, outcomes, uncollected)
                rest = (rest if collected is None else set(collected)) or set()
                if finished is not None or self._is_over:
                    if finished and finished["has_package"] and not shared:
                        raise RuntimeError("the stock run has imported the package")
                    break
                left = rest - outcomes.keys()
                if collected is None or left == rest:
                    raise RuntimeError(f"pytest does not run; its output is in {self._logs}")
                rest = left
            told = [json.loads(file.read_text()) for file in counts.glob("*.json")]
        return Run(outcomes, uncollected, told, time.monotonic() - begun)

    def _run_process(
        self, files: list[str], only: set[str] | None, scratch: Path, *, shared: bool
    ) -> list[dict[str, Any]]:
        """Run one process of pytest, and return its events."""
        number = next(self._numbers)
        events = scratch / f"events-{number}"
        events.touch()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DASK_")}
        environment |= {EVENTS: str(events), "PYTHONPATH": os.pathsep.join([str(self._folder), *_source_folder()])}
        if shared:
            environment |= {**SWITCHED_ON, COUNTS: str(scratch / "counts")}
        if only is not None:
            environment[ONLY] = str(scratch / "only")
            Path(environment[ONLY]).write_text(json.dumps(sorted(only)))
        options = ["-p", f"{RUNNERS}.watching", "-p", "no:cacheprovider", "-q", "--color=no"]
        options += ["--continue-on-collection-errors", "--durations=20"]
        timeouts = ["-o", "timeout_method=signal", "--timeout", str(self._timeout)]
        command = [sys.executable, "-m", "pytest", "--rootdir", ".", *options, *timeouts, *self._arguments, *files]
        log = self._logs / f"{number:03}-{'plugin' if shared else 'stock'}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=self._folder, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            self._running.append(process)
            try:
                self._wait(process, events)
            finally:
                _kill(process)
                process.wait()
                self._running.remove(process)
        return [json.loads(line) for line in events.read_text().splitlines()]

    def _wait(self, process: subprocess.Popen[bytes], events: Path) -> None:
        """Wait until the process has ended, or until a test hangs that its own timeout cannot end."""
        size, since = 0, time.monotonic()
        while process.poll() is None:
            time.sleep(0.1)
            now = events.stat().st_size
            if now != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > 2 * self._timeout + 60:
                return


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process, and the processes that its tests have left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _source_folder() -> list[str]:
    """Return the folder of the package's source, if there is one."""
    return [str(ROOT)] if (ROOT / "dask_shm_plugin").is_dir() else []


def _apply_events(
    said: list[dict[str, Any]], outcomes: dict[str, Outcome], uncollected: dict[str, str]
) -> tuple[list[str] | None, dict[str, Any] | None]:
    """Add the events of a process to the outcomes; return the tests that it collected, and its last event."""
    collected: list[str] | None = None
    finished: dict[str, Any] | None = None
    running: str | None = None
    for event in said:
        kind, test = event["event"], event.get("test", "")
        if kind == "collected":
            collected = event["tests"]
        elif kind == "uncollected":
            uncollected[event["file"]] = event["message"]
        elif kind == "begin":
            running = test
        elif kind == "outcome":
            before = outcomes.get(test)
            if before is None or before.is_good:  # an error in the teardown is an error of the test
                message = event["message"] + (f"\n--- captured\n{event['captured']}" if event["captured"] else "")
                outcomes[test] = Outcome(event["outcome"], message, before.seconds if before else 0.0)
        elif kind == "time" and test in outcomes:
            outcomes[test] = outcomes[test]._replace(seconds=event["seconds"])
        elif kind == "end":
            running = None
            if test in outcomes:
                outcomes[test] = outcomes[test]._replace(noise=tuple(event["noise"]))
        elif kind == "finished":
            finished = event
    if running is not None and finished is None:
        outcomes[running] = Outcome("died", "the process died or hung while this test ran")
    return collected, finished
