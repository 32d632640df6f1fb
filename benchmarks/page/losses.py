"""Figures that are worse than their target or than others' figures, with a reason where the figures show it."""

from __future__ import annotations

from collections.abc import Iterator

from lines import lines
from results import ARMS, MIB, Results, at_size, summary, with_unit, work


def losses(results: Results) -> list[str]:
    """Return a sentence for each of them."""
    return [*_missed(results), *_behind_peers(results), *_behind_stock(results)]


def _missed(results: Results) -> Iterator[str]:
    reasons = {
        ("many-blocks", "publish after another"): _free_space(results),
        ("one_copy", "the very first time"): _first_puts(results),
        ("peers", "put 1 MiB, less"): INTERPRETED,
        ("peers", "attach"): INTERPRETED,
        ("sixteen-workers", "16 workers"): IDLE_WORKERS,
    }
    for line in lines(results):
        if not (line.is_met or line.other):
            found = [why for (work, part), why in reasons.items() if line.work == work and part in line.what]
            yield f"{line.what}: {line.measured}, wanted {line.wanted}.{found[0] if found else ''}"


def _behind_peers(results: Results) -> Iterator[str]:
    kinds = {"put": "put", "cold_put": "put, the first time,", "attach": "attach"}
    for size in results.get("peers", {"sizes": ()})["sizes"]:
        peers = at_size(results, size)
        for what, kind in kinds.items():
            ours = peers.get("ours", {}).get(what, 0)
            for name, theirs in ((name, peer[what]) for name, peer in peers.items() if peer[what] < ours):
                yield (
                    f"{kind} {size / MIB:g} MiB: {name} takes {with_unit(1e6 * theirs, 'µs')}, "
                    f"the arena {with_unit(1e6 * ours, 'µs')}.{WHY_FASTER.get((name, what), '')}"
                )


def _behind_stock(results: Results) -> Iterator[str]:
    for title, one in (*summary(results, "workflows").items(), *summary(results, "workloads").items()):
        faster = one["times_faster"]["median"]
        if faster < 1:
            yield f"{title}: {with_unit(1 / faster, '×')} the time of stock Dask."
        stock, plugin = (one[arm]["together"]["median"] for arm in ARMS)
        if plugin > stock:
            yield f"{title}: {plugin / MIB:,.0f} MiB of memory at most, stock Dask {stock / MIB:,.0f} MiB."


# ------------------------------------------------------------------------------------------------------------- reasons

INTERPRETED = (
    " That is interpreted code, some hundred and fifty calls for a put and sixty for an attach, which the work between two "
    "rounds has driven out of the processor's caches."
)
IDLE_WORKERS = (
    " All processors that are free take part in the copy, and idle workers leave less of two processors free."
)
WHY_FASTER = {
    ("LMDB", "attach"): (
        " An LMDB reader has the whole file mapped for good; here each value gets a mapping of its own, "
        "which can be written to."
    ),
    ("SharedMemory", "attach"): (
        " `SharedMemory` maps by name and keeps no account of who does; its pages are faulted in when they are read."
    ),
}


def _free_space(results: Results) -> str:
    curves = work(results, "many-blocks").get("series", {}).get("seconds", {})
    medians = {name: [one["median"] for one in curve.values()] for name, curve in curves.items()}
    slower = {name: max(curve) / min(curve) for name, curve in medians.items()}
    if not slower or slower["publish after another"] < 1.2 * slower["publish"]:
        return ""
    return (
        " Free space is computed from the rows of all live blocks where another member has changed something since, and "
        "followed where nobody has."
    )


def _first_puts(results: Results) -> str:
    sizes = results.get("peers", {"sizes": ()})["sizes"]
    ours = at_size(results, max(sizes)).get("ours") if sizes else None
    if not ours or ours["cold_put"] < 1.5 * ours["put"]:
        return ""
    slower = with_unit(ours["cold_put"] / ours["put"], "×")
    return f" The kernel has to make the pages: a first put takes {slower} one into pages that exist."
