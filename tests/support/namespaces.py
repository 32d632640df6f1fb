"""Kernel namespaces, which make one machine look like several nodes."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

PRIVATE_NODE = """
set -e
mount -t tmpfs tmpfs /dev/shm
mount -t proc proc /proc
exec "$@"
"""

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def can_unshare() -> bool:
    """Return whether this machine permits new namespaces."""
    if not shutil.which("unshare"):
        return False
    line = ["unshare", "--ipc", "--mount", "--pid", "--fork", "sh", "-c", PRIVATE_NODE, "sh", "true"]
    return subprocess.run(line, capture_output=True).returncode == 0
