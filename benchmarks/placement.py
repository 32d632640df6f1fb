"""How many values are published with the scheduler's part of the plugin and without it, where no input is widely shared.

    pip install -e '.[benchmark]'
    python benchmarks/placement.py [--quick] [--pairs 5] [--only NAME ...] [--json PATH]

The inputs are larger than 8 MiB, so that the scheduler considers their place. A task that runs on a neighbour of its
input's holder makes this input be published. Both arms are clusters with the plugin; in one, the scheduler's part is
switched off. The work is done once unmeasured, then in turn. A difference is the mean over the pairs with its standard
error; "ratio" is the geometric mean over the pairs, with the scheduler's part over without it, and "at most" its bound
(95 %).
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from typing import Any

import clusters
import machine
import numpy as np
import pairs
import report
import tax
import workflows
from clusters import Site, Spec, in_turn
from pairs import Work, work
from remote import remote

ARMS = ("off", "on")
COUNTS = ("count", "bytes")
FIGURES = ("seconds", *COUNTS)

WORKS = (
    work("tensordot", tax.tensordot, tax.factors, side=(4096, 2048), chunk=(1024, 1024)),
    work(
        "map-overlap", workflows.overlap, workflows.chunks, side=(6144, 2048), rows=(1536, 1024), columns=(1536, 1024)
    ),
    work("shuffle", tax.shuffle, tax.frame, rows=(500_000, 300_000), partitions=(8, 4)),
    work(
        "merge",
        workflows.merge,
        workflows.frames,
        keys=(1_000_000, 300_000),
        count=(700_000, 500_000),
        partitions=(8, 4),
    ),
)


@contextlib.contextmanager
def arm(name: str) -> Any:
    """Start a cluster with the plugin; its scheduler has no part in it if the arm is "off"."""
    with clusters.site(Spec(has_amm=True)) as site:
        if name == "off":
            from dask_shm_plugin import stub

            site.client.run_on_scheduler(stub.stop_scheduling)
        yield site


def measure(site: Site, work: Work, seed: int) -> tuple[dict[str, float], Any]:
    """Do a piece of work, and return its time, the growth of the counters, and its answer."""
    site.settle()
    prepared = work.prepare(site.client, seed, **work.sizes)
    before, start = site.shared()["published"], time.perf_counter()
    answer = work.do(site.client, prepared)
    seconds, after = time.perf_counter() - start, site.shared()["published"]
    return {"seconds": seconds, **{count: after[count] - before[count] for count in COUNTS}}, answer


def main() -> None:
    """Read the arguments, measure, print."""
    asked, chosen = pairs.arguments(__doc__, WORKS, 5)
    rows, summary = [], {}
    for one in chosen:
        done: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
        with contextlib.ExitStack() as stack:
            sites = {name: stack.enter_context(remote(arm, name)) for name in ARMS}
            for number in range(-1, asked.pairs):
                results = {name: sites[name].ask(measure, one, number + 1) for name in in_turn(number, ARMS)}
                assert results["on"][1] == results["off"][1], "the results differ"
                for name in ARMS:
                    done[name] += [results[name][0]] if number >= 0 else []
        ratios = np.array(
            [with_it["seconds"] / without["seconds"] for without, with_it in zip(*done.values(), strict=True)]
        )
        summary[one.name] = {
            **{
                name: {figure: report.spread(each[figure] for each in runs) for figure in FIGURES}
                for name, runs in done.items()
            },
            **{f"mean {count}": {name: mean(runs, count) for name, runs in done.items()} for count in COUNTS},
            "ratio": float(tax.geometric_mean(ratios)),
            "at_most": tax.upper_bound(ratios),
        }
        rows.append(row(one.name, summary[one.name], done))
    report.write(asked.json, report.head(asked, "distributed", pairs=asked.pairs, summary=summary))
    columns = (f"{what}, {name}" for what in ("values", "MiB") for name in (*ARMS, "difference"))
    report.table(["means", *columns, "ratio of times", "at most"], rows)


def mean(runs: list[dict[str, float]], figure: str) -> float:
    """Return the mean of a figure of some runs."""
    return statistics.fmean(each[figure] for each in runs)


def row(name: str, found: dict[str, Any], done: dict[str, list[dict[str, float]]]) -> list[str]:
    """Return a line of the table: counts, their mean differences with standard errors, and the ratio of times."""
    cells = []
    for count, unit in zip(COUNTS, (1, machine.MIB), strict=True):
        grown = [(b[count] - a[count]) / unit for a, b in zip(*done.values(), strict=True)]
        error = statistics.stdev(grown) / len(grown) ** 0.5 if len(grown) > 1 else math.nan
        cells += [f"{found[f'mean {count}'][arm] / unit:.1f}" for arm in ARMS]
        cells += [f"{statistics.fmean(grown):+.1f} ± {error:.1f}"]
    return [name, *cells, f"{found['ratio']:.2f}", f"{found['at_most']:.2f}"]


if __name__ == "__main__":
    main()
