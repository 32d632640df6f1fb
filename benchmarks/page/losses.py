"""What is worse than it should be, or than with others: found in the figures, and explained where they show why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lines import MIB, Line, lines, with_unit
from results import Results, work


def losses(results: Results) -> list[str]:
    """Return a sentence for each of them."""
    return [*_missed(results), *_behind_peers(results), *_behind_stock(results)]


def _missed(results: Results) -> Iterator[str]:
    for line in lines(results):
        if not (line.is_met or line.other):
            reason = _reason(line, results)
            yield f"{line.what}: {line.measured}, wanted {line.wanted}.{' ' + reason if reason else ''}"


def _behind_peers(results: Results) -> Iterator[str]:
    peers = results.get("peers", {"sizes": (), "peers": {}})
    medians = {name: peer["medians"] for name, peer in peers["peers"].items() if "medians" in peer}
    for size in map(str, peers["sizes"]):
        for what in ("put", "cold_put", "attach"):
            ours = medians.get("ours", {}).get(size, {}).get(what, 0)
            for name, others in medians.items():
                theirs = others.get(size, {}).get(what, ours)
                if theirs < ours:
                    kind = what.replace("cold_put", "put, the first time,")
                    yield (
                        f"{kind} {int(size) / MIB:g} MiB: {name} takes {with_unit(1e6 * theirs, 'µs')}, "
                        f"the arena {with_unit(1e6 * ours, 'µs')}.{_WHY_FASTER.get((name, what), '')}"
                    )


_WHY_FASTER = {
    (
        "LMDB",
        "attach",
    ): " An LMDB reader has the whole file mapped for good; here each value gets a mapping of its own, "
    "which can be written to.",
    (
        "SharedMemory",
        "attach",
    ): " `SharedMemory` maps by name and keeps no account of who does; its pages are faulted in when they are read.",
}


def _behind_stock(results: Results) -> Iterator[str]:
    for name in ("workflows", "workloads"):
        for title, figures in results.get(name, {"summary": {}})["summary"].items():
            if figures["times_faster"] < 1:
                yield f"{title}: {with_unit(1 / figures['times_faster'], '×')} the time of stock Dask."
            stock, plugin = (figures[arm]["together"] for arm in ("stock", "plugin"))
            if plugin > stock:
                yield f"{title}: {plugin / MIB:,.0f} MiB of memory at most, stock Dask {stock / MIB:,.0f} MiB."


# ------------------------------------------------------------------------------------------------------------- reasons


def _reason(line: Line, results: Results) -> str | None:
    for work_name, part, why in _REASONS:
        if line.work == work_name and part in line.what:
            return why(results)
    return None


def _figure(results: Results, name: str, begin: str, end: str) -> float | None:
    measured: dict[str, Any] = work(results, name) or {"figures": []}
    found = [one["value"] for one in measured["figures"] if one["what"].startswith(begin) and one["what"].endswith(end)]
    return found[0] if found else None


_PUBLISHING = ("publish", "publish after another")


def _of_blocks(results: Results) -> str | None:
    measured = work(results, "many-blocks")
    curves = measured["series"]["seconds"] if measured else {}
    if not curves:
        return None
    own, others = (max(curves[what].values()) / min(curves[what].values()) for what in _PUBLISHING)
    if others < 1.2 * own:
        return None
    return (
        "Free space is computed from the rows of all live blocks where another member has changed something since, and "
        "followed where nobody has."
    )


def _of_loops(results: Results) -> str | None:
    begin = "an event loop's longest wait, "
    found = {end: _figure(results, "event-loop", begin, end) for end in _LOOP_FIGURES}
    if None in found.values():
        return None
    stock, meanwhile, kept, work = (with_unit(value or 0, "ms") for value in found.values())
    return (
        f"With stock Dask it is {stock}. Without the time for which its thread waited for a processor it is {kept}, the loop's "
        f"own work in it was {work}, and a process that has nothing to do with any of it had to wait {meanwhile} meanwhile."
    )


_LOOP_FIGURES = (
    ": stock Dask, median",
    ": a bystander's meanwhile, median",
    ": without waiting for a processor, median",
    ": its own work in it (CPU), median",
)


def _of_first_writes(results: Results) -> str | None:
    peers = results.get("peers", {"sizes": [], "peers": {}})
    ours = peers["peers"].get("ours", {}).get("medians", {}).get(str(max(peers["sizes"], default=0)))
    if not ours or ours["cold_put"] < 1.5 * ours["put"]:
        return None
    slower = with_unit(ours["cold_put"] / ours["put"], "×")
    return f"The kernel has to make the pages: a first put takes {slower} one into pages that exist."


def _of_interpreted_code(_: Results) -> str:
    return (
        "That is interpreted code, some hundred and fifty calls for a put and sixty for an attach, which the work between two "
        "rounds has driven out of the processor's caches."
    )


def _of_idle_workers(_: Results) -> str:
    return "All processors that are free take part in the copy, and idle workers leave less of two processors free."


_REASONS: list[tuple[str, str, Callable[[Results], str | None]]] = [
    ("many-blocks", _PUBLISHING[1], _of_blocks),
    ("event-loop", "an event loop", _of_loops),
    ("one_copy", "the very first time", _of_first_writes),
    ("peers", "put 1 MiB, less", _of_interpreted_code),
    ("peers", "attach", _of_interpreted_code),
    ("sixteen-workers", "16 workers", _of_idle_workers),
]
"""Of which work, what stands in the line, and what tells why from the results."""
