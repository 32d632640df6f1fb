"""Write the page of measurements from the results of the benchmarks.

    python benchmarks/page [--results FOLDER] [--page PATH] [--text-only]

The folder of results has the files that `one_copy.py`, `targets`, `peers`, `tax.py`, `workflows.py`, `workloads.py`,
`fanout.py`, `shuffles.py`, `born.py`, `types_of_values.py`, `peaks.py` and `nodes.py` write with ``--json``; each may be
missing. To draw the pictures beside the page needs matplotlib (``pip install -e '.[benchmark]'``).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pictures import draw
from results import load
from sections import page

ROOT = Path(__file__).resolve().parent.parent.parent


def main() -> None:
    """Read the arguments, write the page, draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = {"results": ROOT / "benchmarks" / "results", "page": ROOT / "docs" / "measurements.md"}
    parser.add_argument("--results", type=Path, default=default["results"], help="folder with the JSON files")
    parser.add_argument("--page", type=Path, default=default["page"], help="file to write; images/ stands beside it")
    parser.add_argument("--text-only", action="store_true", help="draw nothing")
    asked = parser.parse_args()
    results = load(asked.results)
    asked.page.write_text(page(results))
    if not asked.text_only:
        folder = asked.page.parent / "images"
        folder.mkdir(exist_ok=True)
        draw(results, folder)


if __name__ == "__main__":
    main()
