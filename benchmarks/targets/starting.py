"""The time that the plugin adds to the start of a worker and to its imports, and whether other workers import it."""

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

from clusters import ARMS, Site, Spec, arms, take_turns
from distributed import Nanny
from report import figure

IMPORTS = """
import time, distributed, distributed.nanny
start = time.perf_counter()
import dask_shm_plugin.roles.worker, dask_shm_plugin.roles.nanny, dask_shm_plugin.plugin
print(time.perf_counter() - start)
"""


def our_modules() -> list[str]:
    """Return the modules of the plugin that this process has imported."""
    return sorted(name for name in sys.modules if name.partition(".")[0] == "dask_shm_plugin")


def start_worker(site: Site) -> tuple[float, int]:
    """Start one more worker; return the time until it has done a task that waited for it, and its number of our modules."""
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
    return seconds, len(modules)


def import_time() -> float:
    """Return the time to import the plugin's halves in a process that has imported distributed."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True)
    return float(done.stdout)


def start_up(*, is_quick: bool) -> dict[str, Any]:
    """Start workers with and without the plugin in turn, after compiling it, as pip compiles the packages it installs."""
    # Found, not imported: a worker imports this file.
    spec = importlib.util.find_spec("dask_shm_plugin")
    assert spec is not None
    assert spec.origin is not None
    compileall.compile_dir(Path(spec.origin).parent, quiet=2)
    with arms(Spec(workers=1)) as remotes:
        starts = {arm: lambda _, arm=arm: remotes[arm].ask(start_worker) for arm in ARMS}
        done = take_turns(2 if is_quick else 11, {**starts, "import": lambda _: import_time()})
    (stock, unwanted), (plugin, _) = (done[arm].T for arm in ARMS)
    figures = [
        figure("a worker's start until its first task is done, more than stock Dask", plugin - stock, "ms", 100, 1e3),
        figure("the same with the plugin", plugin, "ms", factor=1e3),
        figure("the same without", stock, "ms", factor=1e3),
        figure("import of the plugin's halves, after distributed", done["import"], "ms", 100, 1e3),
        figure("modules of the plugin in a worker that does not use it", int(unwanted.max()), "", 0),
    ]
    return {"figures": figures}
