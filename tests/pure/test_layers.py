"""Imports point down, and the lower half of the house knows nothing of Dask."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PURE = [
    "exceptions",
    "syscalls",
    "limits",
    "segment",
    "liveness",
    "rolebook",
    "stateword",
    "table",
    "placement",
    "views",
    "rendezvous",
    "tidying",
    "block",
    "access",
    "arena",
    "membership",
    "metrics",
]

LOADED = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def loaded_by(module: str) -> set[str]:
    """Return the packages that importing a module loads, in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", LOADED, module], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_the_import_contracts_are_kept() -> None:
    """They stand in pyproject.toml; an import that points up breaks one."""
    if not (ROOT / "dask_shm_plugin").is_dir():
        pytest.skip("the wheel is tested without its source")
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    if command is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("module", ["membership", "metrics"])
def test_a_pure_module_loads_nothing_of_dask(module: str) -> None:
    """Neither itself nor through what it imports; the two import all others of the lower half."""
    loaded = loaded_by(f"dask_shm_plugin.{module}")
    assert "dask_shm_plugin" in loaded
    assert not loaded & {"dask", "distributed", "tornado", "cloudpickle"}


def test_all_pure_modules_together_load_nothing_of_dask() -> None:
    """Each of them, by name, in one interpreter."""
    lines = "import importlib, sys\n"
    lines += f"[importlib.import_module(f'dask_shm_plugin.{{name}}') for name in {PURE}]\n"
    lines += "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", lines], check=True, capture_output=True, text=True)
    assert not set(done.stdout.split()) & {"dask", "distributed", "tornado", "cloudpickle"}


def test_the_package_itself_loads_nothing() -> None:
    """Importing it is free, and works where Dask is not installed."""
    assert not loaded_by("dask_shm_plugin") & {"dask", "distributed", "numpy", "posix_ipc"}


def test_the_check_would_notice() -> None:
    """A module that does import Dask is told apart."""
    pytest.importorskip("distributed")
    assert "distributed" in loaded_by("dask_shm_plugin.seams")
