"""What the plugin adds to the start of a worker and to its imports, and who imports it at all."""

from __future__ import annotations

import asyncio
import compileall
import importlib.util
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from broadcasts import in_turn
from distributed import Nanny
from report import Figure, Measurement, Round, median
from sites import Site, Spec, sites

IMPORTS = """
import time, distributed, distributed.nanny
start = time.perf_counter()
import dask_shm_plugin.worker, dask_shm_plugin.nanny, dask_shm_plugin.plugin
print(time.perf_counter() - start)
"""


def our_modules() -> list[str]:
    """Return the modules of the plugin that this process has imported."""
    return sorted(name for name in sys.modules if name.partition(".")[0] == "dask_shm_plugin")


def start_worker(site: Site) -> Round:
    """Start one more worker, and return the seconds until it has done a task that waited for it."""
    future = site.client.submit(our_modules, resources={"fresh": 1}, pure=False)

    async def run() -> tuple[float, Any]:
        start = time.perf_counter()
        address, limits = site.client.scheduler.address, {"nthreads": 1, "memory_limit": "2 GiB"}
        async with Nanny(address, resources={"fresh": 1}, silence_logs=logging.ERROR, **limits) as nanny:
            modules = await future
            seconds = time.perf_counter() - start
            future.release()
            while await site.client.scheduler.has_what(workers=[nanny.worker_address]) != {nanny.worker_address: ()}:
                await asyncio.sleep(0.01)
        return seconds, modules

    seconds, modules = site.client.sync(run)
    assert bool(modules) == site.with_plugin, modules
    return {"seconds": seconds, "modules": len(modules)}


def import_time() -> float:
    """Return the seconds that it takes to import the plugin's halves, where distributed has been imported."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True)
    return float(done.stdout)


def start_up(*, is_quick: bool) -> Measurement:
    """Start workers with and without the plugin in turn, which is compiled as pip compiles what it installs."""
    # Found, not imported: a worker imports this file.
    spec = importlib.util.find_spec("dask_shm_plugin")
    assert spec is not None
    assert spec.origin is not None
    compileall.compile_dir(Path(spec.origin).parent, quiet=2)
    rounds: list[Round] = []
    arms = ("plugin", "stock")
    with sites(Spec(workers=1), Spec(workers=1, with_plugin=False)) as started:
        remotes = dict(zip(arms, started, strict=True))
        for number in range(-1, 2 if is_quick else 11):
            one: Round = {arm: remotes[arm].ask(start_worker) for arm in in_turn(number, list(arms))}
            one["import"] = import_time()
            rounds += [one] if number >= 0 else []
    more = median(rounds, lambda one: one["plugin"]["seconds"] - one["stock"]["seconds"])
    seconds = {arm: median(rounds, lambda one, arm=arm: one[arm]["seconds"]) for arm in arms}
    return Measurement(
        rounds,
        [
            Figure("a worker's start until its first task is done, more than stock Dask", 1e3 * more, "ms", 100),
            Figure("the same with the plugin", 1e3 * seconds["plugin"], "ms"),
            Figure("the same without", 1e3 * seconds["stock"], "ms"),
            Figure("import of the plugin's halves, after distributed", 1e3 * median(rounds, "import"), "ms", 100),
            Figure(
                "modules of the plugin in a worker that does not use it",
                max(r["stock"]["modules"] for r in rounds),
                "",
                0,
            ),
        ],
    )
