"""The pictures of the page: what each shows, and of which figures. Drawing needs matplotlib; naming them does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lines import MIB
from results import Results, work

COLOURS = {"plugin": "#4c9be8", "stock": "#c44e52", "other": "#b0b0b0", "dark": "#222222"}

Curves = dict[str, dict[str, float]]


class Picture(NamedTuple):
    """A picture, if there are figures for it."""

    name: str
    alt: str
    data: Callable[[Results], Any]
    draw: Callable[[Any, Path], None]

    def link(self, results: Results) -> list[str]:
        """Return the lines that show it in a page beside the folder of images."""
        return [f"![{self.alt}](images/{self.name}.svg)", ""] if self.data(results) else []


# ------------------------------------------------------------------------------------------------------------- figures


def _series(name: str) -> Callable[[Results], Curves | None]:
    def found(results: Results) -> Curves | None:
        measured = work(results, name)
        return measured["series"]["seconds"] if measured else None

    return found


def _puts_and_attaches(results: Results) -> dict[str, dict[str, float]] | None:
    if "peers" not in results:
        return None
    size = str(results["peers"]["sizes"][-1])
    medians = {name: peer["medians"] for name, peer in results["peers"]["peers"].items() if "medians" in peer}
    at = {name: peer[size] for name, peer in medians.items() if size in peer}
    return {name: {"put": one["put"], "attach": one["attach"]} for name, one in at.items()} or None


def _memory(results: Results) -> dict[str, dict[str, float]] | None:
    found = {
        title: {arm: figures[arm]["together"] / MIB for arm in ("stock", "plugin")}
        for name in ("workflows", "workloads")
        for title, figures in results.get(name, {"summary": {}})["summary"].items()
    }
    return found or None


# ------------------------------------------------------------------------------------------------------------- drawing


def _axes(**size: Any) -> Any:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"svg.hashsalt": "page", "font.size": 10})
    return plt.subplots(layout="constrained", **size)


def _finish(figure: Any, all_axes: list[Any], path: Path, axis: str = "both") -> None:
    for axes in all_axes:
        axes.grid(axis=axis, alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="svg", metadata={"Date": None})


_STYLES = {
    "plugin": ("with the plugin", COLOURS["plugin"], "o-"),
    "stock": ("stock Dask", COLOURS["stock"], "s-"),
    "plugin, 8 bytes": ("with the plugin, 8 bytes", COLOURS["dark"], "^--"),
    "published": ("a value that was published before", COLOURS["plugin"], "o-"),
    "publish": ("publish", COLOURS["plugin"], "o-"),
    "attach": ("attach", COLOURS["dark"], "s-"),
}


def _curves(across: str, up: str, factor: float, scale: float = 1) -> Callable[[Curves, Path], None]:
    def draw(curves: Curves, path: Path) -> None:
        figure, axes = _axes(figsize=(8, 4.5))
        for name, points in curves.items():
            label, colour, style = _STYLES[name]
            xs = sorted(map(int, points))
            axes.plot([x / scale for x in xs], [factor * points[str(x)] for x in xs], style, color=colour, label=label)
        every = sorted({int(x) / scale for points in curves.values() for x in points})
        axes.set(xscale="log", yscale="log", xlabel=across, ylabel=up)
        shown = [x for x in every if x >= 1]
        axes.set_xticks(shown, [f"{x:,.0f}" for x in shown])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(bottom=min(1, axes.get_ylim()[0]))
        axes.legend(frameon=False)
        _finish(figure, [axes], path)

    return draw


def _bars_of_peers(peers: dict[str, dict[str, float]], path: Path) -> None:
    figure, both = _axes(figsize=(10, 4.5), ncols=2, sharey=True)
    names = sorted(peers, key=lambda name: peers[name]["put"], reverse=True)
    colours = [COLOURS["plugin"] if name == "ours" else COLOURS["other"] for name in names]
    for axes, what, unit, factor in ((both[0], "put", "ms", 1e3), (both[1], "attach", "µs", 1e6)):
        bars = axes.barh(names, [factor * peers[name][what] for name in names], color=colours)
        axes.bar_label(
            bars, fmt=lambda value: f"{value:,.0f}" if value >= 10 else f"{value:.1f}", padding=3, fontsize=9
        )
        axes.set(xscale="log", xlabel=f"{what}, {unit} (logarithmic)")
        axes.margins(x=0.15)
    _finish(figure, list(both), path, axis="x")


def _bars_of_memory(works: dict[str, dict[str, float]], path: Path) -> None:
    figure, axes = _axes(figsize=(10, 4.5))
    for number, arm in enumerate(("stock", "plugin")):
        places = [place + 0.4 * number - 0.2 for place in range(len(works))]
        label, colour, _ = _STYLES[arm]
        bars = axes.bar(places, [one[arm] for one in works.values()], 0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    axes.set_xticks(range(len(works)), list(works), rotation=20, ha="right")
    axes.set_ylabel("MiB at most, shared and private together")
    axes.legend(frameon=False)
    _finish(figure, [axes], path, axis="y")


# ---------------------------------------------------------------------------------------------------------------- all

PICTURES = {
    "sizes": Picture(
        "measured-sizes",
        "Time of a broadcast to four workers against the size of the array",
        _series("one-element"),
        _curves("MiB (and 8 bytes, at the left edge)", "milliseconds", 1e3, MIB),
    ),
    "workers": Picture(
        "measured-workers",
        "Time of a broadcast against the number of workers",
        _series("sixteen-workers"),
        _curves("workers", "milliseconds", 1e3),
    ),
    "fetches": Picture(
        "measured-fetches",
        "Time to fetch a published value against its size",
        _series("published-fetch"),
        _curves("MiB (and 8 bytes, at the left edge)", "milliseconds", 1e3, MIB),
    ),
    "peers": Picture(
        "measured-peers",
        "Time to put and to attach a value, in the arena and with its peers",
        _puts_and_attaches,
        _bars_of_peers,
    ),
    "blocks": Picture(
        "measured-blocks",
        "Time to publish and to attach 1 MiB against the number of live blocks",
        _series("many-blocks"),
        _curves("live blocks, of 64 members", "microseconds", 1e6),
    ),
    "memory": Picture(
        "measured-memory",
        "Memory at most in each workflow and workload, stock Dask and with the plugin",
        _memory,
        _bars_of_memory,
    ),
}


def draw(results: Results, folder: Path) -> None:
    """Draw all pictures for which there are figures, and remove those for which there are none."""
    for picture in PICTURES.values():
        path = folder / f"{picture.name}.svg"
        data = picture.data(results)
        if data:
            picture.draw(data, path)
        else:
            path.unlink(missing_ok=True)
