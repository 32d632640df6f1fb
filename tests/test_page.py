"""The page of measurements says what the results say: what is met, what is lost, and what was not measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "measurements.md"
AROUND = {
    "date": "2026-11-05",
    "python": "3.10.1",
    "distributed": "1.2",
    "linux": "6.1-x",
    "processors": 2,
    "memory": 4 << 30,
}


def write(*arguments: str | Path) -> None:
    """Write a page, as the benchmarks' README says."""
    command = [sys.executable, ROOT / "benchmarks" / "page", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def page_of(folder: Path, *arguments: str, **results: Any) -> str:
    """Return the page of some results."""
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    write("--results", folder, "--page", folder / "page.md", *arguments)
    return (folder / "page.md").read_text()


def tax(**at_most: float) -> dict[str, Any]:
    """Return results of `tax.py` with some bounds."""
    summary = {
        name: {"stock": 1.0, "plugin": bound, "ratio": bound, "at_most": bound} for name, bound in at_most.items()
    }
    return {"surroundings": AROUND, "pairs": 3, "summary": summary}


def targets(slowest: float) -> dict[str, Any]:
    """Return results of `targets` with one work."""
    figure = {
        "what": "publish after another, 1 MiB: many, over few",
        "value": slowest,
        "unit": "×",
        "target": 1.5,
        "is_met": slowest <= 1.5,
    }
    seconds = {
        "publish": {"10": 1e-4, "100": 1e-4},
        "publish after another": {"10": 1e-4, "100": slowest * 1e-4},
        "attach": {"10": 1e-5, "100": 1e-5},
    }
    work = {"figures": [figure], "rounds": [], "series": {"by": "blocks", "members": 64, "seconds": seconds}}
    return {"surroundings": AROUND, "is_quick": False, "works": {"many-blocks": work}}


def part(page: str, title: str) -> str:
    """Return what stands under a heading."""
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_page_is_what_the_results_in_this_tree_say(tmp_path: Path) -> None:
    """Nobody has written into it, and nobody has measured anew without writing it."""
    write("--page", tmp_path / "page.md", "--text-only")
    assert (tmp_path / "page.md").read_text() == PAGE.read_text()


def test_the_page_says_what_was_not_measured_and_how_to(tmp_path: Path) -> None:
    """Without any results it makes no claim."""
    page = page_of(tmp_path, "--text-only")
    assert part(page, "What we lose").strip() == "Not measured yet."
    for script in ("one_copy.py", "targets", "peers", "tax.py", "workflows.py", "workloads.py"):
        assert f"Not measured yet: `python benchmarks/{script} --json" in page
    assert "| met |" not in page


def test_a_figure_that_misses_its_target_is_among_the_losses(tmp_path: Path) -> None:
    """Computed from the figures, and only from them."""
    page = page_of(tmp_path, "--text-only", tax=tax(shuffle=1.04, tiny=1.06))
    verdicts = re.findall(r"^\| (\w+): .*\| (met|\*\*not met\*\*) \|$", part(page, "Targets"), re.MULTILINE)
    assert verdicts == [("shuffle", "met"), ("tiny", "**not met**")]
    losses = part(page, "What we lose")
    assert "tiny" in losses
    assert "shuffle" not in losses
    assert "2 processors, 4 GiB, Linux 6.1; Python 3.10.1, distributed 1.2; 5 November 2026" in page


def test_a_reason_is_given_only_where_the_figures_show_it(tmp_path: Path) -> None:
    """That publishing slows down with the number of blocks explains a loss, and nothing where there is none."""
    reason = "computed from the rows of all live blocks where another member has changed something"
    assert reason in page_of(tmp_path, "--text-only", targets=targets(2.0))
    assert reason not in page_of(tmp_path, "--text-only", targets=targets(1.2))


def test_the_pictures_that_the_page_shows_are_drawn_beside_it(tmp_path: Path) -> None:
    """Each of them, and no other is left from before."""
    pytest.importorskip("matplotlib")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "measured-sizes.svg").touch()
    page = page_of(tmp_path, targets=targets(2.0))
    shown = set(re.findall(r"\(images/(measured-[\w-]+\.svg)\)", page))
    assert shown == {"measured-blocks.svg"}
    assert {path.name for path in (tmp_path / "images").iterdir()} == shown
