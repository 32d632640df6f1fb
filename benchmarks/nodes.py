"""What crosses the network between nodes, how many copies each node has, and how long it takes, stock and with the plugin.

    python benchmarks/nodes.py [--quick] [--only WAY ...] [--counts 2 3] [--size "256 MiB"] [--workers 3] [--pairs 3]
                               [--copying] [--slow] [--json PATH]

Needs root: each node is a network, mount, process and host name namespace on this machine with three workers, connected
to a virtual switch (``tests/support/nodes.py``). The scheduler has a node of its own, without workers.

broadcast
    ``scatter(x, broadcast=True)`` by a client on the first node.
broadcast-from-elsewhere
    The same by a client on the scheduler's node.
fan
    A worker of the first node makes the array; all workers of all other nodes need it at once.
replicate
    A worker of the first node makes the array; ``client.replicate`` to all workers.
tasks
    A worker of the first node makes the array; forty tasks of 50 ms read it, and may run on any worker.

Copies are the blocks in use in the arena of a node, and the growth of ``RssAnon`` of its workers, in multiples of the array.
Processor time is that of all processes of all nodes; a virtual wire costs no other. ``--slow`` lets each node send 1 Gbit/s
(``tc tbf``) with a delay of 10 ms (``wires.py``, which takes a part of a processor). ``--copying`` adds an arm in which
values are received into private memory and then copied into the arena, instead of being received there.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import node_moves as moves
import psutil
import report
import wires
from dask.utils import parse_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from nodes import Driver, Node, NodeCluster, node_cluster

WAYS = ("broadcast", "broadcast-from-elsewhere", "fan", "replicate", "tasks")
RATE = "tbf", "rate", "1gbit", "burst", "256kb", "latency", "50ms"
DELAY_S = 0.01


def slow_down(cluster: NodeCluster, node: Node) -> None:
    """Let what a node sends take 10 ms more, at 1 Gbit/s at most."""
    line = sys.executable, wires.__file__, node.port, str(DELAY_S)
    wire = cluster.hub.popen(*line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert wire.stdout is not None
    if wire.stdout.readline().strip() != "up":
        raise SystemExit("cannot make a wire with a delay (needs /dev/net/tun)")
    node.enlarge_packets(wires.MTU)
    node.shape(*RATE)


def processor_time(cluster: NodeCluster) -> float:
    """Return the seconds of processor time of all processes of all nodes."""
    total = 0.0
    for pid in {pid for node in [cluster.head, *cluster.nodes.values()] for pid in node.pids()}:
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def measure(cluster: NodeCluster, driver: Driver, way: str, size: int, seed: int, arm: str) -> dict[str, Any]:
    """Run one round; return its time, and for each node the bytes that it has received and its copies."""
    driver(moves.prepare, way, size, seed)
    time.sleep(1)
    before, carried = driver(moves.private), {node.address: node.carried()[0] for node in cluster.nodes.values()}
    processor = processor_time(cluster)
    seconds = driver(moves.move, way)
    processor = processor_time(cluster) - processor
    received = {node.address: node.carried()[0] - carried[node.address] for node in cluster.nodes.values()}
    time.sleep(1)
    after, shared = driver(moves.private), driver(moves.blocks) if arm != "stock" else {}
    made = {} if way.startswith("broadcast") else {next(iter(before)): size}
    ran = {"tasks": driver(moves.ran)} if way == "tasks" else {}
    driver(moves.forget)
    time.sleep(2)
    return {
        **ran,
        "seconds": seconds,
        "processor seconds": processor,
        "received": {node: round(count / size, 2) for node, count in received.items()},
        "copies in the arena": {node: round(count / size, 2) for node, count in shared.items()},
        "private copies": {
            node: round((after[node] - before[node] + made.get(node, 0)) / size, 2) for node in received
        },
    }


def run(asked: Any, count: int) -> list[dict[str, Any]]:
    """Measure all ways in clusters of some nodes, one for each arm, in turn."""
    arms = ["stock", "copying", "plugin"] if asked.copying else ["stock", "plugin"]
    with ExitStack() as stack:
        clusters, drivers = {}, {}
        for arm in arms:
            cluster = clusters[arm] = stack.enter_context(node_cluster())
            for number in range(count):
                cluster.add("abcdefgh"[number], asked.workers, memory="4 GiB")
            for node in [cluster.head, *cluster.nodes.values()] if asked.slow else []:
                slow_down(cluster, node)
            for where, node in (("here", cluster.nodes["a"]), ("elsewhere", cluster.head)):
                drivers[arm, where] = cluster.driver(node)
                drivers[arm, where](moves.begin, arm)
        rounds = []
        for way in asked.only:
            where = "here" if way == "broadcast" else "elsewhere"
            for number in range(asked.pairs):
                for arm in arms if number % 2 else reversed(arms):
                    result = measure(clusters[arm], drivers[arm, where], way, asked.size, number, arm)
                    print(f"{count} nodes, {way}, {arm}: {result}", flush=True)
                    rounds.append({"nodes": count, "way": way, "arm": arm, **result})
        return rounds


def summary(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one line for each number of nodes, way and arm."""
    lines = []
    for group in sorted({(one["nodes"], one["way"], one["arm"]) for one in rounds}):
        same = [one for one in rounds if (one["nodes"], one["way"], one["arm"]) == group]
        line: dict[str, Any] = dict(zip(("nodes", "way", "arm"), group, strict=True))
        for name in ("seconds", "processor seconds"):
            line[name] = report.spread(one[name] for one in same)
        for name in ("received", "copies in the arena", "private copies"):
            others = [value for one in same for node, value in one[name].items() if not node.endswith(".2")]
            home = [value for one in same for node, value in one[name].items() if node.endswith(".2")]
            line[name] = {"first node": report.spread(home or [0]), "other nodes": report.spread(others or [0])}
        lines.append(line)
    return lines


def main() -> None:
    """Measure, print and write."""
    parser = report.parser(__doc__, WAYS, pairs=3)
    parser.add_argument("--size", type=parse_bytes, default=parse_bytes("256 MiB"))
    parser.add_argument("--workers", type=int, default=3, help="workers of each node (default: 3)")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 3], help="numbers of nodes (default: 1 2 3)")
    parser.add_argument("--copying", action="store_true", help="also without receiving into the arena")
    parser.add_argument("--slow", action="store_true", help="1 Gbit/s and 10 ms")
    asked = parser.parse_args()
    asked.pairs = asked.pairs or (1 if asked.quick else 3)
    if asked.quick:
        asked.size, asked.counts = min(asked.size, 32 << 20), asked.counts[:2]
    said = report.head(
        asked, "dask", "distributed", "numpy", size=asked.size, workers=asked.workers, is_slow=asked.slow
    )
    lines = summary([one for count in asked.counts for one in run(asked, count)])
    for line in lines:
        print(
            f"{line['nodes']} nodes  {line['way']:<25} {line['arm']:<7}"
            f"{line['seconds']['median']:7.2f} s  {line['processor seconds']['median']:6.2f} s of processor"
            + "".join(
                f"  {name} {line[name]['first node']['median']:.2f} / {line[name]['other nodes']['median']:.2f}"
                for name in ("received", "copies in the arena", "private copies")
            )
        )
    report.write(asked.json, {**said, "results": lines})


if __name__ == "__main__":
    main()
