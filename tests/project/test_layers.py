"""Imports between the rooms of the package point down, and the lower rooms import nothing of Dask."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PURE = [
    "arena.arena",
    "crashpoints",
    "exceptions",
    "linux.limits",
    "mapping.large_pages",
    "metrics",
    "node.membership",
    "notices",
    "table.table",
    "units",
]

LOADED = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def packages_loaded_by(module: str) -> set[str]:
    """Return the packages that importing a module loads, in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", LOADED, module], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_the_import_contracts_are_kept() -> None:
    """The contracts are in pyproject.toml. An import that points up breaks one of them."""
    if not (ROOT / "dask_shm_plugin").is_dir():
        pytest.skip("the wheel is tested without its source")
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    if command is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("module", ["node.membership", "metrics"])
def test_a_pure_module_loads_nothing_of_dask(module: str) -> None:
    """Dask is imported neither directly nor indirectly. These two modules import all other lower ones."""
    loaded = packages_loaded_by(f"dask_shm_plugin.{module}")
    assert "dask_shm_plugin" in loaded
    assert not loaded & {"dask", "distributed", "tornado", "cloudpickle"}


def test_all_pure_modules_together_load_nothing_of_dask() -> None:
    """One interpreter imports each pure module by name, and then has loaded nothing of Dask."""
    lines = "import importlib, sys\n"
    lines += f"[importlib.import_module(f'dask_shm_plugin.{{name}}') for name in {PURE}]\n"
    lines += "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", lines], check=True, capture_output=True, text=True)
    assert not set(done.stdout.split()) & {"dask", "distributed", "tornado", "cloudpickle"}


def test_the_package_itself_loads_nothing() -> None:
    """The import of the package is quick, and works without Dask."""
    assert not packages_loaded_by("dask_shm_plugin") & {"dask", "distributed", "numpy", "posix_ipc"}


def test_a_module_that_imports_dask_is_detected() -> None:
    """The check of pure modules finds a module that imports Dask."""
    pytest.importorskip("distributed")
    assert "distributed" in packages_loaded_by("dask_shm_plugin.seams.checks")
