"""Scripts end as they would without the plugin, in whichever order they close their objects, or if they close none."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from distributed import Client
from observing import names, totals, wait_until
from processes import cluster, environment
from sampling import sample

from dask_shm_plugin.node import rendezvous

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # stock Dask takes half a minute to end some of them

HEAD = """
import asyncio, atexit, contextlib, gc, os, signal, sys, threading, time
FIRST
import numpy as np
from distributed import Client, LocalCluster, Nanny, Scheduler, Worker, wait
SHARES = "SHARES" in os.environ
if SHARES:
    from dask_shm_plugin import SharedMemoryPlugin, unregister
    plugin = SharedMemoryPlugin(threshold="64 KiB", capacity="64 MiB")

def big(n):
    return np.full(1 << 16, float(n))

def slow(n):
    time.sleep(2)
    return big(n)

def interrupt():
    os.killpg(0, signal.SIGINT)  # as a terminal does
    time.sleep(30)
"""

PLAIN = """
def in_background(function, *args):
    def whatever_comes():
        with contextlib.suppress(BaseException):  # the script has gone away, and what that means depends on the moment
            function(*args)
    threading.Thread(target=whatever_comes, daemon=True).start()
    time.sleep(0.1)

if __name__ == "__main__":
    SETUP
    if SHARES:
        client.register_plugin(plugin)
    made, scattered = client.submit(big, 1), client.scatter(big(2), broadcast=True)
    views = [scattered.result(), made.result(), client.submit(np.add, made, scattered).result()]
    assert sum(float(view[0]) for view in views) == 6
    print("worked", flush=True)
    ENDING
"""

ASYNCHRONOUS = """
views = []

async def main():
    SETUP
    if SHARES:
        await client.register_plugin(plugin)
    made, scattered = client.submit(big, 1), await client.scatter(big(2), broadcast=True)
    views.extend([await scattered, await made, await client.submit(np.add, made, scattered)])
    assert sum(float(view[0]) for view in views) == 6
    print("worked", flush=True)
    ENDING

if __name__ == "__main__":
    asyncio.run(main())
"""

CLUSTERS = {
    "threads": "client = Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=':0'); "
    "cluster = client.cluster",
    "threads over TCP": "cluster = LocalCluster(processes=False, protocol='tcp://', n_workers=2, threads_per_worker=1, "
    "dashboard_address=':0'); client = Client(cluster)",
    "processes": "cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=':0'); "
    "client = Client(cluster)",
    "own processes": "client = Client(n_workers=2, threads_per_worker=1, dashboard_address=':0'); "
    "cluster = client.cluster",
    "commands": "client = Client(os.environ['ADDRESS'])",
}

ENDINGS = {
    "closes nothing": "pass",
    "closes the client": "client.close()",
    "closes all": "client.close(); cluster.close()",
    "closes the cluster first": "cluster.close(); client.close()",
    "closes the cluster only": "cluster.close()",
    "closes twice": "client.close(); client.close(); cluster.close(); cluster.close()",
    "shuts down": "client.shutdown()",
    "closes in atexit": "atexit.register(client.close)",
    "drops the client": "del client, made, scattered; gc.collect()",
    "drops the values": "del views; client.close()",
    "sys.exit": "sys.exit(3)",
    "an exception": "raise ValueError('on purpose')",
    "Ctrl-C": "interrupt()",
    "os._exit": "os._exit(4)",
    "unregisters": "if SHARES: unregister(client)",
    "unregisters and closes": "SHARES and unregister(client); client.close(); cluster.close()",
    "while it waits for a task": "in_background(client.submit(slow, 3).result)",
    "while it gathers": "many = client.map(big, range(9, 60)); wait(many); in_background(client.gather, many)",
    "while it scatters": "in_background(lambda: client.scatter([big(n) for n in range(60)], hash=False))",
}

SERVERS = {
    "asynchronous": "cluster = await LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=':0', "
    "asynchronous=True); client = await Client(cluster, asynchronous=True); servers = [cluster]",
    "asynchronous threads": "client = await Client(n_workers=2, threads_per_worker=1, dashboard_address=':0', "
    "processes=False, asynchronous=True); servers = [client.cluster]",
    "workers": "scheduler = await Scheduler(port=0, dashboard_address=':0'); "
    "servers = [await Worker(scheduler.address), await Worker(scheduler.address), scheduler]; "
    "client = await Client(scheduler.address, asynchronous=True)",
    "a nanny": "scheduler = await Scheduler(port=0, dashboard_address=':0'); "
    "servers = [await Nanny(scheduler.address, nthreads=1), scheduler]; "
    "client = await Client(scheduler.address, asynchronous=True)",
}

ASYNCHRONOUS_ENDINGS = {
    "closes nothing": "pass",
    "closes the client": "await client.close()",
    "closes all": "await client.close(); [await server.close() for server in servers]",
    "closes the client last": "[await server.close() for server in servers]; await client.close()",
    "closes the scheduler first": "[await server.close() for server in servers[::-1]]; await client.close()",
    "closes twice": "await client.close(); await client.close(); [await s.close() for s in servers + servers]",
    "sys.exit": "sys.exit(3)",
    "an exception": "raise ValueError('on purpose')",
    "Ctrl-C": "interrupt()",
    "os._exit": "os._exit(4)",
    "unregisters": "await unregister(client) if SHARES else None",
    "while it gathers": "task = asyncio.create_task(client.gather(client.submit(slow, 3))); await asyncio.sleep(0.1)",
    "while it scatters": "task = asyncio.create_task(client.scatter([big(n) for n in range(60)], hash=False)); "
    "await asyncio.sleep(0.01)",
    "while it closes": "task = asyncio.create_task(client.close()); await asyncio.sleep(0)",
}

QUICK = {
    ("threads", "closes nothing"),
    ("threads", "an exception"),
    ("threads", "while it waits for a task"),
    ("threads over TCP", "closes nothing"),
    ("threads over TCP", "closes the cluster first"),
    ("threads over TCP", "drops the client"),
    ("threads over TCP", "while it scatters"),
    ("processes", "closes nothing"),
    ("processes", "Ctrl-C"),
    ("asynchronous threads", "closes nothing"),
    ("workers", "closes nothing"),
    ("workers", "closes the client last"),
    ("workers", "os._exit"),
}


#: Messages of stock Dask in some runs of a script only: a worker goes before the client, a task moves to another worker
#: meanwhile, two threads wait for the end of one process, a heartbeat comes too late, a call is cancelled, a nanny and its
#: worker remove the same folder.
OCCASIONAL = (
    " caused the cluster to lose ",
    "Async instruction",
    "exit status was already read",
    "heartbeat from unregistered worker",
    "unaware of this worker",
    "asyncio.exceptions.CancelledError",
    "distributed.diskutils - ERROR - Failed to remove",
)


class End(NamedTuple):
    """The end of a script: its exit status, its output, and its messages."""

    status: int
    printed: str
    said: set[str]


def run(source: str, *, shares: bool, address: str = "") -> End:
    """Run a script to its end, in a session of its own, and wait until all processes of the session have ended."""
    env = environment({"DASK_LOGGING__DISTRIBUTED": "warning", "PYTHONWARNINGS": "default::ResourceWarning"})
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory, "script.py")
        script.write_text(source)
        script = subprocess.Popen(
            [sys.executable, str(script)],
            env=env | {"ADDRESS": address} | ({"SHARES": "1"} if shares else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell lets its background processes ignore Ctrl-C, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            cwd=directory,
        )
        try:
            printed, said = script.communicate(timeout=90)
            wait_until(lambda: not session(script.pid), lambda: f"{session(script.pid)} end", seconds=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)
    print(f"--- {'with' if shares else 'without'} the plugin:\n{printed}{said}")
    return End(script.returncode, printed, messages(said))


def session(leader: int) -> list[psutil.Process]:
    """Return the processes of a session."""
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def messages(said: str) -> set[str]:
    """Return messages without the parts that differ from run to run: times, paths, addresses, keys, tracebacks."""
    lines = [re.sub(r"^[-\d]+ [:\d]+,\d+ - |^/\S*/", "", line) for line in said.splitlines()]
    lines = [line for line in lines if line and not line.startswith((" ", "Traceback", "During", "The above"))]
    # Above its traceback, a cancellation has a line without a text.
    lines = [
        line
        for line in lines
        if line != "distributed.client - ERROR - " and not any(said in line for said in OCCASIONAL)
    ]
    return {re.sub(r"\b\w*\d[\w./:-]*|(?<=\w)-[\w-]{16,}|\(.*\)", "…", line) for line in lines}


def assert_ends_as_without(source: str, address: str = "", *, is_race: bool = False) -> None:
    """Fail if a script ends in another way with the plugin, says more, or leaves a name.

    The status and the messages of an interrupted script depend on the moment: they are not compared, but the messages
    must not mention the plugin.
    """
    before = names()
    end = run(source, shares=True, address=address)
    assert end.printed == "worked\n"
    if end.status == 4:  # after `os._exit`, the next process cleans up
        rendezvous.purge()
    wait_until(lambda: names() <= before, lambda: f"no names are left: {names() - before}")
    assert not [line for line in end.said if "shm" in line]
    said = set[str]()
    for attempt in range(0 if is_race else 5):  # without the plugin, too, the messages depend on the moment
        if not attempt or end.said - said:
            stock = run(source, shares=False, address=address)
            assert stock[:2] == end[:2]
            said |= stock.said
    assert is_race or end.said <= said


def is_racy(ending: str) -> bool:
    """Tell whether the messages of an ending depend on the moment."""
    return ending.startswith("while") or ending == "Ctrl-C"


def cells(clusters: dict[str, str], endings: dict[str, str]) -> list[object]:
    """Return the quick pairs and, marked as slow, every fifth of all pairs; see :func:`sample`.

    So each cluster comes with different endings. All pairs take a quarter of an hour.
    """
    pairs = [(one, other) for one in clusters for other in endings]
    sampled = {*QUICK, *sample(pairs, 5)}
    return [
        pytest.param(*pair, id=": ".join(pair), marks=[] if pair in QUICK else [pytest.mark.long])
        for pair in pairs
        if pair in sampled
    ]


def script(body: str, setup: str, ending: str, first: str = "") -> str:
    """Return the source of a script."""
    return (HEAD + body).replace("SETUP", setup).replace("ENDING", ending).replace("FIRST", first)


@pytest.mark.parametrize(("kind", "ending"), cells({k: v for k, v in CLUSTERS.items() if k != "commands"}, ENDINGS))
def test_a_script_ends_as_without_the_plugin(kind: str, ending: str) -> None:
    """It says no more than on stock Dask, and leaves no process and no name in ``/dev/shm``."""
    assert_ends_as_without(script(PLAIN, CLUSTERS[kind], ENDINGS[ending]), is_race=is_racy(ending))


@pytest.mark.parametrize(("kind", "ending"), cells(SERVERS, ASYNCHRONOUS_ENDINGS))
def test_an_asynchronous_script_ends_as_without_the_plugin(kind: str, ending: str) -> None:
    """The same holds for clusters and clients on an event loop of the script's own."""
    source = script(ASYNCHRONOUS, SERVERS[kind], ASYNCHRONOUS_ENDINGS[ending])
    assert_ends_as_without(source, is_race=is_racy(ending))


@pytest.mark.parametrize(
    "first", ["import dask_shm_plugin.node.membership", "import distributed, dask_shm_plugin.node.membership"]
)
@pytest.mark.long
@pytest.mark.parametrize("kind", ["threads", "threads over TCP", "processes"])
def test_the_order_of_imports_does_not_change_how_a_script_ends(kind: str, first: str) -> None:
    """Imported before Dask, the package is cleaned up after it; imported later, before it. A script cannot tell."""
    assert_ends_as_without(script(PLAIN, CLUSTERS[kind], "pass", f"if 'SHARES' in os.environ: {first}"))


@pytest.fixture(scope="module")
def commands(nothing_leaks: None) -> Iterator[Client]:
    """A client of two workers that were started by a command, for the whole module."""
    with cluster("--no-nanny", count=1, options={"threshold": "64 KiB", "capacity": "64 MiB"}) as client:
        yield client


def release_values_of_gone_clients(dask_scheduler: Any) -> None:
    """Release values that clients had on the way when they went: the scheduler keeps these, without the plugin, too."""
    for key, client in list(dask_scheduler.clients.items()):
        if key not in dask_scheduler.client_comms:
            dask_scheduler.client_releases_keys([task.key for task in client.wants_what], key, "test")


@pytest.mark.parametrize("ending", [other for other in ENDINGS if "cluster" not in ENDINGS[other]])
def test_a_script_of_a_cluster_of_commands_ends_as_without_the_plugin(commands: Client, ending: str) -> None:
    """The cluster goes on, and its arena keeps nothing that the script held."""
    if ending in ("shuts down", "unregisters"):
        pytest.skip("the cluster is needed")
    members = totals(commands).members
    source, address = script(PLAIN, CLUSTERS["commands"], ENDINGS[ending]), commands.scheduler.address
    assert_ends_as_without(source, address, is_race=is_racy(ending))
    wait_until(lambda: totals(commands).members == members, "the script leaves the arena")

    def is_empty() -> bool:
        commands.run_on_scheduler(release_values_of_gone_clients)
        return totals(commands).used == 0

    wait_until(is_empty, lambda: f"the arena empties: {totals(commands)}")
