"""The parts of the page, each from its results or saying that there are none."""

from __future__ import annotations

import statistics
from typing import Any

from lines import MIB, lines, size_for_people, with_unit
from losses import losses
from pictures import PICTURES
from results import COMMANDS, Results, conditions, not_measured, work

Text = list[str]


def table(head: Text, rows: list[Text]) -> Text:
    """Return a table; all columns but the first are numbers."""
    align = ["---", *("---:" for _ in head[1:])]
    return [*("| " + " | ".join(row) + " |" for row in (head, align, *rows)), ""]


def ms(seconds: float) -> str:
    """Return a time in milliseconds."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:,.1f}"


def opening(results: Results) -> Text:
    """Say what the page is, and on what each part was measured."""
    said = [f"- `benchmarks/{COMMANDS[name]}`: {conditions(result)}" for name, result in results.items()]
    return [
        "# Measurements",
        "",
        "This page is written by `python benchmarks/page` from what the [benchmarks](../benchmarks/README.md) have measured.",
        "What is compared was measured in one run, and stands here whether it is good or not. Other machines give other",
        "times; ratios say more.",
        "",
        *([*said, ""] if said else ["Nothing has been measured yet.", ""]),
    ]


def targets(results: Results) -> Text:
    """List all figures that have targets."""
    verdict = {True: "met", False: "**not met**"}
    rows = [[line.what, line.measured, line.wanted, verdict[line.is_met]] for line in lines(results)]
    missing = [f"- {not_measured(name)}" for name in ("one_copy", "targets", "peers", "tax") if name not in results]
    return [
        "## Targets",
        "",
        *(table(["work", "measured", "target", ""], rows) if rows else []),
        *([*missing, ""] if missing else []),
    ]


def what_is_lost(results: Results) -> Text:
    """List what is worse than it should be or than with others."""
    sentences = [f"- {sentence}" for sentence in losses(results)]
    nothing = ["Nothing, as far as it was measured." if results else "Not measured yet.", ""]
    return ["## What we lose", "", *([*sentences, ""] if sentences else nothing)]


def broadcast(results: Results) -> Text:
    """Show a broadcast against size and workers, and the copies that it makes."""
    return ["## Broadcast", "", *_one_copy(results), *_broadcast_series(results)]


def _one_copy(results: Results) -> Text:
    if "one_copy" not in results:
        return [not_measured("one_copy"), ""]
    result, rows = results["one_copy"], []
    kinds = {
        "seconds": ("time, ms", ms),
        "shared": ("growth of shared memory, × array", "{:.2f}".format),
        "private": ("growth of private memory, × array", "{:.2f}".format),
        "loopback": ("over the loopback, × array", "{:.2f}".format),
    }
    for way, figures in result["summary"].items():
        for kind, (title, shown) in kinds.items():
            rows.append([f"{way}: {title}", shown(figures["stock"][kind]), shown(figures["plugin"][kind])])
    return [
        f"An array of {result['size'] / MIB:g} MiB and {result['workers']} workers, every page read; medians of "
        f"{result['pairs']} pairs. *Fetch* is from one worker to two others.",
        "",
        *table(["", "stock Dask", "with the plugin"], rows),
    ]


def _broadcast_series(results: Results) -> Text:
    by_size, by_workers = (work(results, name) for name in ("one-element", "sixteen-workers"))
    small = work(results, "small-broadcasts")
    if by_size is None and by_workers is None:
        return [not_measured("targets"), ""]
    text = ["The same with tasks that read one element, milliseconds:", ""]
    if by_size:
        text += [*PICTURES["sizes"].link(results), *_curves(by_size, "size", size_for_people)]
    if small:
        text += ["Small ones, right after each other in 40 rounds:", "", *_curves(small, "size", size_for_people)]
    if by_workers:
        size = size_for_people(by_workers["series"]["bytes"])
        text += [*PICTURES["workers"].link(results), *_curves(by_workers, f"workers ({size})", str)]
    return text


def _curves(measured: dict[str, Any], across: str, shown: Any, unit: Any = ms) -> Text:
    curves = measured["series"]["seconds"]
    points = sorted({int(x) for points in curves.values() for x in points})
    rows = [[shown(x), *(unit(c[str(x)]) if str(x) in c else "" for c in curves.values())] for x in points]
    return table([across, *curves], rows)


def fetch(results: Results) -> Text:
    """Show fetches from worker to worker."""
    text = ["## Fetch from worker to worker", ""]
    names = ("published-fetch", "busy-owner", "first-fetch")
    if not any(work(results, name) for name in names):
        return [*text, not_measured("targets"), ""]
    text += PICTURES["fetches"].link(results)
    return text + _figures(results, *names)


def _figures(results: Results, *names: str) -> Text:
    found = [figure for name in names for figure in (work(results, name) or {"figures": []})["figures"]]
    return table(["", "measured"], [[figure["what"], with_unit(figure["value"], figure["unit"])] for figure in found])


def peers(results: Results) -> Text:
    """Show the raw arena beside others."""
    text = ["## The arena and its peers, without Dask", ""]
    if "peers" not in results:
        return [*text, not_measured("peers"), ""]
    result = results["peers"]
    text += [
        f"One process puts an array, another attaches it; medians of {result['starts']} starts with {result['rounds']} rounds. "
        "What is measured is said by `python benchmarks/peers --help`.",
        "",
        *PICTURES["peers"].link(results),
    ]
    for size in result["sizes"]:
        rows = [_peer(name, peer["medians"][str(size)]) for name, peer in result["peers"].items() if "medians" in peer]
        head = [size_for_people(size), "put, µs", "× memcpy", "first put, µs", "attach, µs", "read every page, µs"]
        text += table(head, rows)
    return [*text, *_memory_of_peers(result), *_absent(result)]


def _peer(name: str, one: dict[str, float]) -> Text:
    puts = [f"{1e6 * one['put']:,.0f}", f"{one['put_to_memcpy']:.2f}", f"{1e6 * one['cold_put']:,.0f}"]
    return [name, *puts, *(f"{1e6 * one[what]:,.0f}" for what in ("attach", "read"))]


def _memory_of_peers(result: dict[str, Any]) -> Text:
    rows = [
        [
            name,
            *(f"{statistics.median(one[kind] for one in peer['memory']) / MIB:,.0f}" for kind in ("shared", "private")),
        ]
        for name, peer in result["peers"].items()
        if "memory" in peer
    ]
    return table(
        [f"{size_for_people(result['sizes'][-1])}, four readers", "shared memory, MiB", "private memory, MiB"], rows
    )


def _absent(result: dict[str, Any]) -> Text:
    reasons = [f"- {name}: {peer['reason']}" for name, peer in result["peers"].items() if "reason" in peer]
    return ["Not measured:", "", *reasons, ""] if reasons else []


def blocks(results: Results) -> Text:
    """Show the arena with many blocks."""
    text = ["## Many blocks, many members", ""]
    measured = work(results, "many-blocks")
    if measured is None:
        return [*text, not_measured("targets"), ""]
    text += [f"1 MiB, in an arena of {measured['series']['members']} members; microseconds.", ""]
    curves = _curves(measured, "live blocks", "{:,}".format, lambda seconds: f"{1e6 * seconds:,.0f}")
    return [*text, *PICTURES["blocks"].link(results), *curves]


def tax(results: Results) -> Text:
    """Show what it costs where sharing brings nothing."""
    text = ["## Where sharing brings little", ""]
    if "tax" not in results:
        return [*text, not_measured("tax"), ""]
    rows = [
        [name, ms(one["stock"]), ms(one["plugin"]), f"{one['ratio']:.3f}", f"{one['at_most']:.3f}"]
        for name, one in results["tax"]["summary"].items()
    ]
    head = ["", "stock Dask, ms", "with the plugin, ms", "ratio", "at most (95 %)"]
    said = (
        f"{results['tax']['pairs']} pairs. Times are medians; the ratio is the geometric mean of the ratios of pairs."
    )
    return [*text, said, "", *table(head, rows)]


def works(results: Results) -> Text:
    """Show workflows and workloads, in time and memory."""
    text = ["## Workflows and workloads", ""]
    text += PICTURES["memory"].link(results)
    for name in ("workflows", "workloads"):
        if name not in results:
            text += [not_measured(name), ""]
            continue
        rows = [
            [title, *(ms(one[arm]["seconds"]) for arm in ("stock", "plugin")), f"{one['times_faster']:.2f} ×"]
            + [f"{one[arm]['together'] / MIB:,.0f}" for arm in ("stock", "plugin")]
            for title, one in results[name]["summary"].items()
        ]
        head = [name, "stock Dask, ms", "with the plugin, ms", "faster by", "stock Dask, MiB", "with the plugin, MiB"]
        text += [
            f"{results[name]['pairs']} pairs, medians; memory at most, shared and private.",
            "",
            *table(head, rows),
        ]
    return text


def loops_and_start(results: Results) -> Text:
    """Show event loops, start-up and hashing."""
    text = ["## Event loops, start-up, hashing", ""]
    names = ("event-loop", "start-up", "hash")
    if not any(work(results, name) for name in names):
        return [*text, not_measured("targets"), ""]
    return text + _figures(results, *names) + _phases(results)


def _phases(results: Results) -> Text:
    measured = work(results, "event-loop")
    if measured is None:
        return []
    text = []
    for kind, title in _PHASES.items():
        phases: dict[str, dict[str, dict[str, float]]] = measured["series"][kind]
        columns = [(arm, role) for arm, one in phases.items() for role in next(iter(one.values()))]
        rows = [[phase, *(f"{phases[arm][phase][role]:.1f}" for arm, role in columns)] for phase in phases["plugin"]]
        text += [title, "", *table(["", *(f"{arm}, {role}" for arm, role in columns)], rows)]
    return text


_PHASES = {
    "milliseconds": "The longest wait of each loop in each phase, median of rounds, milliseconds. The *bystander* does nothing.",
    "milliseconds of work": "The most processor time that each loop has used between two ticks, the same way.",
}


def memory(results: Results) -> Text:
    """Point to the other page on memory."""
    return [
        "## Memory over time",
        "",
        "What workers report through a longer piece of work, and what is really there, is told in",
        "[Memory](concepts/memory.md#what-it-counts-as).",
        "",
        "![Sums over four workers: RSS, what is reported, and what is really there](images/reported-memory.svg)",
    ]


SECTIONS = (opening, targets, what_is_lost, broadcast, fetch, peers, blocks, tax, works, loops_and_start, memory)


def page(results: Results) -> str:
    """Return the whole page."""
    return "\n".join(line for section in SECTIONS for line in section(results)).rstrip() + "\n"
