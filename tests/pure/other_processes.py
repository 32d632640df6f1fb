"""Other processes, real ones: they run what a test tells them, fork when told to, and can be killed.

The tests start one interpreter that has imported the package and joined nothing, and fork all others from it, which
is as good as starting them and a hundred times quicker. Run as a program, this file is such a process.
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

from dask_shm_plugin import membership, stateword
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.block import Block
from dask_shm_plugin.liveness import Mutex
from dask_shm_plugin.rendezvous import Listed, Meeting

T = TypeVar("T")

#: What each process has at hand when it runs the lines of a test.
PRELUDE = """
import gc, os, resource, signal, sys, threading, warnings
import numpy as np
from dask_shm_plugin import crashpoints, layout, liveness, membership, rendezvous, segment, syscalls, table, tidying, views
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.exceptions import *
from dask_shm_plugin.liveness import Mutex
from dask_shm_plugin.segment import Segment, Whereabouts
from dask_shm_plugin.table import Table
"""
#: What a rendezvous may say.
MEETING = Meeting(bytes(range(16)), 5, 6, (Listed(7, 8, 9), Listed(10, 11, 12)))
#: How another process joins the arena of a cluster, joins it if there is one, and leaves it.
JOIN = "arena = membership.join(cluster, 'worker', f'tcp://{os.getpid()}', capacity=lambda: 1 << 20, warm=2**20)"
LOOK = "arena = membership.join(cluster, 'worker', f'tcp://{os.getpid()}', warm=2**20)"
LEAVE = "membership.leave(cluster, 'worker', f'tcp://{os.getpid()}')"
_PATIENCE = 30
_A_MOMENT = 2
_STORES = {dis.opmap[name] for name in ("STORE_SUBSCR", "STORE_SLICE") if name in dis.opmap}
_PR_SET_CHILD_SUBREAPER = 36


def wait_until(predicate: Callable[[], T], what: str, seconds: float = 10) -> T:
    """Return the first true result of ``predicate``; fail if none comes within a generous time."""
    deadline = time.monotonic() + seconds
    while not (result := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s in vain until {what}")
        time.sleep(0.002)
    return result


def enter(mutex: Mutex) -> None:
    """Enter a mutex and stay there, which nobody does but a test."""
    mutex.among_threads.acquire()
    mutex._lock_file()


def leave(mutex: Mutex) -> None:
    """Undo :func:`enter`."""
    mutex._unlock_file()
    mutex.among_threads.release()


def publish(arena: Arena, data: bytes) -> Block:
    """Put bytes into a block."""
    with arena.draft(len(data)) as draft:
        draft.write(0, memoryview(data))
        return draft.seal()


def join(cluster: str, kind: str = "nanny", address: str = "tcp://here") -> Arena:
    """Join with this process, and make the arena if there is none."""
    arena = membership.join(cluster, kind, address, capacity=lambda: 1 << 20, warm=2**20)
    assert arena is not None
    return arena


def attended(other: Process, name: str) -> None:
    """Let another process be present at a rendezvous that says something."""
    other("meeting = rendezvous.enter(name, create=True)", name=name)
    other("meeting.write(said); meeting.attend(); meeting.unlock()", said=MEETING)


def reservations(arena: Arena) -> int:
    """Count how often a block of it was ever reserved."""
    return int(np.sum(stateword.generations(arena._access.table.blocks.deciding_words())))


def wait_until_empty(arena: Arena) -> None:
    """Wait until the tidying thread has given everything back."""
    wait_until(lambda: arena.stats().used == 0, "the arena is empty")


def watcher(fate: Callable[[], Any], before: int) -> Callable[..., Any]:
    """Return a trace function that does something terrible right before a store into memory, counted from 0, in the package.

    What a process may be killed between is its stores; so this meets every moment that others can tell apart.
    """
    stores = itertools.count()

    def watch(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_globals.get("__name__", "").startswith("dask_shm_plugin."):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_code.co_code[frame.f_lasti] in _STORES and next(stores) == before:
            fate()
        return watch

    return watch


def is_running(pid: int) -> bool:
    """Tell whether there is a process of that number, dead ones that nobody has waited for included."""
    return os.path.exists(f"/proc/{pid}")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class Process:
    """Another process.

    Calling it runs lines of Python there: an expression's value comes back, and so does an exception. Arguments become
    variables. ``begin`` and ``end`` are the two halves of a call.
    """

    def __init__(self, meet: socket.socket, connection: Connection, pid: int, path: str) -> None:
        self._meet, self._connection, self.pid, self._path = meet, connection, pid, path
        # The number of a process that has been buried may be somebody else's.
        self._handle = os.pidfd_open(pid)
        self.forked: list[Process] = []

    @classmethod
    def start(cls, folder: Path, *prefix: str) -> Process:
        """Start a new interpreter, with another command in front of it if one is given."""
        path = str(folder / "meet")
        meet = socket.socket(socket.AF_UNIX)
        meet.bind(path)
        meet.listen(64)
        meet.settimeout(_PATIENCE)
        popen = subprocess.Popen([*prefix, sys.executable, __file__, path])
        process = cls(meet, *_accept(meet), path)
        assert process.pid == popen.pid
        process._popen = popen
        return process

    _popen: subprocess.Popen[bytes] | None = None

    def fork(self) -> Process:
        """Fork it, and return the child, which knows all that its parent knew."""
        self.begin("fork")
        child = Process(self._meet, *_accept(self._meet), self._path)
        assert self.end() == child.pid
        self.forked.append(child)
        return child

    def adopted(self) -> Process:
        """Return the child that it has forked of itself, by ``fork_and_die``."""
        child = Process(self._meet, *_accept(self._meet), self._path)
        self.forked.append(child)
        return child

    def __call__(self, lines: str, **values: Any) -> Any:
        """Run some lines, and return what came of them."""
        self.begin(lines, **values)
        return self.end()

    def begin(self, lines: str, **values: Any) -> None:
        """Let it run some lines."""
        self._connection.send((textwrap.dedent(lines).strip(), values))

    def end(self) -> Any:
        """Wait for what it was told to run, and return or raise what came of it."""
        assert self._connection.poll(_PATIENCE), "the other process does not answer"
        is_good, result = self._connection.recv()
        if not is_good:
            raise result
        return result

    def is_killed(self) -> bool:
        """Wait until what it was told to run is done; tell whether the process has died of it."""
        try:
            self.end()
        except (EOFError, ConnectionResetError):
            return True
        # Another thread of it may be about to die, and forks before.
        return bool(select.select([self._handle], [], [], _A_MOMENT)[0])

    def kill(self) -> None:
        """Kill it with SIGKILL and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)
        self.is_gone()

    def stop(self) -> None:
        """Stop it, and wait until it stands still."""
        signal.pidfd_send_signal(self._handle, signal.SIGSTOP)
        wait_until(lambda: _state(self.pid) == "T", f"process {self.pid} stands still", _PATIENCE)

    def is_stopped(self) -> bool:
        """Wait until it stands still, or what it was told to run is done; tell whether it stands still."""
        wait_until(lambda: _state(self.pid) == "T" or self._connection.poll(), "it stops or answers", _PATIENCE)
        # It may be another thread that stops it, a little later.
        until = time.monotonic() + _A_MOMENT
        while _state(self.pid) != "T" and time.monotonic() < until:
            time.sleep(0.01)
        return _state(self.pid) == "T"

    def go_on(self) -> None:
        """Let it go on after a stop."""
        signal.pidfd_send_signal(self._handle, signal.SIGCONT)

    def leave(self) -> None:
        """Let it end as a program does that has nothing more to do, and wait until it is gone."""
        self._connection.close()
        self.is_gone()

    def is_gone(self) -> None:
        """Wait until it is gone, for whatever reason."""
        if self._popen is not None:
            self._popen.wait(_PATIENCE)
        wait_until(lambda: not is_running(self.pid), f"process {self.pid} is gone", _PATIENCE)

    def kill_all(self) -> None:
        """Kill it, and all that were forked from it."""
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
    # The forked ones, and what these have forked, are buried at once: a dead one that is not would be found in /proc.
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
    _answer(path, _connect(path), names)


def _fork_and_die(path: str, names: dict[str, Any]) -> None:
    """Let a forked child of this process outlive it, wherever it is: the child does as it is told, and then ends."""
    if os.fork():
        os.kill(os.getpid(), signal.SIGKILL)
    names["_connection"].close()
    try:
        _answer(path, _connect(path), names)
    finally:
        os._exit(0)


def _answer(path: str, connection: Connection, names: dict[str, Any]) -> None:
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
            answer = True, _run(lines, names)
        except BaseException as error:
            answer = False, error.with_traceback(None)
        try:
            connection.send(answer)
        except Exception as error:
            connection.send((False, TypeError(f"the answer cannot be sent: {error}")))


def _run(lines: str, names: dict[str, Any]) -> Any:
    try:
        code = compile(lines, "<test>", "eval")
    except SyntaxError:
        exec(compile(lines, "<test>", "exec"), names)
        return None
    return eval(code, names)


if __name__ == "__main__":
    _serve(sys.argv[1])
