"""Each figure that has a target, and how far it is from it."""

from __future__ import annotations

from typing import NamedTuple

from results import MIB, Results, at_size, summary, with_unit


class Line(NamedTuple):
    """One figure beside its target, which is the least that is wanted if ``is_floor``, and the most if not."""

    work: str
    what: str
    value: float
    unit: str
    target: float
    is_floor: bool = False
    other: str = ""
    """The peer that it is compared with, if any."""

    @property
    def is_met(self) -> bool:
        """Whether the figure is as good as its target."""
        return self.value >= self.target if self.is_floor else self.value <= self.target

    @property
    def wanted(self) -> str:
        """The target, for people."""
        return f"at {'least' if self.is_floor else 'most'} {with_unit(self.target, self.unit)}"

    @property
    def measured(self) -> str:
        """The figure, for people."""
        return with_unit(self.value, self.unit)


def lines(results: Results) -> list[Line]:
    """Return all figures that have targets, as far as they were measured."""
    return [*_of_one_copy(results), *_of_targets(results), *_of_peers(results), *_of_tax(results)]


def _of_one_copy(results: Results) -> list[Line]:
    if "one_copy" not in results:
        return []
    result, broadcast = results["one_copy"], summary(results, "one_copy")["broadcast"]
    first = broadcast["first_seconds"]["stock"] / broadcast["first_seconds"]["plugin"]
    what = f"broadcast of {result['size'] / MIB:g} MiB to {result['workers']} workers that read every page"
    what += ": faster than stock Dask"
    return [
        Line("one_copy", what, broadcast["times_faster"]["median"], "×", 15, is_floor=True),
        Line("one_copy", f"{what}, the very first time", first, "×", 8, is_floor=True),
    ]


def _of_targets(results: Results) -> list[Line]:
    return [
        Line(name, figure["what"], figure["value"], figure["unit"], figure["target"])
        for name, work in results.get("targets", {"works": {}})["works"].items()
        for figure in work["figures"]
        if "target" in figure
    ]


def _of_peers(results: Results) -> list[Line]:
    found = []
    for size in results.get("peers", {"sizes": ()})["sizes"]:
        peers, what = at_size(results, size), f"{size / MIB:g} MiB"
        if "ours" not in peers:
            continue
        ours = peers["ours"]
        if size >= 16 * MIB:
            found.append(Line("peers", f"put {what}, over a memcpy", ours["put_to_memcpy"], "×", 1.1))
            # A copy takes up to a third longer in one process than in another, because its memory lies elsewhere.
            stores = {n: one["put_to_memcpy"] for n, one in peers.items() if n != "ours" and not n.startswith("Dask")}
            if stores:
                best = min(stores, key=stores.__getitem__)
                found.append(_beside(f"put {what}, each over its own memcpy", "put_to_memcpy", best, peers))
        else:
            less = (ours["put"] - 100e-6) / ours["memcpy"]
            found.append(Line("peers", f"put {what}, less 100 µs, over a memcpy", less, "×", 1.5))
        found.append(Line("peers", f"attach {what}", 1e6 * ours["attach"], "µs", 60))
        if "Plasma" in peers:
            found.append(_beside(f"attach {what}", "attach", "Plasma", peers))
    return found


def _beside(what: str, figure: str, other: str, peers: dict[str, dict[str, float]]) -> Line:
    return Line("peers", f"{what}, over {other}", peers["ours"][figure] / peers[other][figure], "×", 1, other=other)


def _of_tax(results: Results) -> list[Line]:
    return [
        Line("tax", f"{name}: time over stock Dask, upper confidence bound", one["at_most"], "×", 1.05)
        for name, one in summary(results, "tax").items()
    ]
