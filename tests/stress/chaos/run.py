"""A run: one cluster after another, the kills in each, and the findings."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import kills
import logs
import psutil
import watching
from deployments import HERE, Deployment, Settings, send
from kills import Kill
from sums import Sums
from watching import DyingProcess

_POLL_INTERVAL_S = 0.02
_EMPTY_TIMEOUT_S = 20.0
_INSPECTION_TIMEOUT_S = 120.0
_EXIT_TIMEOUT_S = 20.0


class Run:
    """All clusters of one run.

    Parameters
    ----------
    folder
        The folder for all logs and notes.
    seed, gap
        The seed of the schedule of kills, and the mean seconds between two kills.
    patience
        Seconds after which an operation counts as hung.
    has_plugin
        Whether the clusters use the plugin.
    group
        The folder of a memory control group that has only this run, if there is one.
    """

    def __init__(
        self, folder: Path, *, seed: int, gap: float, patience: float, has_plugin: bool, group: Path | None = None
    ) -> None:
        self._folder, self._seed = folder, seed
        self._settings = Settings(folder, has_plugin, patience)
        self._schedule = kills.schedule(seed, gap)
        self._dice = random.Random(seed)
        self._reclaiming = watching.ReclaimTimes()
        self._sums = Sums(group)
        self._last = "before any kill", time.monotonic()
        self._counts: Counter[str] = Counter()
        self._stopped: list[tuple[float, psutil.Process]] = []
        self._markers = itertools.count()
        self._orphaned: set[str] = set()
        self._leaked_bytes = 0
        self._found: list[str] = []
        self._hangs_seen = 0
        self._clusters = 0

    @property
    def killed(self) -> int:
        """The number of kills so far. A process that was only stopped does not count, and "everything" counts once."""
        return sum(count for what, count in self._counts.items() if not what.startswith("SIGSTOP"))

    @property
    def has_too_many_findings(self) -> bool:
        """Whether there are so many findings that the run should end."""
        return len(self._found) > 20

    def run_cluster(self, kind: str, number: int, many: int) -> None:
        """Run one cluster until ``many`` kills are done, and check for leftovers."""
        options = {
            "threshold": "64 KiB",
            "capacity": self._dice.choice(["256 MiB", "24 MiB"]),
            "publish": self._dice.choice(["on-request", "on-completion"]),
        }
        deployment = Deployment(kind, self._settings, number, options)
        goal = self.killed + many
        try:
            deployment.start()
            due = time.monotonic()
            while self.killed < goal:
                kill = next(self._schedule)
                due = max(due, time.monotonic() - 1) + kill.gap
                self._watch_until(deployment, due)
                self._execute(deployment, kill)
            self._finish(deployment)
        except Exception as error:
            self._found.append(f"{kind}: {type(error).__name__}: {error}")
        finally:
            deployment.kill_all()
        self._clusters += 1
        print(f"{self.killed} kills, {len(self._found)} findings", file=sys.stderr, flush=True)

    # -- killing

    def _watch_until(self, deployment: Deployment, due: float) -> None:
        while True:
            self._watch_once(deployment)
            if time.monotonic() >= due:
                return
            time.sleep(_POLL_INTERVAL_S)

    def _watch_once(self, deployment: Deployment) -> None:
        now = time.monotonic()
        for until, process in [one for one in self._stopped if one[0] <= now]:
            send(process, signal.SIGCONT)
            self._stopped.remove((until, process))
        self._reclaiming.check(stopped=bool(self._stopped))
        if self._settings.has_plugin:
            self._sums.sample(f"{now - self._last[1]:.2f} s after {self._last[0]}")
        if not deployment.restart_ended():
            self._found.append(f"{deployment.kind}: the scheduler has ended without being killed")
            self._restart_cluster(deployment)
        hangs = (
            sum(one["what"] == "hang" for one in logs.read_notes(self._folder)) if self._is_log_check_due(now) else 0
        )
        if hangs > self._hangs_seen:
            self._hangs_seen = hangs
            deployment.print_stacks()

    _last_log_check = 0.0

    def _is_log_check_due(self, now: float) -> bool:
        if now - self._last_log_check < 1:
            return False
        self._last_log_check = now
        return True

    def _execute(self, deployment: Deployment, kill: Kill) -> None:
        self._last = f"{kill.kind}, {kill.role}", time.monotonic()
        if kill.kind in ("everything", "scheduler"):
            pause = kill.seconds / 2 if kill.kind == "scheduler" else 0
            self._orphaned |= watching.names_used_by(deployment.all_processes())
            self._count(f"{kill.kind}, SIGKILL")
            deployment.kill_all(pause)
            self._restart_cluster(deployment)
            return
        role, victim = kills.choose_victim(deployment, kill)
        until = time.monotonic() + self._settings.patience
        while victim is None:
            if time.monotonic() > until:
                raise RuntimeError("the cluster does not recover")
            self._watch_until(deployment, time.monotonic() + 0.2)
            role, victim = kills.choose_victim(deployment, kill)
        self._kill(deployment, kill, role, victim)

    def _kill(self, deployment: Deployment, kill: Kill, role: str, victim: psutil.Process) -> None:
        if kill.kind == "os._exit":
            self._exit_in_task(deployment, kill)
            return
        if kill.kind == "in the lock" and self._settings.has_plugin:
            caught = kills.kill_in_lock(deployment, victim)
            if caught is not None:
                role = next((r for r in kills.ROLES if caught[0] in deployment.running(r)), role)
                self._count(f"SIGKILL in the lock, {role}")
                self._reclaiming.add(caught[1])
                return
        if kill.kind == "SIGSTOP":
            if send(victim, signal.SIGSTOP):
                self._count(f"SIGSTOP, {role}")
                self._stopped.append((time.monotonic() + kill.seconds, victim))
            return
        death = DyingProcess.observe(victim)
        self._reclaiming.add(death)
        number = signal.SIGSEGV if kill.kind == "SIGSEGV" else signal.SIGKILL
        if send(victim, number):
            self._count(f"{number.name}, {role}")

    def _count(self, what: str) -> None:
        """Count a kill, and write it with its time into the file ``kills``, for whoever reads the notes."""
        self._counts[what] += 1
        with open(self._folder / "kills", "a") as file:
            print(f"{time.time():.3f}", what, file=file)

    def _exit_in_task(self, deployment: Deployment, kill: Kill) -> None:
        marker = self._folder / f"exit-{next(self._markers)}"
        clients = deployment.clients()
        if not clients:
            return
        clients[int(kill.which * len(clients))].send_line(f"die {marker}")
        until = time.monotonic() + 5
        while not marker.exists() and time.monotonic() < until:
            self._watch_until(deployment, time.monotonic() + _POLL_INTERVAL_S)
        if marker.exists():
            self._count("os._exit, worker")

    def _restart_cluster(self, deployment: Deployment) -> None:
        self._reclaiming.clear()
        self._stopped.clear()
        deployment.kill_all()
        deployment.start()

    # -- checking for leftovers

    def _finish(self, deployment: Deployment) -> None:
        for _, process in self._stopped:
            send(process, signal.SIGCONT)
        self._stopped.clear()
        self._watch_until(deployment, time.monotonic() + 3)
        if self._settings.has_plugin:
            self._inspect(deployment, 0)
        names = watching.names_used_by(deployment.all_processes())
        self._check_names_gone(self._orphaned - names, "was not purged by later processes")
        self._found += deployment.stop_clients()
        if self._settings.has_plugin:
            left = self._inspect(deployment, _EMPTY_TIMEOUT_S)
            self._leaked_bytes += left["used"]
            if left["used"]:
                self._found.append(f"{deployment.kind}: the arena was not empty at the end: {left}")
        self._found += deployment.stop()
        self._check_no_process_runs(deployment)
        self._check_names_gone(names, "was left when all processes had ended")
        self._last = "the end of a cluster", time.monotonic()

    def _inspect(self, deployment: Deployment, patience: float) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, str(HERE / "inspector.py"), deployment.address, str(patience)],
            env=deployment.environment("inspector"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_INSPECTION_TIMEOUT_S,
            cwd="/",
        )
        if done.returncode:
            raise RuntimeError(f"a new member found: {done.stderr[-2000:]}")
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def _check_no_process_runs(self, deployment: Deployment) -> None:
        until = time.monotonic() + _EXIT_TIMEOUT_S
        while (living := deployment.all_processes()) and time.monotonic() < until:
            time.sleep(0.1)
        for process in living:
            with contextlib.suppress(psutil.Error):
                self._found.append(f"{deployment.kind}: still runs at the end: {process.cmdline()[-6:]}")

    def _check_names_gone(self, names: set[str], what: str) -> None:
        self._found += [f"{name} {what}" for name in names if os.path.exists(name)]

    def _names_left_after_purge(self) -> list[str]:
        """Start a newcomer, which purges names of processes that were killed all at once; return names that stay."""
        arriving = (
            "from dask_shm_plugin.node import membership as m; m.join('after', 'worker', 'x', capacity=lambda: 1 << 20)"
        )
        subprocess.run([sys.executable, "-c", arriving], check=True, timeout=_INSPECTION_TIMEOUT_S)
        return sorted(name for name in self._orphaned if os.path.exists(name))

    # -- the report

    def report(self) -> dict[str, Any]:
        """Return all figures."""
        seen = logs.summary(self._folder)
        ours = logs.tracebacks_of_ours(self._folder)
        names = self._names_left_after_purge() if self._settings.has_plugin else []
        reclaiming = self._reclaiming.report()
        self._found += [f"the listed arenas are not the kernel's shared memory: {one}" for one in self._sums.lasting()]
        self.has_failed = bool(
            seen["wrong"] or seen["hangs"] or ours or names or self._found or self._leaked_bytes or reclaiming["never"]
        ) or (self._settings.has_plugin and not seen["shared"])
        stops = sum(count for what, count in self._counts.items() if what.startswith("SIGSTOP"))
        return {
            "seed": self._seed,
            "clusters": self._clusters,
            "kills": self.killed,
            "stops": stops,
            "by_kind_and_role": dict(sorted(self._counts.items())),
            **seen,
            "leaked_bytes": self._leaked_bytes,
            "names_left_in_dev_shm": names,
            "dead_members": reclaiming,
            "list_and_kernel": self._sums.report(),
            "tracebacks_of_ours": ours,
            "warnings_of_ours": logs.warnings_of_ours(self._folder),
            "findings": self._found,
            "folder": str(self._folder),
        }
