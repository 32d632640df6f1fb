"""The parts of the page, each from its results or saying that there are none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lines import lines
from losses import losses
from pictures import PICTURES
from results import (
    ARMS,
    COMMANDS,
    MIB,
    Results,
    at_size,
    conditions,
    ms,
    not_measured,
    size_of,
    summary,
    with_unit,
    work,
)

Lines = Iterator[str]


def table(head: list[str], rows: Iterable[list[str]]) -> Lines:
    """Give a table; all columns but the first are numbers."""
    align = ["---", *("---:" for _ in head[1:])]
    for row in (head, align, *rows):
        yield "| " + " | ".join(row) + " |"
    yield ""


def opening(results: Results) -> Lines:
    """Say what the page is, and the conditions of each part."""
    yield from ("# Measurements", "")
    yield "This page is written by `python benchmarks/page` from what the [benchmarks](../benchmarks/README.md) have measured."
    yield "What is compared was measured in one run, and stands here whether it is good or not. Other machines give other"
    yield from ("times; ratios say more.", "")
    for name, result in results.items():
        yield f"- `benchmarks/{COMMANDS[name]}`: {conditions(result)}"
    yield from ("",) if results else ("Nothing has been measured yet.", "")


def targets(results: Results) -> Lines:
    """List all figures that have targets, and then the files that are missing."""
    verdict = {True: "met", False: "**not met**"}
    rows = [[line.what, line.measured, line.wanted, verdict[line.is_met]] for line in lines(results)]
    yield from table(["work", "measured", "target", ""], rows) if rows else ()
    missing = [f"- {not_measured(name)}" for name in ("one_copy", "targets", "peers", "tax") if name not in results]
    yield from (*missing, "") if missing else ()


def what_is_lost(results: Results) -> Lines:
    """List the figures that are worse than their target or than others' figures."""
    nothing = "Nothing, as far as it was measured." if results else "Not measured yet."
    yield from [f"- {sentence}" for sentence in losses(results)] or [nothing]
    yield ""


def one_copy(results: Results) -> Lines:
    """Show the copies that a broadcast and a fetch make."""
    result = results["one_copy"]
    yield (
        f"An array of {result['size'] / MIB:g} MiB and {result['workers']} workers, every page read; medians of "
        f"{result['pairs']} pairs. *Fetch* is from one worker to two others."
    )
    yield ""
    kinds: dict[str, tuple[str, Callable[[float], str]]] = {
        "seconds": ("time, ms", ms),
        "shared": ("growth of shared memory, × array", "{:.2f}".format),
        "private": ("growth of private memory, × array", "{:.2f}".format),
        "loopback": ("over the loopback, × array", "{:.2f}".format),
    }
    rows = [
        [f"{way}: {title}", *(shown(one[arm][kind]["median"]) for arm in ARMS)]
        for way, one in result["summary"].items()
        for kind, (title, shown) in kinds.items()
    ]
    yield from table(["", "stock Dask", "with the plugin"], rows)


def broadcasts(results: Results) -> Lines:
    """Show the time of a broadcast by size and by workers."""
    by_size, small, by_workers = (work(results, n) for n in ("one-element", "small-broadcasts", "sixteen-workers"))
    if by_size or by_workers:
        yield from ("The same with tasks that read one element, milliseconds:", "")
    if by_size:
        yield from (*PICTURES["sizes"].link(results), *curves(by_size, "size", size_of))
    if small:
        rounds = small["series"]["seconds"]["plugin"]["8"]["n"]
        yield from (f"Small ones, right after each other in {rounds} rounds:", "", *curves(small, "size", size_of))
    if by_workers:
        across = f"workers ({size_of(by_workers['series']['bytes'])})"
        yield from (*PICTURES["workers"].link(results), *curves(by_workers, across, str))


def curves(measured: dict[str, Any], across: str, shown: Callable[[int], str], unit: Any = ms) -> Lines:
    """Give a table of curves."""
    found = measured["series"]["seconds"]
    points = sorted({int(x) for curve in found.values() for x in curve})
    rows = [[shown(x), *(unit(c[str(x)]["median"]) if str(x) in c else "" for c in found.values())] for x in points]
    return table([across, *found], rows)


def figures(results: Results, *names: str) -> Lines:
    """Give a table of the figures of some works of `targets`."""
    found = [figure for name in names for figure in work(results, name).get("figures", ())]
    rows = [[one["what"], with_unit(one["value"], one["unit"])] for one in found]
    return table(["", "measured"], rows) if rows else iter(())


def fetches(results: Results) -> Lines:
    """Show fetches from worker to worker."""
    yield from PICTURES["fetches"].link(results)
    yield from figures(results, "published-fetch", "busy-owner", "first-fetch")


def peers(results: Results) -> Lines:
    """Show the raw arena beside others."""
    result = results["peers"]
    yield (
        f"One process puts an array, another attaches it; medians of {result['starts']} starts with {result['rounds']} rounds. "
        "What is measured is said by `python benchmarks/peers --help`."
    )
    yield from ("", *PICTURES["peers"].link(results))
    for size in result["sizes"]:
        rows = []
        for name, one in at_size(results, size).items():
            put, *others = (f"{1e6 * one[what]:,.0f}" for what in ("put", "cold_put", "attach", "read"))
            rows.append([name, put, f"{one['put_to_memcpy']:.2f}", *others])
        head = ["put, µs", "× memcpy", "first put, µs", "attach, µs", "read every page, µs"]
        yield from table([size_of(size), *head], rows)
    rows = [
        [name, *(f"{peer['memory'][kind]['median'] / MIB:,.0f}" for kind in ("shared", "private"))]
        for name, peer in result["peers"].items()
        if "memory" in peer
    ]
    readers = f"{size_of(result['sizes'][-1])}, four readers"
    yield from table([readers, "shared memory, MiB", "private memory, MiB"], rows)
    reasons = [f"- {name}: {peer['reason']}" for name, peer in result["peers"].items() if "reason" in peer]
    yield from ("Not measured:", "", *reasons, "") if reasons else ()


def blocks(results: Results) -> Lines:
    """Show the arena with many blocks."""
    if measured := work(results, "many-blocks"):
        yield from (f"1 MiB, in an arena of {measured['series']['members']} members; microseconds.", "")
        yield from PICTURES["blocks"].link(results)
        yield from curves(measured, "live blocks", "{:,}".format, lambda seconds: f"{1e6 * seconds:,.0f}")


def tax(results: Results) -> Lines:
    """Show the cost where sharing brings little."""
    pairs = results["tax"]["pairs"]
    yield f"{pairs} pairs. Times are medians; the ratio is the geometric mean of the ratios of pairs."
    yield ""
    rows = [
        [name, *(ms(one[arm]["median"]) for arm in ARMS), f"{one['ratio']:.3f}", f"{one['at_most']:.3f}"]
        for name, one in summary(results, "tax").items()
    ]
    yield from table(["", "stock Dask, ms", "with the plugin, ms", "ratio", "at most (95 %)"], rows)


def works(results: Results, name: str) -> Lines:
    """Show workflows or workloads, in time and memory."""
    yield f"{results[name]['pairs']} pairs, medians; memory at most, shared and private."
    yield ""
    rows = []
    for title, one in summary(results, name).items():
        times = [ms(one[arm]["seconds"]["median"]) for arm in ARMS]
        memory = [f"{one[arm]['together']['median'] / MIB:,.0f}" for arm in ARMS]
        rows.append([title, *times, f"{one['times_faster']['median']:.2f} ×", *memory])
    head = ["stock Dask, ms", "with the plugin, ms", "faster by", "stock Dask, MiB", "with the plugin, MiB"]
    yield from table([name, *head], rows)


def loops_and_start(results: Results) -> Lines:
    """Show event loops, start-up and hashing."""
    yield from figures(results, "event-loop", "start-up", "hash")
    series = work(results, "event-loop").get("series", {})
    for kind, title in PHASES.items():
        if kind in series:
            phases: dict[str, dict[str, dict[str, float]]] = series[kind]
            columns = [(arm, role) for arm, one in phases.items() for role in next(iter(one.values()))]
            rows = [[name, *(f"{phases[arm][name][role]:.1f}" for arm, role in columns)] for name in phases["plugin"]]
            yield from (title, "", *table(["", *(f"{arm}, {role}" for arm, role in columns)], rows))


PHASES = {
    "milliseconds": "The longest wait of each loop in each phase, median of rounds, milliseconds. The *bystander* does nothing.",
    "milliseconds of work": "The most processor time that each loop has used between two ticks, the same way.",
}


def fanout(results: Results) -> Lines:
    """Show how fast tasks end that share one value."""
    result = results["fanout"]
    yield (
        f"{result['tasks']} tasks read one array and sleep, {result['pairs']} pairs; medians in seconds. *Ideal*: all sleeps, "
        "spread evenly over all workers. [Placement](concepts/placement.md) explains it."
    )
    yield from ("", *PICTURES["fanout"].link(results))
    rows = [
        [
            title,
            f"{one['ideal']:.2f}",
            *(f"{one[arm]['median']:.2f}" for arm in ARMS),
            *(one["ran"][arm] for arm in ARMS),
        ]
        for title, one in summary(results, "fanout").items()
    ]
    ran = ["tasks by worker, stock Dask", "with the plugin"]
    yield from table(["", "ideal", "stock Dask", "with the plugin", *ran], rows)


def shuffles(results: Results) -> Lines:
    """Show the processor time of shuffles and rechunks, and what of it is not the tasks' own."""
    yield (
        f"Ratios with the plugin over stock Dask, medians of {results['shuffles']['pairs']} pairs in fresh clusters. *Tasks alone* "
        "is the processor time of the same tasks with hardly any data, and *net* the ratio without it; with shards of 32 KiB, most of "
        "it is that of messages, which the plugin saves, too. *Memory*: without Dask's files."
    )
    yield ""
    seconds = [("stock", "cpu"), ("plugin", "cpu"), ("stock", "own")]
    rows = [
        [
            title,
            *(f"{one[arm][figure]['median']:.2f}" for arm, figure in seconds),
            *(f"{one[f'{figure}_over']['median']:.2f}" for figure in ("cpu", "net", "seconds", "together")),
        ]
        for title, one in summary(results, "shuffles").items()
    ]
    head = ["stock Dask, s", "with the plugin, s", "tasks alone, s", "processor time", "net", "time", "peak memory"]
    yield from table(["", *head], rows)


def born(results: Results) -> Lines:
    """Show NumPy's memory from the arena: expressions, first fetches, a chain of operations."""
    yield "Medians. *Born*: the arrays of tasks are allocated in the arena; *off*: they are not. The time of expressions is the"
    yield "processor's. A fetch reads nothing, or one element of every page. [Arrays that are born in the"
    yield from ("arena](concepts/born.md) explains it.", "")
    values = {one["what"]: with_unit(one["value"], one["unit"]) for one in results["born"]["figures"]}
    arms, kinds = ("stock", "off", "born"), {"": "", "processor, ": ", processor", "page faults, ": ", page faults"}
    works = [what.removesuffix(": stock") for what in values if what.endswith(": stock")]
    rows = [[work, *(values.get(f"{work}: {kind}{arm}", "") for kind in kinds for arm in arms)] for work in works]
    yield from table(["", *(arm + after for after in kinds.values() for arm in arms)], rows)


def types_of_values(results: Results) -> Lines:
    """Show the private memory that each type of value takes."""
    yield (
        "What the process that has made a value and the worse one of two readers take for themselves, in multiples of the value: "
        "0 is a value that lies in the arena only, 1 a private copy. *Off*: without births."
    )
    yield ""
    rows = [
        [name, *(f"{max(0, one[arm][who]):.1f}" for arm in ("on", "off") for who in ("maker", "reader"))]
        for name, one in results["types_of_values"]["types"].items()
    ]
    yield from table(["", "maker", "reader", "maker, off", "reader, off"], rows)


def peaks(results: Results) -> Lines:
    """Show the most memory of each work in a fresh cluster."""
    yield (
        f"Medians of {results['peaks']['pairs']} rounds, each in fresh clusters: shared memory and the private memory of workers "
        "and client together. *Plugin*: with `shm.born: auto`, *off*: without births. Ratios are those of rounds, with the least "
        "and the most."
    )
    yield ""
    rows = [
        [
            title,
            *(f"{one[arm]['together']['median'] / MIB:,.0f}" for arm in ("stock", "off", "plugin")),
            *(_spread(one[f"together_over_{other}"]) for other in ("stock", "off")),
            *(
                f"{one[f'{figure}_over_{other}']['median']:.2f}"
                for figure in ("seconds", "cpu")
                for other in ("stock", "off")
            ),
        ]
        for title, one in summary(results, "peaks").items()
    ]
    head = ["stock Dask, MiB", "off, MiB", "plugin, MiB", "peak over stock", "over off"]
    yield from table(["", *head, "time over stock", "over off", "processor over stock", "over off"], rows)


def _spread(one: dict[str, float]) -> str:
    return f"{one['median']:.2f} ({one['min']:.2f} to {one['max']:.2f})"


def nodes(results: Results, name: str) -> Lines:
    """Show what crosses the wires between nodes, how many copies each has, and how long it takes."""
    result = results[name]
    speed = "1 Gbit/s and 10 ms from each node to the others" if result["is_slow"] else "as fast as memory"
    yield (
        f"Wires {speed}; {result['workers']} workers on each node, {result['size'] / MIB:.0f} MiB, medians. *Received* and "
        "*copies* are those of a node, in multiples of the array; where the first node differs, it stands before the others. "
        "[Several nodes](concepts/nodes.md) explains it."
    )
    yield ""
    cases: dict[tuple[int, str], dict[str, Any]] = {(one["nodes"], one["way"]): {} for one in result["results"]}
    for one in result["results"]:
        cases[one["nodes"], one["way"]][one["arm"]] = one
    rows = [
        [
            f"{count} {'nodes' if count > 1 else 'node'}, {way}",
            *(f"{one[arm]['seconds']['median']:.2f}" for arm in ARMS),
            f"{one['plugin']['seconds']['median'] / one['stock']['seconds']['median']:.2f}",
            *(f"{one[arm]['processor seconds']['median']:.2f}" for arm in ARMS),
            *(_by_nodes(count, [one[arm]["received"]]) for arm in ARMS),
            *(_by_nodes(count, [one[arm]["copies in the arena"], one[arm]["private copies"]]) for arm in ARMS),
        ]
        for (count, way), one in cases.items()
        if (count, way) != (1, "fan")
    ]
    kinds = [
        f"{kind}, {arm}" for kind in ("time, s", "processor, s", "received", "copies") for arm in ("stock", "plugin")
    ]
    yield from table(["", *kinds[:2], "ratio", *kinds[2:]], rows)


def _by_nodes(count: int, figures: list[dict[str, Any]]) -> str:
    """Return a sum of figures of the first node, and that of the other nodes if it differs."""
    first, others = (f"{sum(one[node]['median'] for one in figures):.1f}" for node in ("first node", "other nodes"))
    return first if count == 1 or first == others else f"{first}; {others}"


def memory(results: Results) -> Lines:
    """Point to the other page on memory."""
    yield "What workers report through a longer piece of work, and what is really there, is told in"
    yield from ("[Memory](concepts/memory.md#what-it-counts-as).", "")
    yield "![Sums over four workers: RSS, what is reported, and what is really there](images/reported-memory.svg)"


SECTIONS: dict[str, dict[str, Callable[[Results], Iterable[str]]]] = {
    "Targets": {"": targets},
    "What we lose": {"": what_is_lost},
    "Broadcast": {"one_copy": one_copy, "targets": broadcasts},
    "Fetch from worker to worker": {"targets": fetches},
    "The arena and its peers, without Dask": {"peers": peers},
    "Many blocks, many members": {"targets": blocks},
    "Where sharing brings little": {"tax": tax},
    "Workflows and workloads": {
        "": lambda results: PICTURES["memory"].link(results),
        "workflows": lambda results: works(results, "workflows"),
        "workloads": lambda results: works(results, "workloads"),
    },
    "Tasks that share one value": {"fanout": fanout},
    "Shuffles and rechunks": {"shuffles": shuffles},
    "Born in the arena": {"born": born},
    "One copy, by type": {"types_of_values": types_of_values},
    "Peak memory": {"peaks": peaks},
    "Between nodes": {name: functools.partial(nodes, name=name) for name in ("nodes", "nodes_slow")},
    "Event loops, start-up, hashing": {"targets": loops_and_start},
    "Memory over time": {"": memory},
}
"""The titles, and what stands below each: by the file that it needs, if any."""


def page(results: Results) -> str:
    """Return the whole page."""
    text = list(opening(results))
    for title, parts in SECTIONS.items():
        text += [f"## {title}", ""]
        for file, part in parts.items():
            found = list(part(results)) if not file or file in results else []
            text += found or ([not_measured(file), ""] if file else [])
    return "\n".join(text).rstrip() + "\n"
