"""The ways to run a cluster that matter, as real processes; those that are killed are replaced."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import tasks

HERE = Path(__file__).parent
_MEMORY_LIMIT = "512 MiB"
_START = 90.0
_END = 60.0
_CLIENTS = 3


class Settings(NamedTuple):
    """How the clusters of a run are set up."""

    folder: Path
    has_plugin: bool
    patience: float


class Own:
    """A process that was started here, and how to start it again."""

    def __init__(self, role: str, log: Path, line: Callable[[], list[str]], env: dict[str, str]) -> None:
        self.role, self._log, self._line, self._env = role, log, line, env
        self.start()

    def start(self) -> None:
        """Start it."""
        with open(self._log, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self._line()],
                env=self._env,
                cwd="/",
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                text=True,
            )

    def tell(self, command: str) -> None:
        """Write a line to its standard input."""
        with contextlib.suppress(OSError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()

    @property
    def has_ended(self) -> bool:
        """Whether it runs no more."""
        return self.process.poll() is not None


class Deployment:
    """A cluster with clients that work all the time.

    Parameters
    ----------
    kind
        "local": a ``LocalCluster``; "commands": ``dask scheduler`` and two ``dask worker`` with two nannies each;
        "no nannies": ``dask scheduler`` and four ``dask worker --no-nanny``.
    settings, number
        Of the run, and what distinguishes this cluster from others of it.
    options
        Of the plugin, by name.
    """

    def __init__(self, kind: str, settings: Settings, number: int, options: dict[str, str]) -> None:
        self.kind, self._settings, self._number, self._options = kind, settings, number, options
        self._clients = itertools.count(1)
        self._logs = itertools.count()
        self.own: list[Own] = []
        self.starts = 0

    def start(self) -> None:
        """Start all of it, and return when the clients have begun to work."""
        self.starts += 1
        self._file = self._settings.folder / f"scheduler-{self._number}-{self.starts}.json"
        if self.kind == "local":
            self._add(
                "scheduler", lambda: [str(HERE / "host.py"), str(self._file), "4", _MEMORY_LIMIT, self._has_plugin]
            )
        else:
            self._add("scheduler", lambda: _dask("scheduler", "--port", "0", "--scheduler-file", str(self._file)))
        self._wait_until(self._file.exists, "the scheduler writes its address")
        if self.kind == "commands":
            for _ in range(2):
                self._add("nanny", lambda: [*self._worker_line, "--nworkers", "2"])
        elif self.kind == "no nannies":
            for _ in range(4):
                self._add("worker", lambda: [*self._worker_line, "--no-nanny"])
        self._wait_until(lambda: len(self.victims("worker")) >= 2, "the workers start")
        for _ in range(_CLIENTS):
            self._add("client", self._client_line)

    @property
    def address(self) -> str:
        """Where the scheduler listens."""
        return str(json.loads(self._file.read_text())["address"])

    def mend(self) -> bool:
        """Start again what has ended; return False when it was the scheduler."""
        ended = [own for own in self.own if own.has_ended]
        if any(own.role == "scheduler" for own in ended):
            return False
        for own in ended:
            own.start()
        return True

    def victims(self, role: str) -> list[psutil.Process]:
        """Return the living processes of a role, in the order in which they were started."""
        own = [own for own in self.own if not own.has_ended]
        if role == "worker" and self.kind != "no nannies":
            parents = [one.process.pid for one in own if one.role in ("scheduler", "nanny")]
            return [child for parent in parents for child in _workers_of(parent)]
        return [psutil.Process(one.process.pid) for one in own if one.role == role]

    def clients(self) -> list[Own]:
        """Return the clients that run."""
        return [own for own in self.own if own.role == "client" and not own.has_ended]

    def all(self) -> list[psutil.Process]:
        """Return every process of the run that lives, whoever has started it."""
        return [process for process in psutil.process_iter() if _is_of(process, self._settings.folder)]

    def kill_all(self, pause: float = 0) -> None:
        """Kill everything at once, or first the scheduler and the others after a pause."""
        processes = self.all()
        if pause:
            next(own for own in self.own if own.role == "scheduler").process.kill()
            time.sleep(pause)
        for process in processes:
            send(process, signal.SIGKILL)
        while self.all():
            for process in self.all():
                send(process, signal.SIGKILL)
        for own in self.own:
            own.process.wait()
        self.own.clear()

    def stop_clients(self) -> list[str]:
        """Let the clients finish what they do and close; return what did not end."""
        # Whoever waits for a dead worker waits up to 90 s: `Scheduler.replicate` tries to connect three times, for 30 s
        # each (distributed 2026.8.0). What takes longer than that ends the client itself, and is noted as a hang.
        return self._end([own for own in self.own if own.role == "client"], self._settings.patience + _END)

    def stop(self) -> list[str]:
        """End everything as a user does; return what did not end."""
        hung = self.stop_clients()
        for roles in ({"worker", "nanny"}, {"scheduler"}):
            hung += self._end([own for own in self.own if own.role in roles])
        return hung

    def _end(self, ending: list[Own], patience: float = _END) -> list[str]:
        for own in ending:
            own.tell("stop")
            if own.role != "client" and not own.has_ended and (self.kind, own.role) != ("local", "scheduler"):
                own.process.terminate()
        until = time.monotonic() + patience
        hung = []
        for own in ending:
            try:
                own.process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                hung.append(f"a {own.role} of {self.kind} did not end")
                self.print_stacks()
                own.process.kill()
                own.process.wait()
            self.own.remove(own)
        return hung

    def print_stacks(self) -> None:
        """Let every process of the run print where its threads are; returns when they have had the time to."""
        for process in self.all():
            with contextlib.suppress(psutil.Error):
                # Who is young has not said yet what it does with this signal, and would end by it.
                if time.time() - process.create_time() > 5:
                    process.send_signal(signal.SIGUSR1)
        time.sleep(1)

    # -- inside

    @property
    def _has_plugin(self) -> str:
        return str(int(self._settings.has_plugin))

    @property
    def _worker_line(self) -> list[str]:
        plugin = ["--preload", "dask_shm_plugin"] if self._settings.has_plugin else []
        return [
            *_dask("worker", self.address, "--nthreads", "2", "--memory-limit", _MEMORY_LIMIT, "--preload", "tasks"),
            *("--death-timeout", "60", *plugin),
        ]

    def _client_line(self) -> list[str]:
        number = self._number << 16 | self.starts << 10 | next(self._clients)
        return [str(HERE / "workload.py"), self.address, str(number), str(self._settings.patience)]

    def _add(self, role: str, line: Callable[[], list[str]]) -> None:
        log = self._settings.folder / f"{self._number}-{self.starts}-{role}-{next(self._logs)}.log"
        self.own.append(Own(role, log, line, self.environment(role)))

    def environment(self, role: str) -> dict[str, str]:
        """Return what the processes of a role find in their environment."""
        dask = {
            # So that workers spill all the time, and a task may be lost with its worker however often.
            "WORKER__MEMORY__TARGET": "0.03",
            "SCHEDULER__ALLOWED_FAILURES": "1000000",
            "WORKER__PRELOAD": "tasks",
            # A `LocalCluster` gives a worker up that has died twice within this time.
            "DEPLOY__LOST_WORKER_TIMEOUT": "1 hour",
        }
        if role == "client" and self._settings.has_plugin:
            dask["CLIENT__PRELOAD"] = "dask_shm_plugin"
        return {
            **os.environ,
            **{f"DASK_DISTRIBUTED__{name}": text for name, text in dask.items()},
            **{f"DASK_SHM__{name.upper()}": text for name, text in self._options.items()},
            "DASK_TEMPORARY_DIRECTORY": str(self._settings.folder / "local"),
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]),
            tasks.FOLDER: str(self._settings.folder),
        }

    def _wait_until(self, happens: Callable[[], object], what: str) -> None:
        until = time.monotonic() + _START
        while not happens():
            if time.monotonic() > until or any(own.has_ended for own in self.own):
                raise RuntimeError(f"in vain waited until {what}: see {self._settings.folder}")
            time.sleep(0.05)


def send(process: psutil.Process, number: signal.Signals) -> bool:
    """Send a signal; return False when the process is gone."""
    try:
        process.send_signal(number)
    except psutil.Error:
        return False
    return True


def _dask(*arguments: str) -> list[str]:
    return ["-m", "dask", *arguments, "--host", "127.0.0.1", "--no-dashboard"]


def _workers_of(parent: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [child for child in psutil.Process(parent).children(recursive=True) if _is_worker(child)]
    return []


def _is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "spawn_main" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    return False


def _is_of(process: psutil.Process, folder: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.pid != os.getpid() and process.environ().get(tasks.FOLDER) == str(folder)
    return False
