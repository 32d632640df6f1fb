"""Ways to give a value to another process on the same machine, side by side: this package's arena and its peers.

    python benchmarks/peers [--quick] [--envs FOLDER] [--only NAME ...] [--json PATH]

One process puts an array of random float64 numbers, another one attaches it; Dask takes part only where its name is in the
table. Each peer has an environment of its own, which is made with pip and kept in FOLDER. A peer that cannot be installed or
does not run stays in the table, with the reason.

put
    The time until the value can be attached. *Cold* is the first value of a size in a store just started, which has held
    only smaller ones; *warm* are the others, each after the one before has been deleted. Beside each, in the same process and
    next to it in time, stands a plain copy of the same bytes into memory whose pages exist; "× memcpy" is the median of the
    ratios.
attach
    The time until the other process has an array of the value, which it has not read; then, by itself, the time to read one
    element of every page. The first of each start is left out.
memory
    The growth of ``Shmem`` of the machine since before the store was started, and of the ``RssAnon`` of all processes
    (writer, readers, servers) since before the put, when one value is attached and read by four readers.

"Dask, TCP" and "Dask, UCX" are no stores: there, put is a scatter straight to one worker, and attach is a task on another
worker that fetches the value and reads one element. UCX is used as it installs from PyPI, on a machine with or without
GPUs.

All peers are started several times in turn. Other programs that use shared memory or the processors spoil the figures.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environments import PEERS, NotThere, Peer, complaint, default_folder, python_of

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import machine  # noqa: E402  (beside this folder)
import report  # noqa: E402
from machine import MIB  # noqa: E402
from report import Spread, spread  # noqa: E402

TIMEOUT = 120  # seconds
FIGURES = ("memcpy", "put", "attach", "read")


def run(peer: Peer, python: str, mode: str, rounds: int, sizes: list[int]) -> Any:
    """Start a peer once, and return what it measured.

    Raises
    ------
    NotThere
        It failed, or took too long.
    """
    folder = Path(tempfile.mkdtemp(prefix="peers-"))
    shm = Path(tempfile.mkdtemp(prefix="peers-", dir="/dev/shm"))
    output, log = folder / "result.json", folder / "log"
    command = [python, str(HERE / "driver.py"), peer.kind, mode, folder, shm, output, rounds, *sizes]
    # A peer in this environment finds the packages that this process finds.
    more = [] if peer.requirements else [path for path in (os.environ.get("PYTHONPATH"),) if path]
    path = os.pathsep.join([str(HERE.parent), *more])
    environ = {**os.environ, "PYTHONPATH": path, "PEERS_PROTOCOL": peer.protocol}
    try:
        with log.open("wb") as stream:
            process = subprocess.Popen(list(map(str, command)), stdout=stream, stderr=subprocess.STDOUT, env=environ)
            try:
                process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                for pid in machine.family(process.pid):
                    os.kill(pid, signal.SIGKILL)
                process.wait()
                raise NotThere(f"did not end within {TIMEOUT} s") from None
        if process.returncode or not output.exists():
            raise NotThere(f"does not run: {complaint(log.read_text(errors='replace'))}")
        return json.loads(output.read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(shm, ignore_errors=True)
        for left in Path("/dev/shm").glob(f"{folder.name}-*"):
            left.unlink(missing_ok=True)


def measure(peers: list[Peer], envs: Path, starts: int, rounds: int, sizes: list[int]) -> dict[str, Any]:
    """Start all peers in turn, several times for the times and as often for the memory."""
    done: dict[str, Any] = {peer.name: {"requirements": list(peer.requirements)} for peer in peers}
    for number in range(starts):
        for mode in ("times", "memory"):
            for peer in (peer for peer in peers if "reason" not in done[peer.name]):
                begin = time.monotonic()
                try:
                    one = run(peer, python_of(peer, envs), mode, rounds, sizes)
                    done[peer.name].setdefault(mode, []).append(one)
                except NotThere as reason:
                    done[peer.name]["reason"] = str(reason)
                seconds = time.monotonic() - begin
                print(f"{number + 1} of {starts}, {mode}: {peer.name} took {seconds:.0f} s", file=sys.stderr)
    return {name: summary(one, sizes) for name, one in done.items()}


def summary(done: dict[str, Any], sizes: list[int]) -> dict[str, Any]:
    """Return a peer's medians in the place of all its starts."""
    medians: dict[str, Any] = {}
    if "times" in done:
        medians["times"] = {str(size): times([start[str(size)] for start in done["times"]]) for size in sizes}
    if "memory" in done:
        medians["memory"] = {kind: spread(one[kind] for one in done["memory"]) for kind in ("shared", "private")}
    return {**done, **medians}


def times(starts: list[list[dict[str, float]]]) -> dict[str, Spread]:
    """Return the medians at one size; the first round of each start is cold."""
    warm = [one for _, *others in starts for one in others]
    return {
        **{figure: spread(one[figure] for one in warm) for figure in FIGURES},
        "put_to_memcpy": spread(one["put"] / one["memcpy"] for one in warm),
        "cold_put": spread(first["put"] for first, *_ in starts),
    }


def show(result: dict[str, Any]) -> None:
    """Print the figures for people."""
    peers = result["peers"]
    for size in result["sizes"]:
        rows = []
        for name, one in ((name, peer["times"][str(size)]) for name, peer in peers.items() if "times" in peer):
            put, cold, attach, read = (
                f"{1e6 * one[what]['median']:,.0f}" for what in ("put", "cold_put", "attach", "read")
            )
            rows.append([name, put, f"{one['put_to_memcpy']['median']:.2f}", cold, attach, read])
        print()
        report.table([f"{size / MIB:g} MiB", "put, µs", "× memcpy", "cold, µs", "attach, µs", "pages, µs"], rows)
    memory = {name: peer["memory"] for name, peer in peers.items() if "memory" in peer}
    kinds = ("shared", "private")
    rows = [[name, *(report.mib(one[kind]["median"]) for kind in kinds)] for name, one in memory.items()]
    print()
    report.table([f"{result['sizes'][-1] / MIB:g} MiB, four readers", *(f"{kind}, MiB" for kind in kinds)], rows)
    for name, peer in peers.items():
        if "reason" in peer:
            print(f"\n{name}: {peer['reason']}")


def main() -> None:
    """Read the arguments, measure, print."""
    parser = report.parser(__doc__, [peer.name for peer in PEERS])
    parser.add_argument("--envs", type=Path, default=default_folder(), help="where environments are (%(default)s)")
    asked = parser.parse_args()
    starts, rounds = (1, 2) if asked.quick else (5, 12)
    sizes = [MIB, 4 * MIB] if asked.quick else [MIB, 16 * MIB, 256 * MIB]
    asked.envs.mkdir(parents=True, exist_ok=True)
    result = report.head(asked, "numpy", sizes=sizes, starts=starts, rounds=rounds)
    peers = [peer for peer in PEERS if peer.name in asked.only]
    result["peers"] = measure(peers, asked.envs, starts, rounds, sizes)
    report.write(asked.json, result)
    show(result)


if __name__ == "__main__":
    main()
