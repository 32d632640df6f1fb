"""The schedule of kills, which a seed makes reproducible, and the choice and killing of victims."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
from deployments import Deployment, send
from watching import DyingProcess, segment_of

from dask_shm_plugin.linux import mutex

_FLOCK = struct.Struct("hhxxxxqqixxxx")
_HUNT_TIMEOUT_S = 1.0
_MAX_STOP_S = 5.0
_MIN_OTHER_WORKERS = 2
"""The number of workers that must be up besides the victim, so that work goes on."""
_START_GRACE_S = 10.0

KINDS = {
    "SIGKILL": 50,
    "in the lock": 15,
    "SIGSEGV": 10,
    "os._exit": 10,
    "SIGSTOP": 12,
    "everything": 2,
    "scheduler": 1,
}
ROLES = {"worker": 60, "client": 25, "nanny": 15}


class Kill(NamedTuple):
    """One entry of the schedule.

    ``gap`` is the seconds since the previous entry, ``which`` the position of the victim among the candidates (from 0
    to 1), and ``seconds`` the duration of a stop.
    """

    gap: float
    kind: str
    role: str
    which: float
    seconds: float


def schedule(seed: int, mean_gap: float) -> Iterator[Kill]:
    """Yield kills without end, the same for the same seed."""
    dice = random.Random(seed)
    while True:
        kind = dice.choices(list(KINDS), list(KINDS.values()))[0]
        role = dice.choices(list(ROLES), list(ROLES.values()))[0]
        gap = dice.expovariate(1 / mean_gap)
        yield Kill(gap, kind, role, dice.random(), dice.uniform(0.5, _MAX_STOP_S))


def choose_victim(deployment: Deployment, kill: Kill) -> tuple[str, psutil.Process | None]:
    """Choose a victim; return its role and its process, or None if no process can be spared."""
    role = kill.role
    if kill.kind == "os._exit" or (role == "nanny" and deployment.kind != "commands"):
        role = "worker"
    candidates = deployment.running(role)
    victim = candidates[int(kill.which * len(candidates))] if candidates else None
    if (
        role != "client"
        and sum(is_up(one) for one in deployment.running("worker") if one != victim) < _MIN_OTHER_WORKERS
    ):
        victim = None
    return role, victim


def is_up(process: psutil.Process) -> bool:
    """Return whether a worker has joined an arena, or has had the time to start."""
    with contextlib.suppress(psutil.Error):
        return segment_of(process) is not None or time.time() - process.create_time() > _START_GRACE_S
    return False


def kill_in_lock(deployment: Deployment, process: psutil.Process) -> tuple[psutil.Process, DyingProcess] | None:
    """Kill the process that holds the lock of another process's arena; return None if none could be caught.

    The holder is stopped first, and killed only if it then still holds the lock.
    """
    path = segment_of(process)
    allowed = {one.pid: one for role in ("worker", "nanny", "client") for one in deployment.running(role)}
    if path is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        until = time.monotonic() + _HUNT_TIMEOUT_S
        while time.monotonic() < until:
            holder = allowed.get(_lock_holder(descriptor))
            if holder is None or not send(holder, signal.SIGSTOP):
                continue
            if _is_stopped(holder) and _lock_holder(descriptor) == holder.pid:
                death = DyingProcess.observe(holder)
                send(holder, signal.SIGKILL)
                return holder, death
            send(holder, signal.SIGCONT)
    finally:
        os.close(descriptor)
    return None


def _lock_holder(descriptor: int) -> int:
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, mutex._MUTEX_BYTE, 1, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, request))
    return int(pid) if kind != fcntl.F_UNLCK else 0


def _is_stopped(process: psutil.Process) -> bool:
    """Wait for a moment until a signal has stopped all threads of a process; return whether it has."""
    for _ in range(200):
        with contextlib.suppress(psutil.Error):
            if all(_thread_state(process.pid, thread.id) == "T" for thread in process.threads()):
                return True
        time.sleep(0.001)
    return False


def _thread_state(pid: int, thread: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()[0]
    return "T"
