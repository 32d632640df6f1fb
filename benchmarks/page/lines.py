"""Each figure that has a target, and how far it is from it."""

from __future__ import annotations

from typing import Any, NamedTuple

from results import Results

MIB = 1 << 20


class Line(NamedTuple):
    """One figure beside its target."""

    work: str
    what: str
    value: float
    unit: str
    target: float
    is_floor: bool = False
    """Whether the target is the least that is wanted, and not the most."""
    other: str = ""
    """With whom it is compared, if with a peer."""

    @property
    def is_met(self) -> bool:
        """Whether the figure is as good as it should be."""
        return self.value >= self.target if self.is_floor else self.value <= self.target

    @property
    def wanted(self) -> str:
        """The target, for people."""
        return f"at {'least' if self.is_floor else 'most'} {with_unit(self.target, self.unit)}"

    @property
    def measured(self) -> str:
        """The figure, for people."""
        return with_unit(self.value, self.unit)


def with_unit(value: float, unit: str) -> str:
    """Return a number with three digits that count, and its unit."""
    digits = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {unit}".rstrip()


def size_for_people(size: int) -> str:
    """Return a size in MiB, or in bytes where it is small."""
    return f"{size / MIB:,.0f} MiB" if size >= MIB else f"{size} bytes"


def lines(results: Results) -> list[Line]:
    """Return all figures that have targets, as far as they were measured."""
    kinds = {"one_copy": _of_one_copy, "targets": _of_targets, "peers": _of_peers, "tax": _of_tax}
    return [line for name, kind in kinds.items() if name in results for line in kind(results[name])]


def _of_one_copy(result: dict[str, Any]) -> list[Line]:
    rounds = result["rounds"]["broadcast"]
    usual = result["summary"]["broadcast"]["times_faster"]["seconds"]
    first = rounds["stock"][0]["seconds"] / rounds["plugin"][0]["seconds"]
    what = f"broadcast of {result['size'] / MIB:g} MiB to {result['workers']} workers that read every page"
    return [
        Line("one_copy", f"{what}: faster than stock Dask", usual, "×", 15, is_floor=True),
        Line("one_copy", f"{what}: faster than stock Dask, the very first time", first, "×", 8, is_floor=True),
    ]


def _of_targets(result: dict[str, Any]) -> list[Line]:
    return [
        Line(name, figure["what"], figure["value"], figure["unit"], figure["target"])
        for name, work in result["works"].items()
        for figure in work["figures"]
        if figure["target"] is not None
    ]


def _of_peers(result: dict[str, Any]) -> list[Line]:
    medians = {name: peer["medians"] for name, peer in result["peers"].items() if "medians" in peer}
    if "ours" not in medians:
        return []
    found = []
    for size in result["sizes"]:
        at = {name: peer[str(size)] for name, peer in medians.items() if str(size) in peer}
        ours, what = at["ours"], f"{size / MIB:g} MiB"
        if size >= 16 * MIB:
            beside_copy = ours["put_to_memcpy"]
            found.append(Line("peers", f"put {what}, over a memcpy", beside_copy, "×", 1.1))
            # A copy takes up to a third longer in one process than in another, for its memory lies elsewhere.
            stores = {n: one["put_to_memcpy"] for n, one in at.items() if n != "ours" and not n.startswith("Dask")}
            found += [
                _beside(f"put {what}, each over its own memcpy", beside_copy, best, stores[best])
                for best in _least(stores)
            ]
        else:
            less = (ours["put"] - 100e-6) / ours["memcpy"]
            found.append(Line("peers", f"put {what}, less 100 µs, over a memcpy", less, "×", 1.5))
        found.append(Line("peers", f"attach {what}", 1e6 * ours["attach"], "µs", 60))
        if "Plasma" in at:
            found.append(_beside(f"attach {what}", ours["attach"], "Plasma", at["Plasma"]["attach"]))
    return found


def _least(values: dict[str, float]) -> list[str]:
    return [min(values, key=values.__getitem__)] if values else []


def _beside(what: str, ours: float, other: str, theirs: float) -> Line:
    return Line("peers", f"{what}, over {other}", ours / theirs, "×", 1, other=other)


def _of_tax(result: dict[str, Any]) -> list[Line]:
    return [
        Line("tax", f"{name}: time over stock Dask, upper confidence bound", figures["at_most"], "×", 1.05)
        for name, figures in result["summary"].items()
    ]
