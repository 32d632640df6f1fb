"""The differences between two runs of the same tests, and whether they occur each time."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import NamedTuple

from running import Outcome

Outcomes = dict[str, Outcome]
Rerun = Callable[[list[str]], tuple[Outcomes, Outcomes]]
"""Runs some tests once more, both ways, and returns the outcomes stock and with the plugin."""

RERUNS = 2
"""The number of times that a test which fails only with the plugin is run again before it counts."""

_MISSING = Outcome("missing", "the test was not run")


class Comparison(NamedTuple):
    """The outcomes of two runs of the same tests, and of the repetitions."""

    stock: Outcomes
    shared: Outcomes
    differing: list[str]
    """Tests that always passed stock and never with the plugin, and are not known to do so."""
    expected: dict[str, str]
    """Tests that passed stock and failed with the plugin, and are known to do so, with their reasons."""
    unsteady: list[str]
    """Tests that passed stock each time, and with the plugin only in a repetition."""
    unsteady_stock: list[str]
    """Tests that passed stock, and failed stock in a repetition. They prove nothing."""
    only_shared: list[str]
    """Tests that pass with the plugin and fail stock. They are printed, and do not count."""

    def noisier(self) -> list[str]:
        """Return the tests that pass both ways, but log more errors with the plugin. They do not count."""
        return [test for test in self.passed() if len(self.shared[test].noise) > len(self.stock[test].noise)]

    def passed(self) -> list[str]:
        """Return the tests that pass both ways."""
        return [
            test for test, outcome in self.stock.items() if outcome.is_good and _outcome_of(self.shared, test).is_good
        ]


def reason_for(test: str, known: Mapping[str, str]) -> str | None:
    """Return the reason for which a test may differ, or None."""
    return next((reason for pattern, reason in known.items() if _matches(test, pattern)), None)


def _matches(test: str, pattern: str) -> bool:
    # Square brackets stand for themselves: tests with parameters have them in their names.
    return fnmatch.fnmatchcase(test, pattern.replace("[", "[[]"))


def compare(stock: Outcomes, shared: Outcomes, known: Mapping[str, str], rerun: Rerun) -> Comparison:
    """Compare the outcomes, and run tests that differ again, up to twice, both ways."""
    tests = list({**stock, **shared})
    suspects = [test for test in tests if _outcome_of(stock, test).is_good and not _outcome_of(shared, test).is_good]
    expected = {test: reason for test in suspects if (reason := reason_for(test, known)) is not None}
    suspects = [test for test in suspects if test not in expected]
    unsteady: list[str] = []
    unsteady_stock: list[str] = []
    for _ in range(RERUNS):
        if not suspects:
            break
        stock_again, shared_again = rerun(suspects)
        unsteady_stock += [test for test in suspects if not _outcome_of(stock_again, test).is_good]
        suspects = [test for test in suspects if test not in unsteady_stock]
        unsteady += [test for test in suspects if _outcome_of(shared_again, test).is_good]
        suspects = [test for test in suspects if test not in unsteady]
    only_shared = [
        test for test in tests if _outcome_of(stock, test).outcome == "failed" and _outcome_of(shared, test).is_good
    ]
    return Comparison(stock, shared, suspects, expected, unsteady, unsteady_stock, only_shared)


def _outcome_of(outcomes: Outcomes, test: str) -> Outcome:
    return outcomes.get(test, _MISSING)
