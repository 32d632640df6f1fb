"""Add pages to the dashboard of a running scheduler, and take them away again.

Every private name of distributed's dashboard that this needs is a :class:`Seam` of its own. When one has changed, only
the pages are missing, and one warning is logged. Import this module only where Bokeh is installed. Written against
distributed 2026.8.0.
"""

from __future__ import annotations

import contextlib
import functools
import html
import json
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

import dask
import distributed.dashboard.components
import distributed.dashboard.core
import distributed.dashboard.scheduler
import distributed.http.routing
import distributed.http.scheduler.info
from bokeh.application import Application
from bokeh.application.handlers.function import FunctionHandler
from bokeh.document import Document
from bokeh.models import TabPanel
from bokeh.server.tornado import BokehTornado
from bokeh.server.util import create_hosts_allowlist
from bokeh.themes import Theme
from distributed.dashboard.components import add_periodic_callback
from distributed.dashboard.components.scheduler import BOKEH_THEME, env
from distributed.scheduler import Scheduler
from tornado.ioloop import IOLoop

from dask_shm_plugin.seams.checks import Seam, _still_holds, names, takes
from dask_shm_plugin.seams.replacement import Replacement

logger = logging.getLogger("dask_shm_plugin")

SEAMS = (
    Seam(
        "RoutingApplication.applications",
        "an application that stands first answers for its pages, and leaves all others to the next",
        lambda: (
            names(distributed.http.routing.RoutingApplication.find_handler, "applications")
            and names(distributed.http.routing.RoutingApplication.add_application, "applications")
        ),
    ),
    Seam(
        "IndividualPlots.get",
        "lists the individual plots of the first Bokeh application, for the extension of JupyterLab",
        lambda: names(distributed.http.scheduler.info.IndividualPlots.get, "applications", "app_paths", "individual-"),
    ),
    Seam(
        "dashboard.scheduler.template_variables",
        "its lists of tabs and plots are those of all pages",
        lambda: (
            names(distributed.dashboard.scheduler.template_variables, "pages", "plots", "url", "name")
            and names(distributed.dashboard.scheduler.connect, "template_variables", "BokehApplication")
        ),
    ),
    Seam(
        "dashboard.core.DaskBokehTornado",
        "serves pages under the prefix of the dashboard, with its own resources",
        lambda: names(
            distributed.dashboard.core.BokehApplication, "DaskBokehTornado", "allow_websocket_origin", "absolute_url"
        ),
    ),
    Seam(
        "dashboard.components.scheduler.env, BOKEH_THEME, add_periodic_callback",
        "the frame of a page, with Dask's tabs",
        lambda: (
            "simple.html" in env.list_templates()
            and isinstance(BOKEH_THEME, Theme)
            and takes(add_periodic_callback, "doc", "component", "interval")
        ),
    ),
    Seam(
        "Scheduler.performance_report",
        "returns a page of HTML with the tabs as JSON",
        lambda: (
            takes(Scheduler.performance_report, "start", "last_count")
            and names(Scheduler.performance_report, "Tabs", "save")
        ),
    ),
)

_DOCUMENTS = re.compile(r'(<script type="application/json" id="[^"]*">)(.*?)(</script>)', re.DOTALL)

Fill = Callable[[Document], None]
"""Puts the plots of a page into a new document."""


@functools.cache
def why_not() -> str | None:
    """Return the names that have changed in this version of distributed, or None."""
    return ", ".join(seam.name for seam in SEAMS if not _still_holds(seam)) or None


class _Pages(distributed.dashboard.core.DaskBokehTornado):  # type: ignore[name-defined]
    """An application with further pages; it lists the pages of Dask's application, too."""

    others: BokehTornado

    @property
    def app_paths(self) -> set[str]:
        return set(super().app_paths) | set(self.others.app_paths)


class DashboardPages:
    """Further pages and plots of a scheduler's dashboard, from their creation to :meth:`close`.

    Parameters
    ----------
    scheduler
        A running scheduler with a dashboard.
    tabs
        The pages that get a tab on all pages, by path.
    plots
        The single plots of the menu "More…", by path; the path begins with ``/individual-``.
    panel
        Makes a panel for each performance report.

    Notes
    -----
    To be used on the scheduler's event loop.
    """

    def __init__(
        self, scheduler: Any, tabs: dict[str, Fill], plots: dict[str, Fill], panel: Callable[[], TabPanel]
    ) -> None:
        self._applications = scheduler.http_application.applications
        dask_pages = first_bokeh_application(scheduler)
        assert dask_pages is not None
        variables = distributed.dashboard.scheduler.template_variables(scheduler)
        self._lists: list[tuple[list[Any], list[Any]]] = [
            (variables["pages"], [path.strip("/") for path in tabs]),
            (variables["plots"], [{"url": path.strip("/"), "name": _title(path)} for path in plots]),
        ]
        extra = {"prefix": dask_pages.prefix, **variables}
        fills: dict[str, Fill] = {path: functools.partial(_fill_page, fill, extra) for path, fill in tabs.items()}
        fills |= {path: functools.partial(_fill_plot, fill, _title(path)) for path, fill in plots.items()}
        self._pages = _application(fills, dask_pages, scheduler)
        self._applications.insert(0, self._pages)
        self._pages.initialize(IOLoop.current())
        self._pages.start()
        for listed, ours in self._lists:
            listed.extend(ours)
        self._report_before = Replacement(
            scheduler.handlers, "performance_report", _with_panel(scheduler.handlers["performance_report"], panel)
        )

    def close(self) -> None:
        """Take the pages and their tabs away; pages that are open in a browser stand still."""
        self._report_before.undo()
        for listed, ours in self._lists:
            for name in ours:
                with contextlib.suppress(ValueError):
                    listed.remove(name)
        with contextlib.suppress(ValueError):
            self._applications.remove(self._pages)
        self._pages.stop(wait=False)


def first_bokeh_application(scheduler: Any) -> BokehTornado | None:
    """Return Dask's own application with the pages of the dashboard, or None if the scheduler has no dashboard."""
    applications = getattr(getattr(scheduler, "http_application", None), "applications", [])
    return next((one for one in applications if isinstance(one, BokehTornado) and not isinstance(one, _Pages)), None)


def _application(fills: dict[str, Fill], dask_pages: BokehTornado, scheduler: Any) -> _Pages:
    options = dask.config.get("distributed.scheduler.dashboard.bokeh-application").copy()
    origins = create_hosts_allowlist(options.pop("allow_websocket_origin"), scheduler.http_server.port)
    pages = _Pages(
        {path: Application(FunctionHandler(fill)) for path, fill in fills.items()},
        prefix=dask_pages.prefix,
        use_index=False,
        extra_websocket_origins=origins,
        absolute_url="",
        **options,
    )
    pages.others = dask_pages
    return pages


def _fill_page(fill: Fill, extra: dict[str, Any], doc: Document) -> None:
    doc.template = env.get_template("simple.html")
    doc.template_variables.update(extra)
    _fill_plot(fill, "Shared Memory", doc)


def _fill_plot(fill: Fill, title: str, doc: Document) -> None:
    fill(doc)
    doc.theme = BOKEH_THEME
    doc.title = f"Dask: {title}"


def _title(path: str) -> str:
    return path.strip("/").removeprefix("individual-").replace("-", " ").title()


def _with_panel(report: Callable[..., Awaitable[str]], panel: Callable[[], TabPanel]) -> Callable[..., Awaitable[str]]:
    """Return a handler that adds a panel to the tabs of each report; if that fails, the report is as Dask makes it."""

    async def performance_report(*args: Any, **kwargs: Any) -> str:
        page = await report(*args, **kwargs)
        try:
            return _DOCUMENTS.sub(lambda found: found[1] + _added(found[2], panel()) + found[3], page, count=1)
        except Exception:
            logger.debug("a performance report has no page about shared memory", exc_info=True)
            return page

    return performance_report


def _added(documents: str, panel: TabPanel) -> str:
    """Return the documents of a page, as escaped JSON, with a further panel in their first tabs."""
    found = json.loads(html.unescape(documents))
    [tabs] = [root for one in found.values() for root in one["roots"] if root["name"] == "Tabs"]
    document = Document()
    document.add_root(panel)
    tabs["attributes"]["tabs"] += document.to_json(deferred=False)["roots"]
    return html.escape(json.dumps(found), quote=False)
