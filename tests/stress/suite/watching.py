"""A plugin of pytest that records the outcome of each test at once, and the counters of the package.

It runs in the processes that run the tests of `distributed`, stock and with the plugin.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

EVENTS, ONLY, COUNTS = "SHM_STRESS_EVENTS", "SHM_STRESS_ONLY", "SHM_STRESS_COUNTS"


def write(**event: Any) -> None:
    """Append one event to the file that the environment names. Events stay when the process dies."""
    with open(os.environ[EVENTS], "a") as file:
        file.write(json.dumps(event) + "\n")


def save_counts() -> None:
    """Write the counters of this process to its file, which the next call overwrites."""
    metrics = sys.modules.get("dask_shm_plugin.metrics")
    folder = os.environ.get(COUNTS)
    if metrics is not None and folder:
        Path(folder, f"{os.getpid()}.json").write_text(json.dumps(metrics.COUNTERS.snapshot()))


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark of a plugin that repeats flaky tests. Here, tests are repeated both ways alike instead."""
    config.addinivalue_line("markers", "flaky: may fail now and then")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect all but the requested tests, and record the tests that are left."""
    only = os.environ.get(ONLY)
    if only:
        wanted = set(json.loads(Path(only).read_text()))  # a name without parameters means all parameters
        chosen = [item for item in items if {item.nodeid, item.nodeid.partition("[")[0]} & wanted]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
    write(event="collected", tests=[item.nodeid for item in items])


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Record a file that cannot be imported."""
    if report.failed:
        write(event="uncollected", file=report.nodeid, message=str(report.longrepr)[-2000:])


def errors_in(log: str) -> list[str]:
    """Return the first line of each logged error."""
    return [line for line in log.splitlines() if line.startswith(("ERROR", "CRITICAL"))]


def tracebacks_in(printed: str) -> list[str]:
    """Return the last line, the exception, of each printed traceback, except those that belong to a log message."""
    found: list[str] = []
    before = ""
    lines = iter(printed.splitlines())
    for line in lines:
        if "Traceback (most recent call last)" in line and not re.search(" - (INFO|WARNING|ERROR|CRITICAL) - ", before):
            found.append(next((after for after in lines if after and not after[0].isspace()), "cut off"))
        before = line
    return found


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """Record that a test begins. If no end follows, the process has died in it."""
    write(event="begin", test=item.nodeid)
    outcome = yield
    save_counts()
    return outcome


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record the outcome of one part of a test: its setup, its call or its teardown."""
    is_news = report.when == "call" or report.outcome != "passed"
    outcome = report.outcome
    if hasattr(report, "wasxfail"):
        outcome = "xfailed" if report.skipped else "xpassed"
    if is_news:
        message = ""
        if outcome not in ("passed", "xpassed"):
            message = (report.longreprtext or "")[-20_000:]
        captured = report.capstderr[-20_000:] + report.caplog[-20_000:] if outcome == "failed" else ""
        write(
            event="outcome", test=report.nodeid, when=report.when, outcome=outcome, message=message, captured=captured
        )
    if report.when == "teardown":
        write(event="end", test=report.nodeid, noise=[*errors_in(report.caplog), *tracebacks_in(report.capstderr)])
    elif report.when == "call":
        write(event="time", test=report.nodeid, seconds=report.duration)


def pytest_sessionfinish() -> None:
    """Record whether the package was imported, which must not happen in a stock run."""
    save_counts()
    write(event="finished", has_package="dask_shm_plugin" in sys.modules)
