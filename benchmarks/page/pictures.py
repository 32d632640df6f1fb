"""The pictures of the page: the figures that each shows. To draw them needs matplotlib; to name them does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from results import ARMS, MIB, Results, at_size, size_of, summary, work

BLUE, RED, GREY, DARK = "#4c9be8", "#c44e52", "#b0b0b0", "#222222"
STYLES = {
    "plugin": ("with the plugin", BLUE, "o-"),
    "stock": ("stock Dask", RED, "s-"),
    "plugin, 8 bytes": ("with the plugin, 8 bytes", DARK, "^--"),
    "published": ("a value that was published before", BLUE, "o-"),
    "publish": ("publish", BLUE, "o-"),
    "publish after another": ("publish, when another member has published since", RED, "^--"),
    "attach": ("attach", DARK, "s-"),
}

Figures = dict[str, dict[str, float]]


class Picture(NamedTuple):
    """A picture, if there are figures for it."""

    name: str
    alt: str
    data: Callable[[Results], Figures]
    draw: Callable[[Figures, Path], None]

    def link(self, results: Results) -> list[str]:
        """Return the lines that show it in a page beside the folder of images."""
        return [f"![{self.alt}](images/{self.name}.svg)", ""] if self.data(results) else []


def _series(name: str) -> Callable[[Results], Figures]:
    def found(results: Results) -> Figures:
        curves = work(results, name).get("series", {}).get("seconds", {})
        return {title: {x: one["median"] for x, one in points.items()} for title, points in curves.items()}

    return found


def _of_peers(results: Results) -> Figures:
    return at_size(results, results["peers"]["sizes"][-1]) if "peers" in results else {}


def _memory(results: Results) -> Figures:
    works = {**summary(results, "workflows"), **summary(results, "workloads")}
    return {title: {arm: one[arm]["together"]["median"] / MIB for arm in ARMS} for title, one in works.items()}


def _times_of_fanout(results: Results) -> Figures:
    works = summary(results, "fanout")
    return {title: {arm: one[arm]["median"] / one["ideal"] for arm in ARMS} for title, one in works.items()}


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


def _curves(
    across: str, up: str, factor: float, shown: Callable[[int], str], scale: str = "log"
) -> Callable[[Figures, Path], None]:
    def draw(curves: Figures, path: Path) -> None:
        figure, axes = _axes(figsize=(8, 4.5))
        every = sorted({int(x) for points in curves.values() for x in points})
        for name, points in curves.items():
            label, colour, style = STYLES[name]
            places = [(place, factor * points[str(x)]) for place, x in enumerate(every) if str(x) in points]
            axes.plot(*zip(*places, strict=True), style, color=colour, label=label)
        axes.set(yscale=scale, xlabel=across, ylabel=up)
        axes.set_xticks(range(len(every)), [shown(x) for x in every])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
        top = max(factor * seconds for points in curves.values() for seconds in points.values())
        axes.set_ylim(1 if scale == "log" else 0, top * (2 if scale == "log" else 1.3))
        axes.legend(frameon=False, loc="upper left")
        _finish(figure, [axes], path)

    return draw


def _bars_of_peers(peers: Figures, path: Path) -> None:
    figure, both = _axes(figsize=(10, 4.5), ncols=2, sharey=True)
    names = sorted(peers, key=lambda name: peers[name]["put"], reverse=True)
    colours = [BLUE if name == "ours" else GREY for name in names]
    for axes, what, unit, factor in ((both[0], "put", "ms", 1e3), (both[1], "attach", "µs", 1e6)):
        bars = axes.barh(names, [factor * peers[name][what] for name in names], color=colours)
        axes.bar_label(bars, fmt=lambda value: f"{value:,.{0 if value >= 10 else 1}f}", padding=3, fontsize=9)
        axes.set(xscale="log", xlabel=f"{what}, {unit} (logarithmic)")
        axes.set_xticks([], minor=True)
        least, most = axes.get_xlim()
        axes.set_xlim(least / 2, most * 3)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    _finish(figure, list(both), path, axis="x")


def _bars_of_both(up: str, form: str, scale: str = "linear") -> Callable[[Figures, Path], None]:
    def draw(works: Figures, path: Path) -> None:
        figure, axes = _axes(figsize=(10, 4.5))
        for number, arm in enumerate(ARMS):
            places = [place + 0.4 * number - 0.2 for place in range(len(works))]
            label, colour, _ = STYLES[arm]
            bars = axes.bar(places, [one[arm] for one in works.values()], 0.38, color=colour, label=label)
            axes.bar_label(bars, fmt=form, fontsize=8)
        axes.set_xticks(range(len(works)), list(works), rotation=20, ha="right")
        axes.set(ylabel=up, yscale=scale)
        axes.legend(frameon=False)
        _finish(figure, [axes], path, axis="y")

    return draw


# ---------------------------------------------------------------------------------------------------------------- all

PICTURES = {
    "sizes": Picture(
        "measured-sizes",
        "Time of a broadcast to four workers against the size of the array",
        _series("one-element"),
        _curves("size of the array", "milliseconds (logarithmic)", 1e3, size_of),
    ),
    "workers": Picture(
        "measured-workers",
        "Time of a broadcast against the number of workers",
        _series("sixteen-workers"),
        _curves("workers", "milliseconds (logarithmic)", 1e3, str),
    ),
    "fetches": Picture(
        "measured-fetches",
        "Time to fetch a published value against its size",
        _series("published-fetch"),
        _curves("size of the value", "milliseconds", 1e3, size_of, "linear"),
    ),
    "peers": Picture(
        "measured-peers",
        "Time to put and to attach a value, in the arena and with its peers",
        _of_peers,
        _bars_of_peers,
    ),
    "blocks": Picture(
        "measured-blocks",
        "Time to publish and to attach 1 MiB against the number of live blocks",
        _series("many-blocks"),
        _curves("live blocks", "microseconds", 1e6, "{:,}".format, "linear"),
    ),
    "memory": Picture(
        "measured-memory",
        "Memory at most in each workflow and workload, stock Dask and with the plugin",
        _memory,
        _bars_of_both("MiB at most, shared and private together", "{:,.0f}"),
    ),
    "fanout": Picture(
        "measured-fanout",
        "Time of forty tasks that share one value over the ideal time, stock Dask and with the plugin",
        _times_of_fanout,
        _bars_of_both("time over the ideal time", "{:.1f}"),
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
