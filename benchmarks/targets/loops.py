"""For how long event loops are kept from their work while large values are moved and given back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

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

    def _take(self) -> dict[str, float]:
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
    size, count = (4 * MIB, 2) if is_quick else (1024 * MIB, 4)
    rounds: list[Round] = []
    spec = Spec(workers=3, memory_limit="5 GiB")
    with sites(spec, spec._replace(with_plugin=False)) as started:
        remotes = dict(zip(ARMS, started, strict=True))
        for number in range(count):
            rounds.append({arm: remotes[arm].ask(move, 2 * number, size) for arm in in_turn(number, list(ARMS))})
    figures = [*_worst(rounds, size), *_bystanders(rounds), *_by_phase(rounds)]
    return Measurement(rounds, figures, {"by": "phase", "milliseconds": _series(rounds)})


def _latest(one: Round, arm: str, roles: tuple[str, ...], phases: tuple[str, ...]) -> float:
    return 1e3 * max(one[arm][phase][role] for phase in phases for role in roles)


def _worst(rounds: list[Round], size: int) -> list[Figure]:
    what = f"an event loop's longest wait while {size // MIB} MiB move"
    return [
        Figure(f"{what}, median of rounds", median(rounds, lambda one: _latest(one, "plugin", ROLES, OURS)), "ms", 10),
        Figure(f"{what}, maximum", max(_latest(one, "plugin", ROLES, OURS) for one in rounds), "ms"),
        Figure("the same in stock Dask, median", median(rounds, lambda one: _latest(one, "stock", ROLES, OURS)), "ms"),
        Figure("the same in stock Dask, maximum", max(_latest(one, "stock", ROLES, OURS) for one in rounds), "ms"),
    ]


def _bystanders(rounds: list[Round]) -> list[Figure]:
    def idle(one: Round) -> float:
        return _latest(one, "plugin", ROLES, ("idle",))

    def machine(one: Round) -> float:
        return _latest(one, "plugin", (BYSTANDER,), OURS)

    return [
        Figure("the same where nothing is done (idle for 1 s), median", median(rounds, idle), "ms"),
        Figure("a process that has nothing to do with it, meanwhile, median", median(rounds, machine), "ms"),
        Figure("a process that has nothing to do with it, meanwhile, maximum", max(map(machine, rounds)), "ms"),
    ]


def _by_phase(rounds: list[Round]) -> list[Figure]:
    return [
        Figure(
            f"{arm}: {phase}, median", median(rounds, lambda one, a=arm, p=phase: _latest(one, a, ROLES, (p,))), "ms"
        )
        for arm in ARMS
        for phase in OURS
    ]


def _series(rounds: list[Round]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        arm: {
            phase: {
                role: median(rounds, lambda one, a=arm, p=phase, r=role: _latest(one, a, (r,), (p,)))
                for role in (*ROLES, BYSTANDER)
            }
            for phase in PHASES
        }
        for arm in ARMS
    }
