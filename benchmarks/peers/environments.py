"""The peers, and an environment for each of them with versions that are pinned."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Peer(NamedTuple):
    """A class beside this file, and the packages that it needs; without any it runs in this environment.

    ``pythons`` are the versions of Python that the packages are known to install on.
    """

    name: str
    kind: str
    requirements: tuple[str, ...] = ()
    pythons: tuple[str, ...] = ("3.10", "3.11", "3.12", "3.13")
    protocol: str = ""


class NotThere(Exception):
    """A peer cannot be measured, with the reason."""


PEERS = (
    Peer("ours", "stores.Arena"),
    Peer("SharedMemory", "stores.Segments"),
    Peer("joblib", "stores.Joblib", ("joblib==1.5.2", "numpy==2.2.6")),
    Peer("LMDB", "stores.Lmdb", ("lmdb==1.7.5", "numpy==2.2.6")),
    Peer("Ray", "ray_store.Store", ("ray==2.60.0", "numpy==2.2.6")),
    Peer("vineyard", "stores.Vineyard", ("vineyard==0.24.2", "numpy==2.2.6"), ("3.10", "3.11", "3.12")),
    # The last release with Plasma; it has no wheels for later versions of Python.
    Peer("Plasma", "stores.Plasma", ("pyarrow==11.0.0", "numpy==1.26.4"), ("3.10", "3.11")),
    Peer("Dask, TCP", "dask_wire.Store", protocol="tcp"),
    Peer("Dask, UCX", "dask_wire.Store", ("distributed-ucxx-cu12==0.52.0", "numpy==2.2.6"), protocol="ucxx"),
)


def interpreter(peer: Peer) -> str:
    """Return a Python that the peer installs on: this one, if possible."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here in peer.pythons:
        return sys.executable
    for version in reversed(peer.pythons):
        command = shutil.which(f"python{version}")
        # A name that is found may be a shim of a version that is not installed.
        if command and subprocess.run([command, "--version"], capture_output=True).returncode == 0:
            return command
    raise NotThere(f"needs Python {' or '.join(peer.pythons)}; this is {here}, and none of them was found")


def complaint(output: str) -> str:
    """Return the line of a log that names the error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["it said nothing"])[-1][:300]


def python_of(peer: Peer, envs: Path) -> str:
    """Return the Python of the peer's environment, which is made if it does not exist.

    Raises
    ------
    NotThere
        It cannot be installed.
    """
    if not peer.requirements:
        return sys.executable
    base = interpreter(peer)
    identity = hashlib.sha256(repr((base, peer.requirements)).encode()).hexdigest()[:8]
    folder = envs / f"{peer.kind}-{identity}"
    python, is_ready = folder / "bin" / "python", folder / "is-ready"
    if not is_ready.exists():
        shutil.rmtree(folder, ignore_errors=True)
        for command in (
            [base, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *peer.requirements],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise NotThere(f"does not install: {complaint(done.stdout + done.stderr)}")
        is_ready.touch()
    return str(python)


def default_folder() -> Path:
    """Return where environments are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dask-shm-plugin" / "peers"
