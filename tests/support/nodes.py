"""Several nodes on this machine: namespaces of network, mounts, processes and host name, joined by a virtual switch.

Addresses and interfaces are visible inside of these namespaces only. Each node ends when the pipe to its first process
closes, so nothing is left even if the tests are killed: the kernel ends all processes of a node with its first one.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import cloudpickle
import psutil
from distributed import Client
from processes import dask, environment

_SCHEDULER_PORT = 8786
_WORKERS_TIMEOUT_S = 60
_FIRST_PROCESS = """
set -e
mount -t tmpfs -o size={shm} tmpfs /dev/shm
hostname {name}
ip link set lo up
echo up
exec cat
"""


class Namespaces:
    """A first process in namespaces of its own, which lives until :meth:`close`, or until this process ends."""

    def __init__(self, name: str, shm: str = "2g") -> None:
        script = _FIRST_PROCESS.format(shm=shm, name=name)
        flags = ["--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        self._process = subprocess.Popen(
            ["unshare", *flags, "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "up":
            raise PermissionError(self._process.communicate()[1].strip())
        (first,) = psutil.Process(self._process.pid).children()
        self.pid = first.pid

    def run(self, *line: str) -> str:
        """Run a command in the namespaces and return its output."""
        done = subprocess.run(self.inside(line), capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def inside(self, line: Sequence[str]) -> list[str]:
        """Return the command line that runs a command in the namespaces."""
        return ["nsenter", "--target", str(self.pid), "--net", "--mount", "--pid", "--uts", "--ipc", "--", *line]

    def close(self) -> None:
        """End all processes of the namespaces."""
        with suppress(BrokenPipeError):
            self._process.communicate()


@functools.cache
def why_no_nodes() -> str:
    """Return the reason why this machine does not permit nodes, or an empty string.

    With ``DASK_SHM_TEST_NODES=required``, as in ``.ci/run`` as root, a reason is an error.
    """
    reason = _why_no_nodes()
    if reason and os.environ.get("DASK_SHM_TEST_NODES") == "required":
        raise RuntimeError(f"tests of several nodes are required, and {reason}")
    return reason


def _why_no_nodes() -> str:
    missing = [name for name in ("ip", "unshare", "nsenter") if not shutil.which(name)]
    if missing:
        return f"needs {', '.join(missing)} (packages iproute2 and util-linux)"
    try:
        with switch() as hub:
            hub.add("probe")
    except (PermissionError, AssertionError, OSError) as error:
        return f"namespaces are not permitted here: {error}"
    return ""


class Node:
    """One node at a switch.

    Attributes
    ----------
    address
        Its address, which only the nodes of the same switch can reach.
    port
        The interface of the switch to which it is connected.
    """

    def __init__(self, spaces: Namespaces, name: str, address: str, port: str) -> None:
        self._spaces, self.name, self.address, self.port = spaces, name, address, port
        self._logs: list[tuple[str, Path]] = []

    def popen(self, *line: str, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
        """Start a command on the node; it ends with the node."""
        return subprocess.Popen(
            self._spaces.inside(line),
            **{"stdin": subprocess.DEVNULL, "cwd": "/", "text": True, "env": dict(env or environment())} | options,
        )

    def carried(self) -> tuple[int, int]:
        """Return the bytes that the node has received and sent so far."""
        for line in Path(f"/proc/{self._spaces.pid}/net/dev").read_text().splitlines():
            if line.strip().startswith("eth0:"):
                fields = line.split(":")[1].split()
                return int(fields[0]), int(fields[8])
        raise AssertionError("the node has no interface")

    def shape(self, *discipline: str) -> None:
        """Let ``tc`` slow down what the node sends."""
        self._spaces.run("tc", "qdisc", "add", "dev", "eth0", "root", *discipline)

    def enlarge_packets(self, size: int) -> None:
        """Let the node send packets of ``size`` bytes."""
        self._spaces.run("ip", "link", "set", "eth0", "mtu", str(size))

    def arena_bytes(self) -> int:
        """Return the bytes of memory behind the arenas of the node."""
        sizes = {}
        for pid in self.pids():
            with suppress(OSError):
                for fd in Path(f"/proc/{pid}/fd").iterdir():
                    with suppress(OSError):
                        if re.search("/dev/shm/dask-shm|/memfd:dask-shm", os.readlink(fd)):
                            status = fd.stat()
                            sizes[status.st_dev, status.st_ino] = 512 * status.st_blocks
        return sum(sizes.values())

    def pids(self) -> list[int]:
        """Return the processes of the node, by their ids on this machine."""
        own = os.readlink(f"/proc/{self._spaces.pid}/ns/pid")
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.readlink(process / "ns/pid") == own:
                    found.append(int(process.name))
        return found


class Switch:
    """A virtual switch, and the nodes that are connected to it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._spaces = self._new("switch")
        self._spaces.run("ip", "link", "add", "br0", "type", "bridge")
        self._spaces.run("ip", "link", "set", "br0", "up")
        self._count = 0

    def add(self, name: str, shm: str = "2g") -> Node:
        """Connect another node."""
        self._count += 1
        spaces, port, address = self._new(name, shm), f"port{self._count}", f"10.77.0.{self._count}"
        line = f"link add {port} type veth peer name eth0 netns"
        # Only the network is entered: the process ids of the switch's own namespace would mean others.
        enter = ["nsenter", "--target", str(self._spaces.pid), "--net", "--"]
        subprocess.run([*enter, "ip", *line.split(), str(spaces.pid)], check=True, capture_output=True)
        self._spaces.run("ip", "link", "set", port, "master", "br0", "up")
        spaces.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        spaces.run("ip", "link", "set", "eth0", "up")
        return Node(spaces, name, address, port)

    def popen(self, *line: str, **options: Any) -> subprocess.Popen[str]:
        """Start a command in the namespaces of the switch; it ends with the switch."""
        return subprocess.Popen(self._spaces.inside(line), text=True, **options)

    def _new(self, name: str, shm: str = "2g") -> Namespaces:
        spaces = Namespaces(name, shm)
        self._stack.callback(spaces.close)
        return spaces


@contextmanager
def switch() -> Iterator[Switch]:
    """Run a switch; its nodes and all their processes end with the block."""
    with ExitStack() as stack:
        yield Switch(stack)


class Driver:
    """A process with a client on a node. A call runs a function there, with the client as its first argument."""

    def __init__(self, node: Node, scheduler: str, env: Mapping[str, str]) -> None:
        ours, theirs = os.pipe(), os.pipe()
        self._process = node.popen(
            sys.executable, __file__, scheduler, str(ours[0]), str(theirs[1]), env=env, pass_fds=(ours[0], theirs[1])
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._to, self._from = Connection(ours[1], readable=False), Connection(theirs[0], writable=False)

    def begin(self, function: Callable[..., Any], *args: Any) -> None:
        """Begin a call."""
        self._to.send_bytes(cloudpickle.dumps((function, args)))

    def result(self) -> Any:
        """Return the result of the call that was begun, or raise its error."""
        has_failed, result = cloudpickle.loads(self._from.recv_bytes())
        if has_failed:
            raise result
        return result

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function and return its result."""
        self.begin(function, *args)
        return self.result()

    def kill(self) -> None:
        """Kill the process of the client (and that which has entered the namespaces for it)."""
        for child in psutil.Process(self._process.pid).children(recursive=True):
            child.kill()
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the process."""
        self._to.close()
        self._from.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)


class NodeCluster:
    """A scheduler on a node of its own, and other nodes with workers.

    Attributes
    ----------
    head
        The node of the scheduler. It has no worker and no arena.
    nodes
        The nodes with workers, by name.
    """

    def __init__(self, stack: ExitStack, env: Mapping[str, str] | None = None) -> None:
        self._stack = stack
        self._env = environment({"DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD": "forkserver"} | dict(env or {}))
        self.hub = stack.enter_context(switch())
        self.head = self.hub.add("head")
        self.scheduler = f"tcp://{self.head.address}:{_SCHEDULER_PORT}"
        self.nodes: dict[str, Node] = {}
        self._workers = 0
        arguments = "--host", self.head.address, "--port", str(_SCHEDULER_PORT), "--no-dashboard"
        self._run(self.head, *dask("scheduler", *arguments))

    def add(self, name: str, count: int = 3, *, shm: str = "2g", memory: str = "2 GiB") -> Node:
        """Add a node with workers."""
        node = self.nodes[name] = self.hub.add(name, shm)
        self._workers += count
        directory = self._stack.enter_context(_temporary_directory())
        line = dask("worker", self.scheduler, "--host", node.address, "--nworkers", str(count), "--nthreads", "1")
        self._run(node, *line, "--no-dashboard", "--memory-limit", memory, "--local-directory", directory)
        return node

    def driver(self, node: Node) -> Driver:
        """Start a process with a client on a node, and wait until all workers have come."""
        driver = Driver(node, self.scheduler, self._env)
        self._stack.callback(driver.close)
        driver(_wait_for_workers, self._workers)
        return driver

    def _run(self, node: Node, *line: str) -> None:
        log: IO[str] = self._stack.enter_context(_temporary_log(f"{node.name}: {line[3]}"))
        node.popen(*line, env=self._env, stdout=log, stderr=log)


def _wait_for_workers(client: Client, count: int) -> None:
    client.wait_for_workers(count, timeout=_WORKERS_TIMEOUT_S)
    client.amm.stop()


@contextmanager
def _temporary_directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        yield directory


@contextmanager
def _temporary_log(title: str) -> Iterator[IO[str]]:
    with tempfile.TemporaryFile("w+") as log:
        yield log
        log.seek(0)
        print(f"--- {title} printed:\n{log.read()}")


@contextmanager
def node_cluster(env: Mapping[str, str] | None = None) -> Iterator[NodeCluster]:
    """Run a scheduler on a node of its own, without workers."""
    with ExitStack() as stack:
        yield NodeCluster(stack, env)


def _drive() -> None:
    scheduler, read, write = sys.argv[1:]
    requests, answers = Connection(int(read), writable=False), Connection(int(write), readable=False)
    with Client(scheduler, timeout=_WORKERS_TIMEOUT_S) as client:
        while True:
            try:
                function, args = cloudpickle.loads(requests.recv_bytes())
            except EOFError:
                break
            try:
                answer = False, function(client, *args)
            except Exception as error:
                answer = True, error
            answers.send_bytes(cloudpickle.dumps(answer))
    os._exit(0)


if __name__ == "__main__":
    _drive()
