"""What a measurement says: figures, and how far they are from their targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

MIB = 1 << 20

Round = dict[str, Any]


class Figure(NamedTuple):
    """One line of the table; ``target`` is the highest value that is wanted, or None where there is no target."""

    what: str
    value: float
    unit: str
    target: float | None = None

    def as_data(self) -> dict[str, Any]:
        """Return it as it is kept."""
        return {**self._asdict(), "is_met": None if self.target is None else self.value <= self.target}


class Measurement(NamedTuple):
    """All rounds, and what they come to."""

    rounds: list[Round]
    figures: list[Figure]
    series: dict[str, Any] | None = None

    def as_data(self) -> dict[str, Any]:
        """Return it as it is kept."""
        figures = [figure.as_data() for figure in self.figures]
        return {"figures": figures, "rounds": self.rounds} | ({"series": self.series} if self.series else {})


def median(rounds: Iterable[Round], of: str | Callable[[Round], float]) -> float:
    """Return the median of a figure, or of what is computed from each round."""
    return statistics.median(of(one) if callable(of) else one[of] for one in rounds)


def show(name: str, measured: dict[str, Any]) -> None:
    """Print figures for people."""
    print(f"\n{name}")
    for figure in measured["figures"]:
        target = "" if figure["target"] is None else f"at most {figure['target']:.4g} {figure['unit']}"
        verdict = {None: "", True: "met", False: "NOT MET"}[figure["is_met"]]
        print(f"  {figure['what']:<92}{figure['value']:>10.4g} {figure['unit']:<3}  {target:<20}{verdict}")
