"""The documentation is correct: its code runs and prints the promised output, and its links and tables are right."""

from __future__ import annotations

import ast
import configparser
import doctest
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROOT_PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
PAGES = [*(ROOT / page for page in ROOT_PAGES), *sorted(ROOT.glob("docs/**/*.md"))]
SETUP_COMMANDS = {"example": ".venv/bin/python examples/flights.py", "tests": ".venv/bin/python -m pytest"}


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def run(code: str) -> str:
    """Run code in a new interpreter, and return its output."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux")
def test_the_tutorial_runs_and_prints_the_output_that_it_shows() -> None:
    """The code of the tutorial prints the output that the tutorial shows, line by line."""
    tutorial = ROOT / "docs" / "tutorial.md"
    printed = run("\n".join(blocks(tutorial, "python")))
    promised = "".join(blocks(tutorial, "text"))
    assert doctest.OutputChecker().check_output(promised, printed, doctest.ELLIPSIS), printed


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux")
def test_the_first_example_of_the_readme_runs(tmp_path: Path) -> None:
    """The code that a new user sees first works as a script."""
    [code] = blocks(ROOT / "README.md", "python")
    script = tmp_path / "readme.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n"


def test_the_readme_has_two_setup_commands_and_ci_runs_the_second() -> None:
    """Two commands set up a new machine, and `.ci/run` finds the one for the tests by its mark."""
    readme = (ROOT / "README.md").read_text()
    marked = dict(re.findall(r"<!-- (\w+) -->\n```sh\n(.*)\n```", readme))
    assert marked.keys() == SETUP_COMMANDS.keys()
    assert len(blocks(ROOT / "README.md", "sh")) == len(marked)
    for mark, end in SETUP_COMMANDS.items():
        assert marked[mark].endswith(f"&& {end}")
    assert "/<!-- tests -->/" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """No page links to a page or a heading that does not exist."""
    for target, _, heading in links_within_tree(page):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if heading:
            assert heading in headings(linked), f"{target}#{heading}"


def links_within_tree(page: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the links of a page that stay in this tree, as path and heading."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            yield link.partition("#")


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as links name them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in found}


def test_the_reference_names_every_setting_with_its_default() -> None:
    """The table of settings has the names and defaults of the package."""
    import dask_shm_plugin

    defaults = yaml.safe_load((Path(dask_shm_plugin.__file__).parent / "dask_shm.yaml").read_text())["shm"]
    reference = (ROOT / "docs" / "reference.md").read_text()
    rows = dict(re.findall(r"^\| `shm\.(\w+)` \| `DASK_SHM__\w+` \| `([^`]*)`", reference, re.MULTILINE))
    assert rows == {name: str(default) for name, default in defaults.items()}
    for name in defaults:
        assert f"`DASK_SHM__{name.upper()}`" in reference


def test_the_reference_explains_every_reason() -> None:
    """The reference has a row for each reason that a counter can show."""
    from dask_shm_plugin import exceptions

    reference = (ROOT / "docs" / "reference.md").read_text()
    classes = [kind for kind in vars(exceptions).values() if isinstance(kind, type)]
    reasons = {kind.reason for kind in classes if issubclass(kind, exceptions.SharedMemoryError)} - {"error"}
    assert {reason for reason in reasons if f"| `{reason}` |" not in reference} == set()


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux")
def test_the_picture_of_a_blocks_life_matches_the_table() -> None:
    """The picture is drawn by trying every operation and every death in every state, and is up to date."""
    drawing = runpy.run_path(str(ROOT / "docs" / "draw_block_life.py"))
    assert drawing["PICTURE"].read_text() == drawing["picture"]()


def test_every_test_has_a_docstring() -> None:
    """Without a docstring, the reader of a failed test has to guess its purpose."""
    silent = []
    for path in sorted((ROOT / "tests").glob("**/test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                silent += [] if ast.get_docstring(node) else [f"{path.name}: {node.name}"]
    assert silent == []


def test_the_oldest_supported_python_is_the_same_everywhere() -> None:
    """The oldest Python of the classifiers is also the one in `python_requires` and in the README."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    oldest = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])[0]
    assert setup["options"]["python_requires"] == f">={oldest}"
    assert f"Python {oldest} or newer" in (ROOT / "README.md").read_text()
