"""Run the tests of `distributed` itself, stock and with the plugin in every cluster, and compare the outcomes.

    python tests/stress/suite --distributed FOLDER [--choice quick|all] [-k EXPRESSION] [FILE ...]

FOLDER contains ``distributed/tests``: a checkout of `distributed` at the installed version, or near it. The releases
on PyPI contain no tests. The tests run against a copy of the installed `distributed`. A test that fails stock is not
compared, so the tests of another version are useful, too. The threshold is one byte: all values that can be shared
are shared.

A test that passes stock and fails with the plugin is run again both ways, up to twice. It differs if it always passes
stock and never with the plugin. `known.py` lists the tests that may differ, each with its reason. With the plugin, a
test that is skipped, or whose process dies, has failed.

The exit status is 1 if a test differs that may not, and 2 if nothing was compared.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from choices import ALL, QUICK
from comparing import Comparison, Outcomes, compare, reason_for
from known import BUGS, MAY_DIFFER
from overlay import lay_out
from running import Run, Runner


def main() -> int:
    """Parse the arguments, run, and print the comparison; return the exit status."""
    asked = _arguments()
    logs = asked.logs or Path(tempfile.mkdtemp(prefix="stress-logs-"))
    logs.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stress-overlay-") as folder:
        try:
            files = lay_out(asked.distributed, Path(folder))
        except FileNotFoundError as error:
            print(f"nothing was compared: {error}", flush=True)
            return 2
        arguments = [*(["-k", asked.k] if asked.k else []), *(["--runslow"] if asked.slow else [])]
        runner = Runner(Path(folder), logs, arguments, asked.timeout)
        session = _Session(runner, is_at_once=asked.at_once)
        try:
            for batch, tests in _batches(asked, files):
                session.compare(batch, tests)
                if asked.report:
                    asked.report.write_text(json.dumps(session.details(), indent=1))
        finally:
            runner.end()
    status = session.report(time.monotonic() - begun)
    print(f"the output of pytest is in {logs}; status {status}", flush=True)
    return status


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distributed", type=Path, required=True, help="folder that contains distributed/tests")
    parser.add_argument("--choice", choices=("quick", "all"), default="all", help="tests to run (default: all)")
    parser.add_argument("-k", help="run only tests that match this expression of pytest")
    parser.add_argument("--slow", action="store_true", help="run tests that are marked as slow, too")
    parser.add_argument("--at-once", action="store_true", help="run stock and with the plugin at the same time")
    parser.add_argument("--timeout", type=int, default=120, help="seconds for each test (default: 120)")
    parser.add_argument("--logs", type=Path, help="folder for the output of pytest (default: a new temporary one)")
    parser.add_argument("--report", type=Path, help="file to which all outcomes are written, as JSON")
    parser.add_argument("files", nargs="*", help="test files to run instead of a choice; * and ? are wildcards")
    return parser.parse_args()


def _batches(asked: argparse.Namespace, files: list[str]) -> Iterable[tuple[list[str], list[str] | None]]:
    """Return the batches that run together: files, and the tests in them, or None for all tests."""
    if asked.choice == "quick" and not asked.files:
        names = [(file, name) for file in files for name in QUICK.get(file, "").split()]
        return [([file for file in files if file in QUICK], [f"{file}::test_{name}" for file, name in names])]
    patterns = asked.files or ALL
    chosen = [file for file in files if any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)]
    return [([file], None) for file in chosen]


class _Session:
    """The comparisons so far."""

    def __init__(self, runner: Runner, *, is_at_once: bool) -> None:
        self._runner, self._threads = runner, ThreadPoolExecutor(2 if is_at_once else 1)
        self._comparisons: list[Comparison] = []
        self._counts: Counter[str] = Counter()
        self._uncollected: dict[str, str] = {}
        self._again: list[tuple[Outcomes, Outcomes]] = []

    def compare(self, files: list[str], tests: list[str] | None) -> None:
        """Run some files both ways, compare the outcomes, and print the result."""
        stock, shared = self._run_both_ways(files, tests)
        self._uncollected |= stock.uncollected

        def again(suspects: list[str]) -> tuple[Outcomes, Outcomes]:
            places = sorted({test.partition("::")[0] for test in suspects})
            stock_again, shared_again = self._run_both_ways(places, suspects)
            self._again.append((stock_again.outcomes, shared_again.outcomes))
            return self._again[-1]

        result = compare(stock.outcomes, shared.outcomes, MAY_DIFFER | BUGS, again)
        self._comparisons.append(result)
        name = files[0] if len(files) == 1 else f"{len(files)} files"
        print(f"{name}: stock {_summary(stock)}; with the plugin {_summary(shared)}", flush=True)
        for test in result.differing:
            outcome = shared.outcomes.get(test)
            print(f"  DIFFERS {test}: {_last_line(outcome.message) if outcome else 'not run'}", flush=True)
        for test in result.unsteady:
            print(f"  unsteady with the plugin: {test}", flush=True)
        for test in result.unsteady_stock:
            print(f"  unsteady stock: {test}", flush=True)

    def _run_both_ways(self, files: list[str], only: list[str] | None) -> tuple[Run, Run]:
        stock, shared = self._threads.map(lambda way: self._runner.run(files, shared=way, only=only), (False, True))
        for counts in shared.counts:
            for event in ("published", "attached", "found", "adopted"):
                self._counts[event] += counts[event]["count"]
            self._counts["sent"] += sum(pair["count"] for pair in counts["sent"].values())
        return stock, shared

    def report(self, seconds: float) -> int:
        """Print the sums, and return the exit status."""
        differing = [test for one in self._comparisons for test in one.differing]
        expected = {test: reason for one in self._comparisons for test, reason in one.expected.items()}
        unsteady = [test for one in self._comparisons for test in one.unsteady]
        unsteady_stock = [test for one in self._comparisons for test in one.unsteady_stock]
        only_shared = [test for one in self._comparisons for test in one.only_shared]
        noisier = [test for one in self._comparisons for test in one.noisier()]
        passed = sum(len(one.passed()) for one in self._comparisons)
        good_stock = sum(outcome.is_good for one in self._comparisons for outcome in one.stock.values())
        ran = sum(len(one.stock) for one in self._comparisons)
        print(f"\ndistributed {version('distributed')}, {seconds:.0f} s")
        print(f"tests: {ran} run both ways, {good_stock} pass stock, {passed} of these with the plugin, too")
        print(
            f"values: {self._counts['published']} published, {self._counts['attached']} mapped "
            f"({self._counts['found']} found without asking), {self._counts['adopted']} adopted, "
            f"{self._counts['sent']} sent as bytes; without processes that were killed"
        )
        for test, reason in expected.items():
            print(f"{'a known bug' if reason in BUGS.values() else 'may differ'}: {test}: {reason}")
        for test in (one for comparison in self._comparisons for one in comparison.passed()):
            if reason_for(test, BUGS) is not None:
                print(f"passes now, remove it from known.py: {test}")
        for title, tests in (
            ("unsteady with the plugin", unsteady),
            ("unsteady stock", unsteady_stock),
            ("passes only with the plugin", only_shared),
            ("logs more errors with the plugin", noisier),
            ("cannot be imported stock", list(self._uncollected)),
        ):
            if tests:
                print(f"{title} ({len(tests)}): {', '.join(tests)}")
        for one in self._comparisons:
            for test in one.noisier():
                quiet, noisy = one.stock[test].noise, one.shared[test].noise
                print(f"  {test}: {len(quiet)} stock, {len(noisy)} with the plugin, the last one {noisy[-1][:200]}")
        print(f"tests that differ: {len(differing)} that may not, {len(expected)} that may")
        for test in differing:
            print(f"DIFFERS {test}")
        print(f"{passed} passed, {len(differing)} failed")
        if differing:
            return 1
        if not good_stock or not self._counts["attached"]:
            print(f"nothing was compared: {'no value was mapped' if good_stock else 'no test passes stock'}")
            return 2
        return 0

    def details(self) -> dict[str, Any]:
        """Return all outcomes and counts as plain data."""
        return {
            "comparisons": [
                {
                    **one._asdict(),
                    "stock": {test: list(outcome) for test, outcome in one.stock.items()},
                    "shared": {test: list(outcome) for test, outcome in one.shared.items()},
                }
                for one in self._comparisons
            ],
            "again": [
                [{test: list(outcome) for test, outcome in outcomes.items()} for outcomes in pair]
                for pair in self._again
            ],
            "counts": dict(self._counts),
        }


def _summary(run: Run) -> str:
    counted = Counter(outcome.outcome for outcome in run.outcomes.values())
    return f"{', '.join(f'{n} {name}' for name, n in counted.most_common()) or 'no tests'} in {run.seconds:.0f} s"


def _last_line(message: str) -> str:
    lines = [line for line in message.partition("\n--- captured")[0].splitlines() if line.startswith("E ")]
    return (lines[-1] if lines else message.strip().rpartition("\n")[2])[:200]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends running tests, too
    sys.exit(main())
