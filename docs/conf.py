"""The documentation as a web site.

Build it with ``pip install -e '.[docs]'`` and ``sphinx-build -nW --keep-going -b html docs build/docs``. The build needs
no network, except with ``DASK_SHM_DOCS_INTERSPHINX=1`` in the environment: then names of Python and Dask link to
their own documentation.

The pages are also read on GitHub, so their links are relative paths to files.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

import dask_shm_plugin

ROOT = Path(__file__).resolve().parent.parent
PROJECT_URL = "https://github.com/dask/dask-shm-plugin"

project = "dask-shm-plugin"
author = "The dask-shm-plugin developers"
project_copyright = author
version = release = dask_shm_plugin.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]
source_suffix = {".md": "markdown"}

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3  # links such as page.md#heading, as on GitHub

autosummary_generate = False
maximum_signature_line_length = 60
numpydoc_show_class_members = False
nitpick_ignore_regex = [("py:.*", r"(?!dask_shm_plugin).*")]  # names of Python and Dask, found by intersphinx only

if os.environ.get("DASK_SHM_DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "distributed": ("https://distributed.dask.org/en/stable", None),
    }

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {"source_repository": PROJECT_URL, "source_branch": "main", "source_directory": "docs/"}


def link_to_project(app: Sphinx, page: str, source: list[str]) -> None:
    """Let links to files outside of this folder lead to the project's repository; the site does not contain these files."""
    folder = Path(app.srcdir, page).parent

    def outside(link: re.Match[str]) -> str:
        path = (folder / link["path"]).resolve()
        if path.is_relative_to(app.srcdir) or not path.exists():
            return link[0]
        return f"]({PROJECT_URL}/blob/main/{path.relative_to(ROOT)}{link['heading']})"

    source[0] = re.sub(r"\]\((?P<path>\.\./[^)#\s]+)(?P<heading>#?[^)\s]*)\)", outside, source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", link_to_project)
