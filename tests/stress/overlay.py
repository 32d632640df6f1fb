"""The installed `distributed` with its tests beside it: they import each other, and what is released has none.

A copy in a folder of its own; nothing of `distributed` is kept in this project.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
RUNNERS = "dask_shm_stress"
"""The package as which this folder's modules are imported next to the tests."""

CONFTEST = """\
import pytest
from distributed.utils_test import *


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="run slow tests")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--runslow"):
            item.add_marker(pytest.mark.skip(reason="need --runslow option to run"))
"""
"""What `conftest.py` of `distributed` does, for sources that come without it."""

ADJUSTED = {
    "from dask.optimization import SubgraphCallable\n": "SubgraphCallable = None\n",
    "from distributed.shuffle import check_minimal_arrow_version\n": "check_minimal_arrow_version = bool\n",
    '@pytest.importorskip("pyarrow")\n': "",
}
"""What keeps whole files of tests of older versions from being imported today, and is needed by few or none of them."""


def lay_out(source: Path, folder: Path) -> list[str]:
    """Copy the installed `distributed` to a folder, with the tests of a source; return their files.

    Parameters
    ----------
    source
        A checkout, or any folder with ``distributed/tests``.
    folder
        Where to. It becomes the root of the tests.
    """
    if not (source / "distributed" / "tests").is_dir():
        raise FileNotFoundError(f"there is no distributed/tests in {source}")
    found = find_spec("distributed")
    if found is None or found.origin is None:
        raise FileNotFoundError("distributed is not installed")
    ignored = shutil.ignore_patterns("__pycache__", "tests")
    shutil.copytree(Path(found.origin).parent, folder / "distributed", ignore=ignored)
    for tests in sorted(source.glob("distributed/**/tests")):
        shutil.copytree(tests, folder / tests.relative_to(source), ignore=shutil.ignore_patterns("__pycache__"))
    for file in folder.glob("distributed/**/tests/test_*.py"):
        text = file.read_text()
        for old, new in ADJUSTED.items():
            text = text.replace(old, new)
        file.write_text(text)
    shutil.copytree(HERE, folder / RUNNERS, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / RUNNERS / "__init__.py").touch()
    if (source / "conftest.py").exists():
        shutil.copy(source / "conftest.py", folder)
    else:
        (folder / "conftest.py").write_text(CONFTEST)
    if (source / "pyproject.toml").exists():
        shutil.copy(source / "pyproject.toml", folder)
    else:
        (folder / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    leaks = Path("distributed") / "pytest_resourceleaks.py"
    if (source / leaks).exists():
        shutil.copy(source / leaks, folder / leaks)
    return [str(file.relative_to(folder)) for file in sorted(folder.glob("distributed/**/tests/test_*.py"))]
