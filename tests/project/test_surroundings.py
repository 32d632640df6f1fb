"""Facts that are in several files of the project agree, and the hooks need no network."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def setup_cfg() -> configparser.ConfigParser:
    """Return the metadata of the project."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def yaml_content(path: str) -> Any:
    """Return the content of a YAML file. Skip the test if it is missing, as in the source distribution."""
    if not (ROOT / path).exists():
        pytest.skip(f"{path} is not here")
    return yaml.safe_load((ROOT / path).read_text())


def test_each_supported_python_is_tested_on_github() -> None:
    """The matrix has the versions of the classifiers, and each run has the oldest and the newest of them."""
    supported = re.findall(r"Python :: (3\.\d+)", setup_cfg()["metadata"]["classifiers"])
    job = yaml_content(".github/workflows/ci.yml")["jobs"]["run"]
    assert job["strategy"]["matrix"]["python"] == supported
    [python] = [step["with"] for step in job["steps"] if step.get("uses", "").startswith("actions/setup-python@")]
    assert python["python-version"].splitlines() == [supported[0], supported[-1], "${{ matrix.python }}"]


def test_the_hooks_need_no_network() -> None:
    """Each hook is a tool that the extra `lint` installs."""
    [repository] = yaml_content(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}


def test_metadata_is_in_one_file() -> None:
    """A table in pyproject.toml would override setup.cfg, and a version in setup.cfg would override the package's."""
    assert not re.search(r"^\[project\b", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert setup_cfg()["metadata"]["version"] == "attr: dask_shm_plugin.__version__"
