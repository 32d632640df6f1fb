"""The time for which event loops are kept from their work while large values are moved and released."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ticker
from clusters import ARMS, Site, Spec, arms, take_turns
from machine import MIB, make, read_pages
from remote import Remote, remote
from report import figure

IDLE = 1.0
BYSTANDER = "bystander"
ROLES = ("owner", "reader", "client")
PHASES = ("idle", "make", "first fetch", "second fetch", "gather", "release", "scatter", "give back")
OURS = PHASES[2:]


class Watch:
    """Tickers on the loops of two workers and of the client (which is the scheduler's too), and of a bystander."""

    def __init__(self, site: Site, bystander: Remote) -> None:
        self._site, self._bystander = site, bystander
        self.latest: dict[str, dict[str, ticker.Worst]] = {}

    def _take(self) -> dict[str, ticker.Worst]:
        owner, reader, _ = self._site.workers
        late = self._site.client.run(ticker.take, workers=[owner, reader])
        others = {"client": self._site.client.sync(ticker.take), BYSTANDER: self._bystander.ask(ticker.take_in)}
        return {"owner": late[owner], "reader": late[reader], **others}

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Watch the code inside."""
        self._take()
        yield
        self.latest[phase] = self._take()


def move(site: Site, seed: int, size: int) -> dict[str, dict[str, ticker.Worst]]:
    """Make a value, fetch it twice, gather and release it, scatter and release another; return the delays in each phase."""
    owner, reader, third = site.workers
    with remote(ticker.bystander) as bystander:
        watch = Watch(site, bystander)
        with watch.during("idle"):
            time.sleep(IDLE)
        with watch.during("make"):
            future = site.put_on(owner, seed, size)
        with watch.during("first fetch"):
            results = [site.read_on(reader, future, read_pages)]
        with watch.during("second fetch"):
            results.append(site.read_on(third, future, read_pages))
        with watch.during("gather"):
            x = future.result()
        assert results == [read_pages(x)] * 2, "wrong values"
        with watch.during("release"):
            del future, x
            site.wait_until_released(blocks_too=True)
        x = make(seed + 1, size)
        with watch.during("scatter"):
            future = site.client.scatter(x, workers=[reader], hash=False)
            results = [site.read_on(worker, future, read_pages) for worker in (reader, owner)]
        assert results == [read_pages(x)] * 2, "wrong values"
        del x
        with watch.during("give back"):
            del future
            site.wait_until_released(blocks_too=True)
    return watch.latest


def event_loop(*, is_quick: bool) -> dict[str, Any]:
    """Let a cluster with the plugin and one without move large values in turn."""
    size, count = (4 * MIB, 2) if is_quick else (1024 * MIB, 8)
    with arms(Spec(workers=3, memory_limit="5 GiB")) as remotes:
        orders = {arm: lambda number, arm=arm: remotes[arm].ask(move, 2 * number, size) for arm in ARMS}
        done = take_turns(count, orders, unmeasured=0)

    def of(arm: str, roles: Sequence[str] = ROLES, phases: Sequence[str] = OURS, what: str = "late") -> list[float]:
        """Return the worst of some roles and phases in each round, in milliseconds."""
        return [1e3 * max(one[phase][role][what] for phase in phases for role in roles) for one in done[arm]]

    late, kept, work = (of("plugin", what=what) for what in ("late", "kept", "work"))
    meanwhile = of("plugin", (BYSTANDER,))
    named: dict[str, float | list[float]] = {
        "median of rounds": late,
        "maximum": max(late),
        "stock Dask, median": of("stock"),
        "stock Dask, maximum": max(of("stock")),
        "idle for 1 s, median": of("plugin", phases=("idle",)),
        "a bystander's meanwhile, median": meanwhile,
        "a bystander's meanwhile, maximum": max(meanwhile),
        "without waiting for a processor, median": kept,
        "without waiting for a processor, maximum": max(kept),
        "without waiting for a processor, stock Dask, median": of("stock", what="kept"),
        "its own work in it (CPU), median": work,
        "its own work in it (CPU), maximum": max(work),
        "its own work in it (CPU), stock Dask, median": of("stock", what="work"),
        **{f"{phase}, median": of("plugin", phases=(phase,)) for phase in OURS},
    }
    what = f"an event loop's longest wait, {size // MIB} MiB"
    targets = {"median of rounds": 10}
    figures = [figure(f"{what}: {name}", value, "ms", targets.get(name)) for name, value in named.items()]
    series: dict[str, Any] = {"by": "phase"}
    for kind, measured in (("milliseconds", "late"), ("milliseconds of work", "work")):
        series[kind] = {
            arm: {
                phase: {role: statistics.median(of(arm, (role,), (phase,), measured)) for role in (*ROLES, BYSTANDER)}
                for phase in PHASES
            }
            for arm in ("plugin", "stock")
        }
    return {"figures": figures, "series": series}
