"""A copy of the installed `distributed`, together with its tests, which the releases do not contain.

The tests import each other as parts of the package. The copy is in a folder of its own; this project contains nothing
of `distributed`.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
RUNNERS = "dask_shm_stress"
"""The name of the package that the modules of this folder form next to the tests."""

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
"""A replacement for the `conftest.py` of `distributed`, for sources without it."""

REPLACEMENTS = {
    "from dask.optimization import SubgraphCallable\n": "SubgraphCallable = None\n",
    "from distributed.shuffle import check_minimal_arrow_version\n": "check_minimal_arrow_version = bool\n",
    '@pytest.importorskip("pyarrow")\n': "",
}
"""Lines of older tests that prevent the import of whole files today, and their replacements. Few tests need them."""


def lay_out(source: Path, folder: Path) -> list[str]:
    """Copy the installed `distributed`, with the tests of a source, to a folder; return the files of the tests.

    Parameters
    ----------
    source
        A checkout, or any folder with ``distributed/tests``.
    folder
        The target, which becomes the root of the tests.
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
        for old, new in REPLACEMENTS.items():
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
