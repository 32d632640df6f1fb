"""Schedulers and workers as users start them: as commands, each in a session of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from distributed import Client
from observing import addresses, wait_until


def environment(extra: Mapping[str, str] | None = None, first: str = "") -> dict[str, str]:
    """Return an environment in which a child finds the packages of this process, after those in folder ``first``."""
    path = os.pathsep.join(filter(None, [first, *sys.path]))
    return os.environ | {"PYTHONPATH": path, "DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE": "0.95"} | dict(extra or {})


@contextmanager
def command(*arguments: str, env: Mapping[str, str] | None = None, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a command during a block, then end it and all processes that it has started."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            arguments,
            env=dict(env or environment()),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            **{"cwd": "/"} | options,  # not the folder of this project: ``python -m`` would import from there
        )
        try:
            yield process
        finally:
            family = []
            if process.poll() is None:  # a test may have killed it
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for member in family[: 2 if "--fork" in arguments else 1]:  # ``unshare --fork`` passes no signal on
                member.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.send_signal(signal.SIGKILL)
            process.wait()
            log.seek(0)
            print(f"--- {' '.join(arguments[2:5])} printed:\n{log.read()}")


def dask(*arguments: str) -> list[str]:
    """Return the command line of a Dask command, run by this Python."""
    return [sys.executable, "-m", "dask", *arguments]


@contextmanager
def scheduler(*arguments: str, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """Run ``dask scheduler`` and yield its address."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "scheduler.json")
        line = dask("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
        with command(*line, *arguments, env=env) as process:
            wait_until(lambda: file.exists() or process.poll() is not None, "the scheduler starts", seconds=60)
            yield wait_until(lambda: read_address(file), "the scheduler writes its address", seconds=60)


def read_address(file: Path) -> str:
    """Return the address in a scheduler file, or an empty string while the file is being written."""
    with suppress(json.JSONDecodeError, FileNotFoundError):
        return str(json.loads(file.read_text())["address"])
    return ""


@contextmanager
def workers(
    client: Client,
    *arguments: str,
    count: int = 1,
    env: Mapping[str, str] | None = None,
    wrapper: Sequence[str] = (),
    **options: Any,
) -> Iterator[list[str]]:
    """Run ``dask worker`` for a client's scheduler, wait until its workers have come, and yield their addresses."""
    before = set(addresses(client))

    def new() -> list[str]:
        return [address for address in addresses(client) if address not in before]

    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)  # for workers of other users
        line = dask("worker", client.scheduler.address, "--host", "127.0.0.1", "--nthreads", "1", "--no-dashboard")
        line += ["--memory-limit", "1 GiB", "--local-directory", directory, *arguments]
        with command(*wrapper, *line, env=env, **options) as process:
            wait_until(lambda: len(new()) == count or process.poll() is not None, "the workers come", seconds=60)
            assert len(new()) == count
            yield new()
        wait_until(lambda: not new(), "the workers leave", seconds=60)


@contextmanager
def cluster(
    *arguments: str, count: int = 2, options: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None
) -> Iterator[Client]:
    """Run a scheduler and one command with several workers, and yield a client in this process.

    If there are options for the plugin, this client registers it, from a process that is neither the scheduler's nor
    a nanny's.
    """
    from clusters import register

    with ExitStack() as stack:
        address = stack.enter_context(scheduler(env=env))
        client = stack.enter_context(Client(address))
        stack.enter_context(workers(client, *arguments, "--nworkers", str(count), count=count, env=env))
        client.amm.stop()
        if options is not None:
            register(client, **options)
        yield client


def run_script(source: str, *arguments: str, env: Mapping[str, str] | None = None, **options: Any) -> str:
    """Run a Python script to its end, as a user does, and return its output."""
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory, "script.py")
        script.write_text(source)
        os.chmod(directory, 0o755)
        done = subprocess.run(
            [*arguments, sys.executable, str(script)],
            env=dict(env or environment()),
            capture_output=True,
            text=True,
            timeout=100,
            **options,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
