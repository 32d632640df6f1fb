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
    for work_name, begin, why in _REASONS:
        if line.work == work_name and line.what.startswith(begin):
            return why(results)
    return None


def _figure(results: Results, name: str, begin: str) -> float | None:
    measured: dict[str, Any] = work(results, name) or {"figures": []}
    found = [figure["value"] for figure in measured["figures"] if figure["what"].startswith(begin)]
    return found[0] if found else None


def _of_blocks(results: Results) -> str | None:
    measured = work(results, "many-blocks")
    seconds = list(measured["series"]["seconds"]["publish"].values()) if measured else []
    if not seconds or seconds != sorted(seconds):
        return None
    return "Where a block can lie is computed from the rows of all live blocks, each time: it grows with their number."


def _of_loops(results: Results) -> str | None:
    meanwhile = _figure(results, "event-loop", "a process that has nothing to do with it, meanwhile, median")
    stock = _figure(results, "event-loop", "the same in stock Dask, median")
    if meanwhile is None or stock is None:
        return None
    return (
        f"With stock Dask it is {with_unit(stock, 'ms')}. A process that has nothing to do with any of it was late by "
        f"{with_unit(meanwhile, 'ms')} meanwhile: so much may be the machine."
    )


def _of_hash(results: Results) -> str | None:
    over_memcpy = _figure(results, "hash", "hashing alone (_hash_sha1)")
    return "SHA-1 is what Dask takes where `xxhash` is not installed." if over_memcpy else None


_REASONS: list[tuple[str, str, Callable[[Results], str | None]]] = [
    ("many-blocks", "publish", _of_blocks),
    ("event-loop", "an event loop", _of_loops),
    ("hash", "broadcast", _of_hash),
]
"""Of which work, how the line begins, and what tells why from the results."""
