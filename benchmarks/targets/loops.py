"""For how long event loops are kept from their work while large values are moved and given back."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import ticker
from broadcasts import in_turn
from machine import make, read_pages
from report import MIB, Figure, Measurement, Round, median
from sites import Site, Spec, sites

IDLE = 1.0
ARMS = ("plugin", "stock")
BYSTANDER = "bystander"
ROLES = ("owner", "reader", "client")
PHASES = ("idle", "make", "first fetch", "second fetch", "gather", "release", "scatter", "give back")
OURS = tuple(phase for phase in PHASES if phase not in ("idle", "make"))


class Watch:
    """Tickers on the loops of two workers and of the client (which is the scheduler's too), and of a bystander."""

    def __init__(self, site: Site, pipe: ticker.Connection) -> None:
        self._site, self._pipe = site, pipe
        self.latest: Round = {}

    def _take(self) -> dict[str, ticker.Worst]:
        owner, reader, _ = self._site.workers
        late = self._site.client.run(ticker.take, workers=[owner, reader])
        self._pipe.send("?")
        return {
            "owner": late[owner],
            "reader": late[reader],
            "client": self._site.client.sync(ticker.take),
            BYSTANDER: self._pipe.recv(),
        }

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Watch what happens inside."""
        self._take()
        yield
        self.latest[phase] = self._take()


def move(site: Site, seed: int, size: int) -> Round:
    """Make a value, fetch it twice, gather it, release it, scatter one, release that; return who was how late, and when."""
    owner, reader, third = site.workers
    with ticker.bystander() as pipe:
        watch = Watch(site, pipe)
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
            site.wait_until_forgotten()
        x = make(seed + 1, size)
        with watch.during("scatter"):
            future = site.client.scatter(x, workers=[reader], hash=False)
            results = [site.read_on(worker, future, read_pages) for worker in (reader, owner)]
        assert results == [read_pages(x)] * 2, "wrong values"
        del x
        with watch.during("give back"):
            del future
            site.wait_until_forgotten()
    return watch.latest


def event_loop(*, is_quick: bool) -> Measurement:
    """Let a cluster with the plugin and one without move large values in turn."""
    size, count = (4 * MIB, 2) if is_quick else (1024 * MIB, 8)
    rounds: list[Round] = []
    spec = Spec(workers=3, memory_limit="5 GiB")
    with sites(spec, spec._replace(with_plugin=False)) as started:
        remotes = dict(zip(ARMS, started, strict=True))
        for number in range(count):
            rounds.append({arm: remotes[arm].ask(move, 2 * number, size) for arm in in_turn(number, list(ARMS))})
    series = {"by": "phase", "milliseconds": _series(rounds, "late"), "milliseconds of work": _series(rounds, "work")}
    return Measurement(rounds, _figures(rounds, size), series)


def _worst(
    one: Round, arm: str, roles: tuple[str, ...] = ROLES, phases: tuple[str, ...] = OURS, what: str = "late"
) -> float:
    return 1e3 * max(one[arm][phase][role][what] for phase in phases for role in roles)


def _figures(rounds: list[Round], size: int) -> list[Figure]:
    def of(arm: str, *more: Any) -> list[float]:
        return [_worst(one, arm, *more) for one in rounds]

    late, work = of("plugin"), of("plugin", ROLES, OURS, "work")
    meanwhile, (kept, kept_by_stock) = of("plugin", (BYSTANDER,)), (of(arm, ROLES, OURS, "kept") for arm in ARMS)
    rows = [
        ("median of rounds", statistics.median(late), 10),
        ("maximum", max(late), None),
        ("stock Dask, median", statistics.median(of("stock")), None),
        ("stock Dask, maximum", max(of("stock")), None),
        ("idle for 1 s, median", statistics.median(of("plugin", ROLES, ("idle",))), None),
        ("a bystander's meanwhile, median", statistics.median(meanwhile), None),
        ("a bystander's meanwhile, maximum", max(meanwhile), None),
        ("without waiting for a processor, median", statistics.median(kept), None),
        ("without waiting for a processor, maximum", max(kept), None),
        ("without waiting for a processor, stock Dask, median", statistics.median(kept_by_stock), None),
        ("its own work in it (CPU), median", statistics.median(work), None),
        ("its own work in it (CPU), maximum", max(work), None),
        ("its own work in it (CPU), stock Dask, median", statistics.median(of("stock", ROLES, OURS, "work")), None),
        *((f"{phase}, median", statistics.median(of("plugin", ROLES, (phase,))), None) for phase in OURS),
    ]
    what = f"an event loop's longest wait, {size // MIB} MiB"
    return [Figure(f"{what}: {name}", value, "ms", target) for name, value, target in rows]


def _series(rounds: list[Round], what: str) -> dict[str, dict[str, dict[str, float]]]:
    def of(arm: str, phase: str, role: str) -> float:
        return median(rounds, lambda one: _worst(one, arm, (role,), (phase,), what))

    return {
        arm: {phase: {role: of(arm, phase, role) for role in (*ROLES, BYSTANDER)} for phase in PHASES} for arm in ARMS
    }
