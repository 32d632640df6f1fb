"""What differs between two runs of the same tests, and whether it does so each time."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import NamedTuple

from running import Outcome

Outcomes = dict[str, Outcome]
Again = Callable[[list[str]], tuple[Outcomes, Outcomes]]
"""Runs some tests once more, both ways, and returns what became of them stock and with the plugin."""

AGAIN = 2
"""How often a test that fails with the plugin is run again before it counts."""

_MISSING = Outcome("missing", "the test was not run")


class Comparison(NamedTuple):
    """Two runs of the same tests, and the repetitions."""

    stock: Outcomes
    shared: Outcomes
    differing: list[str]
    """Tests that have always passed stock and never with the plugin, and have no reason to."""
    expected: dict[str, str]
    """Tests that differ in the same way, and their reasons."""
    unsteady: list[str]
    """Tests that have passed stock, and failed with the plugin, but not always so."""
    unsteady_stock: list[str]
    """Tests that have passed stock and then failed stock: these say nothing."""
    only_shared: list[str]
    """Tests that pass with the plugin and not stock: told, not counted."""

    def noisier(self) -> list[str]:
        """Return the tests that pass both ways, but log more errors with the plugin: told, not counted."""
        return [test for test in self.passed() if len(self.shared[test].noise) > len(self.stock[test].noise)]

    def passed(self) -> list[str]:
        """Return the tests that pass both ways."""
        return [test for test, outcome in self.stock.items() if outcome.is_good and _of(self.shared, test).is_good]


def reason_for(test: str, known: Mapping[str, str]) -> str | None:
    """Return why a test may differ, if it may."""
    return next((reason for pattern, reason in known.items() if _matches(test, pattern)), None)


def _matches(test: str, pattern: str) -> bool:
    # Square brackets stand for themselves: tests with parameters have them in their names.
    return fnmatch.fnmatchcase(test, pattern.replace("[", "[[]"))


def compare(stock: Outcomes, shared: Outcomes, known: Mapping[str, str], again: Again) -> Comparison:
    """Compare, and run what differs again, up to twice, both ways."""
    tests = list({**stock, **shared})
    suspects = [test for test in tests if _of(stock, test).is_good and not _of(shared, test).is_good]
    expected = {test: reason for test in suspects if (reason := reason_for(test, known)) is not None}
    suspects = [test for test in suspects if test not in expected]
    unsteady: list[str] = []
    unsteady_stock: list[str] = []
    for _ in range(AGAIN):
        if not suspects:
            break
        stock_again, shared_again = again(suspects)
        unsteady_stock += [test for test in suspects if not _of(stock_again, test).is_good]
        suspects = [test for test in suspects if test not in unsteady_stock]
        unsteady += [test for test in suspects if _of(shared_again, test).is_good]
        suspects = [test for test in suspects if test not in unsteady]
    only_shared = [test for test in tests if _of(stock, test).outcome == "failed" and _of(shared, test).is_good]
    return Comparison(stock, shared, suspects, expected, unsteady, unsteady_stock, only_shared)


def _of(outcomes: Outcomes, test: str) -> Outcome:
    return outcomes.get(test, _MISSING)
