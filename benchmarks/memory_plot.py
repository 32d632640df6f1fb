"""Draws what `memory.py` has measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

CURVES = {
    "rss": ("sum of RSS, which stock Dask reports", "#c44e52", 1.4, "-"),
    "real": ("what is really there: private memory of the workers + Shmem of /proc/meminfo", "#222222", 2.6, "-"),
    "reported": ("sum of what the workers report", "#4c9be8", 1.4, "-"),
}


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the three curves over time, with the phases of the workload, as SVG."""
    mpl.rcParams.update({"svg.hashsalt": "memory", "font.size": 10})
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    samples = {
        name: [value / (1 if name == "seconds" else 1024) for value in values]
        for name, values in result["samples"].items()
    }
    seconds = samples["seconds"]
    for name, (label, colour, width, style) in CURVES.items():
        axes.plot(seconds, samples[name], style, color=colour, linewidth=width, label=label)
    top = max(max(samples[name]) for name in CURVES)
    ends = [*(begin for begin, _ in result["phases"][1:]), seconds[-1]]
    for number, ((begin, name), end) in enumerate(zip(result["phases"], ends, strict=True)):
        if number % 2 == 0:
            axes.axvspan(begin, end, color="#000000", alpha=0.05, linewidth=0)
        axes.text(begin + seconds[-1] / 200, 1.4 * top, name, rotation=90, ha="left", va="top", fontsize=9)
    axes.set(xlim=(0, seconds[-1]), ylim=(-0.03 * top, 1.42 * top))
    axes.set(xlabel="seconds", ylabel="GiB more than in the idle cluster", title=result["cluster"])
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=1, frameon=False)
    figure.savefig(path, format="svg", metadata={"Date": None})
