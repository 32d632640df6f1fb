"""Ways to give a value to another process on the same machine, side by side: this package's arena and its peers.

    python benchmarks/peers [--quick] [--envs FOLDER] [--only NAME ...] [--json PATH]

One process puts an array of random float64 numbers, another one attaches it; no Dask, but where it says so. Each peer has
an environment of its own, which this makes with pip and keeps in FOLDER. What cannot be installed or does not run stays in
the table, with the reason.

put
    Until the value can be attached. *Cold* is the first one of a size in a store just started, which has held only smaller
    ones; *warm* are the others, each after the one before has been deleted. Beside each, in the same process and next to
    it in time, stands a plain copy of the same bytes into memory that exists; "× memcpy" is the median of the ratios.
attach
    Until the other process has an array of it, which it has not read; then, by itself, the time to read one element of
    every page. The first of each start is left out.
memory
    What ``Shmem`` of the machine has grown by since before the store was started, and the ``RssAnon`` of all processes
    (writer, readers, servers) since before the put, when one value is attached and read by four readers.

"Dask, TCP" and "Dask, UCX" are no stores: there, put is a scatter straight to one worker, and attach is a task on another
worker that fetches the value and reads one element. UCX is used as it installs from PyPI, on a machine with or without
GPUs.

All peers are started several times in turn. Other programs that use shared memory or the processors spoil the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
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

MIB = 1 << 20
PATIENCE = 120
MODES = ("times", "memory")
FIGURES = ("memcpy", "put", "attach", "read", "own_read")


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
    command = [python, str(HERE / "driver.py"), peer.module, mode, folder, shm, output, rounds, *sizes]
    environ = {**os.environ, "PYTHONPATH": str(HERE.parent), "PEERS_PROTOCOL": peer.protocol}
    try:
        with log.open("wb") as stream:
            process = subprocess.Popen(list(map(str, command)), stdout=stream, stderr=subprocess.STDOUT, env=environ)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                for pid in machine.family(process.pid):
                    os.kill(pid, signal.SIGKILL)
                process.wait()
                raise NotThere(f"did not end within {PATIENCE} s") from None
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
    results: dict[str, Any] = {peer.name: {"requirements": peer.requirements} for peer in peers}
    for number in range(starts):
        for mode in MODES:
            for peer in peers:
                result = results[peer.name]
                if "reason" in result:
                    continue
                begin = time.monotonic()
                try:
                    one = run(peer, python_of(peer, envs), mode, rounds, sizes)
                    result.setdefault(mode, []).append(one)
                except NotThere as reason:
                    result["reason"] = str(reason)
                seconds = time.monotonic() - begin
                print(f"{number + 1} of {starts}, {mode}: {peer.name} took {seconds:.0f} s", file=sys.stderr)
    return results


def medians(starts: list[dict[str, Any]], size: int) -> dict[str, float]:
    """Return the medians of a peer at a size."""
    colds = [start[str(size)][0] for start in starts]
    warms = [one for start in starts for one in start[str(size)][1:]]
    return {
        **{figure: statistics.median(one[figure] for one in warms) for figure in FIGURES},
        "put_to_memcpy": statistics.median(one["put"] / one["memcpy"] for one in warms),
        "cold_put": statistics.median(one["put"] for one in colds),
        "cold_put_to_memcpy": statistics.median(one["put"] / one["memcpy"] for one in colds),
    }


def show(result: dict[str, Any]) -> None:
    """Print the figures for people."""
    around = result["surroundings"]
    print(
        f"{result['starts']} starts of each in turn, {result['rounds']} warm rounds each, medians; Python {around['python']}, "
        f"Linux {around['linux']}, {around['processors']} processors, {around['memory'] / 2**30:.1f} GiB, {around['date']}"
    )
    for size in result["sizes"]:
        print(f"\n{size / MIB:g} MiB", end="")
        print(f"{'put, µs':>20}{'× memcpy':>10}{'cold, µs':>12}{'× memcpy':>10}{'attach, µs':>12}{'pages, µs':>11}")
        for name, peer in result["peers"].items():
            if str(size) not in peer.get("medians", {}):
                continue
            m = peer["medians"][str(size)]
            print(f"{name:<14}{m['put'] * 1e6:>12,.0f}{m['put_to_memcpy']:>10.2f}", end="")
            print(f"{m['cold_put'] * 1e6:>12,.0f}{m['cold_put_to_memcpy']:>10.2f}", end="")
            print(f"{m['attach'] * 1e6:>12,.0f}{m['read'] * 1e6:>11,.0f}")
        copies = [peer["medians"][str(size)] for peer in result["peers"].values() if "medians" in peer]
        if copies:
            print(f"{'memcpy':<14}{statistics.median(m['memcpy'] for m in copies) * 1e6:>12,.0f}{1:>10.2f}", end="")
            print(f"{'':>34}{statistics.median(m['own_read'] for m in copies) * 1e6:>11,.0f}")
    print(f"\n{result['sizes'][-1] / MIB:g} MiB, four readers{'Shmem, MiB':>16}{'private, MiB':>14}")
    for name, peer in result["peers"].items():
        if "memory" in peer:
            shared, private = (statistics.median(one[key] for one in peer["memory"]) for key in ("shared", "private"))
            print(f"{name:<22}{shared / MIB:>16.0f}{private / MIB:>14.0f}")
    for name, peer in result["peers"].items():
        if "reason" in peer:
            print(f"\n{name}: {peer['reason']}")


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [peer.name for peer in PEERS]
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: only to see that it works")
    parser.add_argument("--envs", type=Path, default=default_folder(), help="where environments are (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of them (default: all)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all rounds there")
    asked = parser.parse_args()
    starts, rounds = (1, 2) if asked.quick else (5, 12)
    sizes = [MIB, 4 * MIB] if asked.quick else [MIB, 16 * MIB, 256 * MIB]
    peers = [peer for peer in PEERS if peer.name in asked.only]
    asked.envs.mkdir(parents=True, exist_ok=True)
    results = measure(peers, asked.envs, starts, rounds, sizes)
    for peer in results.values():
        if "times" in peer:
            peer["medians"] = {str(size): medians(peer["times"], size) for size in sizes}
    result = {
        "surroundings": machine.surroundings("numpy"),
        "sizes": sizes,
        "starts": starts,
        "rounds": rounds,
        "peers": results,
    }
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    main()
