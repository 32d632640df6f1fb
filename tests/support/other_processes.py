"""Other processes for the tests: they run lines of Python, fork on request, and can be killed.

The tests start one interpreter, which imports the package and joins no arena. All other processes are forked from it,
which is as good as starting them, and a hundred times quicker. Run as a program, this file is such a process.
"""

from __future__ import annotations

import contextlib
import ctypes
import dis
import itertools
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.block import Block
from dask_shm_plugin.linux.mutex import Mutex
from dask_shm_plugin.node import membership
from dask_shm_plugin.node.rendezvous import Listed, Meeting
from dask_shm_plugin.table import state_word

T = TypeVar("T")

#: The names that the lines of a test can use in each process.
PRELUDE = """
import gc, os, resource, signal, sys, threading, warnings
import numpy as np
from dask_shm_plugin import crashpoints
from dask_shm_plugin.arena import housekeeping
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import *
from dask_shm_plugin.linux import locks, pagemap, processes, segment, syscalls
from dask_shm_plugin.linux.mutex import Mutex
from dask_shm_plugin.linux.segment import Segment, Whereabouts
from dask_shm_plugin.mapping.atlas import ATLAS
from dask_shm_plugin.mapping.exporter import AtEnd, Exporter
from dask_shm_plugin.node import membership, rendezvous
from dask_shm_plugin.table import layout
from dask_shm_plugin.table.layout import BlockId, Extent
from dask_shm_plugin.table.table import Table
"""
#: Example content of a rendezvous.
MEETING = Meeting(bytes(range(16)), 5, 6, (Listed(7, 8, 9), Listed(10, 11, 12)))
#: Lines with which another process joins or creates the arena of a cluster, joins it only if it exists, and leaves it.
JOIN = "arena = membership.join(cluster, 'worker', f'tcp://{os.getpid()}', capacity=lambda: 1 << 20, warm=2**20)"
LOOK = "arena = membership.join(cluster, 'worker', f'tcp://{os.getpid()}', warm=2**20)"
LEAVE = "membership.leave(cluster, 'worker', f'tcp://{os.getpid()}')"
_TIMEOUT_S = 30
_GRACE_S = 2
_STORE_OPCODES = {dis.opmap[name] for name in ("STORE_SUBSCR", "STORE_SLICE") if name in dis.opmap}
_PR_SET_CHILD_SUBREAPER = 36


def wait_until(predicate: Callable[[], T], what: str, seconds: float = 10) -> T:
    """Return the first true result of ``predicate``; fail if there is none within a generous time."""
    deadline = time.monotonic() + seconds
    while not (result := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out after {seconds} s: {what}")
        time.sleep(0.002)
    return result


def enter(mutex: Mutex) -> None:
    """Acquire a mutex and keep it. Only tests do so."""
    mutex.among_threads.acquire()
    mutex._lock_file()


def leave(mutex: Mutex) -> None:
    """Release a mutex that was acquired by :func:`enter`."""
    mutex._unlock_file()
    mutex.among_threads.release()


def publish(arena: Arena, data: bytes) -> Block:
    """Write bytes into a new block."""
    with arena.draft(len(data)) as draft:
        draft.write(0, memoryview(data))
        return draft.seal()


def join(cluster: str, kind: str = "nanny", address: str = "tcp://here") -> Arena:
    """Join the arena of a cluster with this process; create the arena if there is none."""
    arena = membership.join(cluster, kind, address, capacity=lambda: 1 << 20, warm=2**20)
    assert arena is not None
    return arena


def attended(other: Process, name: str) -> None:
    """Let another process attend a rendezvous that has the content `MEETING`."""
    other("meeting = rendezvous.enter(name, create=True)", name=name)
    other("meeting.write(said); meeting.attend(); meeting.unlock()", said=MEETING)


def reservations(arena: Arena) -> int:
    """Return how often blocks of an arena have been reserved so far."""
    return int(np.sum(state_word.generations(arena._access.table.blocks.deciding_words())))


def wait_until_empty(arena: Arena) -> None:
    """Wait until the housekeeping thread has released all blocks."""
    wait_until(lambda: arena.stats().used == 0, "the arena is empty")


def watcher(fate: Callable[[], Any], before: int) -> Callable[..., Any]:
    """Return a trace function that calls ``fate`` right before a store into memory in the package, counted from 0.

    Other processes can only tell apart moments that have a store between them. So this covers every moment of a death.
    """
    stores = itertools.count()

    def watch(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_globals.get("__name__", "").startswith("dask_shm_plugin."):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_code.co_code[frame.f_lasti] in _STORE_OPCODES and next(stores) == before:
            fate()
        return watch

    return watch


def is_running(pid: int) -> bool:
    """Return whether a process with this id exists. A dead process exists until its parent has waited for it."""
    return os.path.exists(f"/proc/{pid}")


def _process_state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class Process:
    """Another process.

    A call runs lines of Python there. It returns the value of an expression, and raises an exception of the lines.
    Keyword arguments become variables. ``begin`` and ``end`` are the two halves of a call.
    """

    def __init__(self, meet: socket.socket, connection: Connection, pid: int, path: str) -> None:
        self._meet, self._connection, self.pid, self._path = meet, connection, pid, path
        # When a dead process has been waited for, another process may get its id. This descriptor stays unique.
        self._handle = os.pidfd_open(pid)
        self.forked: list[Process] = []

    @classmethod
    def start(cls, folder: Path, *prefix: str) -> Process:
        """Start a new interpreter. ``prefix`` is a command that runs it, if one is needed."""
        path = str(folder / "meet")
        meet = socket.socket(socket.AF_UNIX)
        meet.bind(path)
        meet.listen(64)
        meet.settimeout(_TIMEOUT_S)
        popen = subprocess.Popen([*prefix, sys.executable, __file__, path])
        process = cls(meet, *_accept(meet), path)
        assert process.pid == popen.pid
        process._popen = popen
        return process

    _popen: subprocess.Popen[bytes] | None = None

    def fork(self) -> Process:
        """Fork the process, and return the child, which has the variables of its parent."""
        self.begin("fork")
        child = Process(self._meet, *_accept(self._meet), self._path)
        assert self.end() == child.pid
        self.forked.append(child)
        return child

    def adopted(self) -> Process:
        """Return the child that the process has forked by ``fork_and_die``."""
        child = Process(self._meet, *_accept(self._meet), self._path)
        self.forked.append(child)
        return child

    def __call__(self, lines: str, **values: Any) -> Any:
        """Run some lines, and return or raise their result."""
        self.begin(lines, **values)
        return self.end()

    def begin(self, lines: str, **values: Any) -> None:
        """Start to run some lines."""
        self._connection.send((textwrap.dedent(lines).strip(), values))

    def end(self) -> Any:
        """Wait for the lines that `begin` has started, and return or raise their result."""
        assert self._connection.poll(_TIMEOUT_S), "the other process does not answer"
        is_good, result = self._connection.recv()
        if not is_good:
            raise result
        return result

    def is_killed(self) -> bool:
        """Wait until the lines that `begin` has started have ended; return whether the process has died of them."""
        try:
            self.end()
        except (EOFError, ConnectionResetError):
            return True
        # Another thread may be about to kill the process, and forks first.
        return bool(select.select([self._handle], [], [], _GRACE_S)[0])

    def kill(self) -> None:
        """Kill the process with SIGKILL, and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)
        self.wait_until_gone()

    def stop(self) -> None:
        """Stop the process with SIGSTOP, and wait until it has stopped."""
        signal.pidfd_send_signal(self._handle, signal.SIGSTOP)
        wait_until(lambda: _process_state(self.pid) == "T", f"process {self.pid} has stopped", _TIMEOUT_S)

    def is_stopped(self) -> bool:
        """Wait until the process has stopped or its lines have ended; return whether it has stopped."""
        wait_until(
            lambda: _process_state(self.pid) == "T" or self._connection.poll(), "it stops or answers", _TIMEOUT_S
        )
        # Another thread may stop the process, a little later.
        until = time.monotonic() + _GRACE_S
        while _process_state(self.pid) != "T" and time.monotonic() < until:
            time.sleep(0.01)
        return _process_state(self.pid) == "T"

    def go_on(self) -> None:
        """Continue the process after a stop."""
        signal.pidfd_send_signal(self._handle, signal.SIGCONT)

    def leave(self) -> None:
        """Let the process end normally, and wait until it is gone."""
        self._connection.close()
        self.wait_until_gone()

    def wait_until_gone(self) -> None:
        """Wait until the process is gone, for any reason."""
        if self._popen is not None:
            self._popen.wait(_TIMEOUT_S)
        wait_until(lambda: not is_running(self.pid), f"process {self.pid} is gone", _TIMEOUT_S)

    def kill_all(self) -> None:
        """Kill the process, and all processes that were forked from it."""
        for child in self.forked:
            child.kill_all()
        self.kill()
        self._connection.close()
        os.close(self._handle)
        if self._popen is not None:
            self._meet.close()


def _accept(meet: socket.socket) -> tuple[Connection, int]:
    accepted = Connection(meet.accept()[0].detach())
    return accepted, accepted.recv()


def _connect(path: str) -> Connection:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    connection = Connection(sock.detach())
    connection.send(os.getpid())
    return connection


def _serve(path: str) -> None:
    # The kernel removes dead children, and dead children of theirs, at once. Otherwise they would stay in /proc.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    names: dict[str, Any] = {
        "__name__": "__other__",
        "publish": publish,
        "watcher": watcher,
        "enter": enter,
        "leave": leave,
    }
    exec(PRELUDE, names)
    names["fork_and_die"] = lambda: _fork_and_die(path, names)
    _answer_requests(path, _connect(path), names)


def _fork_and_die(path: str, names: dict[str, Any]) -> None:
    """Fork a child, and kill this process at once. The child answers requests until its connection closes."""
    if os.fork():
        os.kill(os.getpid(), signal.SIGKILL)
    names["_connection"].close()
    try:
        _answer_requests(path, _connect(path), names)
    finally:
        os._exit(0)


def _answer_requests(path: str, connection: Connection, names: dict[str, Any]) -> None:
    while True:
        names["_connection"] = connection
        try:
            lines, values = connection.recv()
        except EOFError:
            return
        if lines == "fork":
            if child := os.fork():
                connection.send((True, child))
            else:
                connection.close()
                connection = _connect(path)
            continue
        names.update(values)
        try:
            answer = True, _run_lines(lines, names)
        except BaseException as error:
            answer = False, error.with_traceback(None)
        try:
            connection.send(answer)
        except Exception as error:
            connection.send((False, TypeError(f"the answer cannot be sent: {error}")))


def _run_lines(lines: str, names: dict[str, Any]) -> Any:
    try:
        code = compile(lines, "<test>", "eval")
    except SyntaxError:
        exec(compile(lines, "<test>", "exec"), names)
        return None
    return eval(code, names)


if __name__ == "__main__":
    _serve(sys.argv[1])
