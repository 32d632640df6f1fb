"""The usual ways to run a cluster, with real processes. Processes that have ended can be started again."""

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
_START_TIMEOUT_S = 90.0
_END_TIMEOUT_S = 60.0
_CLIENT_COUNT = 3


class Settings(NamedTuple):
    """The settings of all clusters of a run."""

    folder: Path
    has_plugin: bool
    patience: float


class StartedProcess:
    """A process that was started here, and the command line that starts it again."""

    def __init__(self, role: str, log: Path, line: Callable[[], list[str]], env: dict[str, str]) -> None:
        self.role, self._log, self._line, self._env = role, log, line, env
        self.start()

    def start(self) -> None:
        """Start the process."""
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

    def send_line(self, command: str) -> None:
        """Write a line to the standard input of the process."""
        with contextlib.suppress(OSError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self.process.poll() is not None


class Deployment:
    """A cluster with clients that work without a pause.

    Parameters
    ----------
    kind
        "local": a ``LocalCluster``; "commands": ``dask scheduler`` and two ``dask worker`` with two nannies each;
        "no nannies": ``dask scheduler`` and four ``dask worker --no-nanny``.
    settings, number
        The settings of the run, and the number of this cluster in the run.
    options
        The options of the plugin, by name.
    """

    def __init__(self, kind: str, settings: Settings, number: int, options: dict[str, str]) -> None:
        self.kind, self._settings, self._number, self._options = kind, settings, number, options
        self._clients = itertools.count(1)
        self._logs = itertools.count()
        self.started: list[StartedProcess] = []
        self.starts = 0

    def start(self) -> None:
        """Start the scheduler and the workers, wait until there are workers, and start the clients."""
        self.starts += 1
        self._file = self._settings.folder / f"scheduler-{self._number}-{self.starts}.json"
        if self.kind == "local":
            self._start_process(
                "scheduler", lambda: [str(HERE / "host.py"), str(self._file), "4", _MEMORY_LIMIT, self._has_plugin]
            )
        else:
            self._start_process(
                "scheduler", lambda: _dask_command("scheduler", "--port", "0", "--scheduler-file", str(self._file))
            )
        self._wait_until(self._file.exists, "the scheduler writes its address")
        if self.kind == "commands":
            for _ in range(2):
                self._start_process("nanny", lambda: [*self._worker_line, "--nworkers", "2"])
        elif self.kind == "no nannies":
            for _ in range(4):
                self._start_process("worker", lambda: [*self._worker_line, "--no-nanny"])
        self._wait_until(lambda: len(self.running("worker")) >= 2, "the workers start")
        for _ in range(_CLIENT_COUNT):
            self._start_process("client", self._client_line)

    @property
    def address(self) -> str:
        """The address of the scheduler."""
        return str(json.loads(self._file.read_text())["address"])

    def restart_ended(self) -> bool:
        """Start all ended processes again; return False if the scheduler has ended."""
        ended = [started for started in self.started if started.has_ended]
        if any(started.role == "scheduler" for started in ended):
            return False
        for started in ended:
            started.start()
        return True

    def running(self, role: str) -> list[psutil.Process]:
        """Return the running processes of a role, in the order in which they were started."""
        started = [started for started in self.started if not started.has_ended]
        if role == "worker" and self.kind != "no nannies":
            parents = [one.process.pid for one in started if one.role in ("scheduler", "nanny")]
            return [child for parent in parents for child in _workers_started_by(parent)]
        return [psutil.Process(one.process.pid) for one in started if one.role == role]

    def clients(self) -> list[StartedProcess]:
        """Return the running clients."""
        return [started for started in self.started if started.role == "client" and not started.has_ended]

    def all_processes(self) -> list[psutil.Process]:
        """Return all running processes of the run, including those that its processes have started."""
        return [process for process in psutil.process_iter() if _belongs_to_run(process, self._settings.folder)]

    def kill_all(self, pause: float = 0) -> None:
        """Kill all processes at once, or first the scheduler and the others after a pause."""
        processes = self.all_processes()
        if pause:
            next(started for started in self.started if started.role == "scheduler").process.kill()
            time.sleep(pause)
        for process in processes:
            send(process, signal.SIGKILL)
        while self.all_processes():
            for process in self.all_processes():
                send(process, signal.SIGKILL)
        for started in self.started:
            started.process.wait()
        self.started.clear()

    def stop_clients(self) -> list[str]:
        """Let the clients finish their operations and close; return a message for each client that did not end."""
        # Waiting for a dead worker takes up to 90 s: `Scheduler.replicate` tries to connect three times, for 30 s each
        # (distributed 2026.8.0). If an operation takes longer, the client notes a hang and ends itself.
        return self._end_processes(
            [started for started in self.started if started.role == "client"], self._settings.patience + _END_TIMEOUT_S
        )

    def stop(self) -> list[str]:
        """End all processes as a user does; return a message for each process that did not end."""
        hung = self.stop_clients()
        for roles in ({"worker", "nanny"}, {"scheduler"}):
            hung += self._end_processes([started for started in self.started if started.role in roles])
        return hung

    def _end_processes(self, ending: list[StartedProcess], patience: float = _END_TIMEOUT_S) -> list[str]:
        for started in ending:
            started.send_line("stop")
            if (
                started.role != "client"
                and not started.has_ended
                and (self.kind, started.role) != ("local", "scheduler")
            ):
                started.process.terminate()
        until = time.monotonic() + patience
        hung = []
        for started in ending:
            try:
                started.process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                hung.append(f"a {started.role} of {self.kind} did not end")
                self.print_stacks()
                started.process.kill()
                started.process.wait()
            self.started.remove(started)
        return hung

    def print_stacks(self) -> None:
        """Let every process of the run print the stacks of its threads, and give it the time to do so."""
        for process in self.all_processes():
            with contextlib.suppress(psutil.Error):
                # A new process may not have installed its handler yet, and the signal would kill it.
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
            *_dask_command(
                "worker", self.address, "--nthreads", "2", "--memory-limit", _MEMORY_LIMIT, "--preload", "tasks"
            ),
            *("--death-timeout", "60", *plugin),
        ]

    def _client_line(self) -> list[str]:
        number = self._number << 16 | self.starts << 10 | next(self._clients)
        return [str(HERE / "workload.py"), self.address, str(number), str(self._settings.patience)]

    def _start_process(self, role: str, line: Callable[[], list[str]]) -> None:
        log = self._settings.folder / f"{self._number}-{self.starts}-{role}-{next(self._logs)}.log"
        self.started.append(StartedProcess(role, log, line, self.environment(role)))

    def environment(self, role: str) -> dict[str, str]:
        """Return the environment variables of the processes of a role."""
        dask = {
            # With these two, workers spill all the time, and a task may lose any number of workers.
            "WORKER__MEMORY__TARGET": "0.03",
            "SCHEDULER__ALLOWED_FAILURES": "1000000",
            "WORKER__PRELOAD": "tasks",
            # A `LocalCluster` closes the nanny of a worker that is missing when this time after a death is over.
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
        until = time.monotonic() + _START_TIMEOUT_S
        while not happens():
            if time.monotonic() > until or any(started.has_ended for started in self.started):
                raise RuntimeError(f"timed out, or a process has ended, before {what}: see {self._settings.folder}")
            time.sleep(0.05)


def send(process: psutil.Process, number: signal.Signals) -> bool:
    """Send a signal; return False if the process is gone."""
    try:
        process.send_signal(number)
    except psutil.Error:
        return False
    return True


def _dask_command(*arguments: str) -> list[str]:
    return ["-m", "dask", *arguments, "--host", "127.0.0.1", "--no-dashboard"]


def _workers_started_by(parent: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [child for child in psutil.Process(parent).children(recursive=True) if _is_worker(child)]
    return []


def _is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "spawn_main" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    return False


def _belongs_to_run(process: psutil.Process, folder: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.pid != os.getpid() and process.environ().get(tasks.FOLDER) == str(folder)
    return False
