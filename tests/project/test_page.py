"""The page of measurements shows the results: targets that are met, losses, and missing measurements."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "measurements.md"
SURROUNDINGS = {
    "date": "2026-11-05",
    "python": "3.10.1",
    "distributed": "1.2",
    "linux": "6.1-x",
    "processors": 2,
    "memory": 4 << 30,
}


def write_page(*arguments: str | Path) -> None:
    """Write a page by the command of the benchmarks' README."""
    command = [sys.executable, ROOT / "benchmarks" / "page", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def page_of(folder: Path, *arguments: str, **results: Any) -> str:
    """Write the page of some results to a folder, and return its text."""
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    write_page("--results", folder, "--page", folder / "page.md", *arguments)
    return (folder / "page.md").read_text()


def tax_results(**at_most: float) -> dict[str, Any]:
    """Return results of `tax.py` with the given upper bounds."""
    summary = {
        name: {"stock": {"median": 1.0}, "plugin": {"median": bound}, "ratio": bound, "at_most": bound}
        for name, bound in at_most.items()
    }
    return {"surroundings": SURROUNDINGS, "pairs": 3, "summary": summary}


def target_results(slowest: float) -> dict[str, Any]:
    """Return results of `targets` with one workload."""
    figure = {"what": "publish after another, 1 MiB: many, over few", "value": slowest, "unit": "×", "target": 1.5}
    seconds = {"publish": (1e-4, 1e-4), "publish after another": (1e-4, slowest * 1e-4), "attach": (1e-5, 1e-5)}
    curves = {what: {"10": {"median": few}, "100": {"median": many}} for what, (few, many) in seconds.items()}
    work = {"figures": [figure], "series": {"by": "blocks", "members": 64, "seconds": curves}}
    return {"surroundings": SURROUNDINGS, "is_quick": False, "works": {"many-blocks": work}}


def section(page: str, title: str) -> str:
    """Return the text under a heading."""
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_page_in_this_tree_matches_the_results(tmp_path: Path) -> None:
    """The page was not edited by hand, and was written again after the last measurement."""
    write_page("--page", tmp_path / "page.md", "--text-only")
    assert (tmp_path / "page.md").read_text() == PAGE.read_text()


def test_the_page_names_missing_measurements_and_their_commands(tmp_path: Path) -> None:
    """Without results, the page makes no claim, and names the commands that measure."""
    page = page_of(tmp_path, "--text-only")
    assert section(page, "What we lose").strip() == "Not measured yet."
    for script in ("one_copy.py", "targets", "peers", "tax.py", "workflows.py", "workloads.py"):
        assert f"Not measured yet: `python benchmarks/{script} --json" in page
    assert "| met |" not in page


def test_a_figure_that_misses_its_target_is_among_the_losses(tmp_path: Path) -> None:
    """The losses are computed from the figures alone."""
    page = page_of(tmp_path, "--text-only", tax=tax_results(shuffle=1.04, tiny=1.06))
    verdicts = re.findall(r"^\| (\w+): .*\| (met|\*\*not met\*\*) \|$", section(page, "Targets"), re.MULTILINE)
    assert verdicts == [("shuffle", "met"), ("tiny", "**not met**")]
    losses = section(page, "What we lose")
    assert "tiny" in losses
    assert "shuffle" not in losses
    assert "2 processors, 4 GiB, Linux 6.1; Python 3.10.1, distributed 1.2; 5 November 2026" in page


def test_a_reason_is_given_only_where_the_figures_show_it(tmp_path: Path) -> None:
    """The reason that publishing slows down with the number of blocks is given only if there is such a loss."""
    reason = "computed from the rows of all live blocks where another member has changed something"
    assert reason in page_of(tmp_path, "--text-only", targets=target_results(2.0))
    assert reason not in page_of(tmp_path, "--text-only", targets=target_results(1.2))


def test_the_pictures_of_the_page_are_drawn_beside_it(tmp_path: Path) -> None:
    """Each picture of the page is drawn, and no older picture is left."""
    pytest.importorskip("matplotlib")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "measured-sizes.svg").touch()
    page = page_of(tmp_path, targets=target_results(2.0))
    shown = set(re.findall(r"\(images/(measured-[\w-]+\.svg)\)", page))
    assert shown == {"measured-blocks.svg"}
    assert {path.name for path in (tmp_path / "images").iterdir()} == shown
