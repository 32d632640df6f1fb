"""Who is killed when, and how: a schedule that a seed makes reproducible, and the doing of it."""

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
from watching import Death, segment_of

from dask_shm_plugin import liveness

_FLOCK = struct.Struct("hhxxxxqqixxxx")
_HUNT = 1.0
_LONGEST_STOP = 5.0
_GO_ON = 2
"""Workers that must be up besides the victim: work shall go on."""
_STARTING = 10.0

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
    """What is to happen, and how long after the one before; which of the processes in question, and for how long."""

    gap: float
    kind: str
    role: str
    which: float
    seconds: float


def schedule(seed: int, mean_gap: float) -> Iterator[Kill]:
    """Yield kills for ever, the same for the same seed."""
    dice = random.Random(seed)
    while True:
        kind = dice.choices(list(KINDS), list(KINDS.values()))[0]
        role = dice.choices(list(ROLES), list(ROLES.values()))[0]
        gap = dice.expovariate(1 / mean_gap)
        yield Kill(gap, kind, role, dice.random(), dice.uniform(0.5, _LONGEST_STOP))


def choose(deployment: Deployment, kill: Kill) -> tuple[str, psutil.Process | None]:
    """Choose a victim; return its role and process, or None when there is nobody to spare."""
    role = kill.role
    if kill.kind == "os._exit" or (role == "nanny" and deployment.kind != "commands"):
        role = "worker"
    candidates = deployment.victims(role)
    victim = candidates[int(kill.which * len(candidates))] if candidates else None
    if role != "client" and sum(is_up(one) for one in deployment.victims("worker") if one != victim) < _GO_ON:
        victim = None
    return role, victim


def is_up(process: psutil.Process) -> bool:
    """Tell whether a worker has joined an arena, or has had the time to start."""
    with contextlib.suppress(psutil.Error):
        return segment_of(process) is not None or time.time() - process.create_time() > _STARTING
    return False


def kill_in_lock(deployment: Deployment, process: psutil.Process) -> tuple[psutil.Process, Death] | None:
    """Kill whoever is at work on the table of a process's arena; return None when nobody could be caught.

    The process is stopped first, and killed only if it then still has the lock.
    """
    path = segment_of(process)
    allowed = {one.pid: one for role in ("worker", "nanny", "client") for one in deployment.victims(role)}
    if path is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        until = time.monotonic() + _HUNT
        while time.monotonic() < until:
            holder = allowed.get(_holder(descriptor))
            if holder is None or not send(holder, signal.SIGSTOP):
                continue
            if _is_stopped(holder) and _holder(descriptor) == holder.pid:
                death = Death.of(holder)
                send(holder, signal.SIGKILL)
                return holder, death
            send(holder, signal.SIGCONT)
    finally:
        os.close(descriptor)
    return None


def _holder(descriptor: int) -> int:
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, liveness._MUTEX_BYTE, 1, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, request))
    return int(pid) if kind != fcntl.F_UNLCK else 0


def _is_stopped(process: psutil.Process) -> bool:
    """Wait for a moment until a signal has stopped all threads of a process."""
    for _ in range(200):
        with contextlib.suppress(psutil.Error):
            if all(_state(process.pid, thread.id) == "T" for thread in process.threads()):
                return True
        time.sleep(0.001)
    return False


def _state(pid: int, thread: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()[0]
    return "T"
