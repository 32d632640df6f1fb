"""The page "Shared memory" of the scheduler's dashboard, and its plots. Import it only where Bokeh is installed."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from typing import Any

from bokeh.document import Document
from bokeh.layouts import column, row
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    Div,
    FactorRange,
    HoverTool,
    NoOverlap,
    NumeralTickFormatter,
    TabPanel,
)
from bokeh.plotting import figure
from bokeh.transform import dodge
from dask.utils import format_bytes
from distributed.dashboard.components import add_periodic_callback

from dask_shm_plugin import metrics
from dask_shm_plugin.monitor.history import History, Moment
from dask_shm_plugin.monitor.nodes import Node
from dask_shm_plugin.seams.dashboard import DashboardPages, Fill

_INTERVAL_MS = 500
_MAX_VALUES, _MAX_HOLDERS = 20, 8
_MAX_LABEL = 24
_USED, _WARM, _FREE, _PRIVATE, _SENT = "#1f77b4", "#9ecae1", "#eeeeee", "#ff7f0e", "#d62728"
_NOTE = """
<p>Each shared byte lies in memory once per machine. Dask's plots <i>Bytes stored</i> show private memory and each
worker's part of the blocks that it uses, so their sum is right. <i>Memory by key</i> counts the full size on every
worker that has the key: its sum is more than the memory in use.</p>
"""
"""The place where Dask's own plots mislead."""


def _count_bytes(axis: Any) -> None:
    """Let the ticks of an axis be round numbers of KiB, MiB and GiB."""
    axis.ticker = BasicTicker(base=1024, mantissas=[2**n for n in range(10)])
    axis.formatter = NumeralTickFormatter(format="0.0 b")


class _Part:
    """A part of the page, which follows the history."""

    root: Any

    def __init__(self, history: History) -> None:
        self._history = history
        self._shown: float | None = None

    def update(self) -> None:
        """Show the last moment, if it is new."""
        last = self._history.last
        if last.at != self._shown:
            self._shown = last.at
            self.show(last)

    def show(self, last: Moment) -> None:
        """Show a moment."""
        raise NotImplementedError


class NodesPlot(_Part):
    """Per node, a bar of used, warm and free bytes of the capacity, and one of the workers' private memory."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self.source = ColumnDataSource({name: [] for name in ("node", "used", "warm", "free", "private", "text")})
        plot = self.root = figure(
            title="Memory by node", y_range=FactorRange(), tools="", sizing_mode="stretch_both", min_height=160
        )
        shared, private = (dodge("node", place, range=plot.y_range) for place in (0.2, -0.2))
        bars: dict[str, Any] = {"height": 0.38, "line_color": None, "source": self.source}
        parts = {"used": ("used by blocks", _USED), "warm": ("warm", _WARM), "free": ("free", _FREE)}
        labels, colors = map(list, zip(*parts.values(), strict=True))
        plot.hbar_stack(list(parts), y=shared, color=colors, legend_label=labels, **bars)
        plot.hbar(right="private", y=private, color=_PRIVATE, legend_label="private memory of the workers", **bars)
        plot.add_tools(HoverTool(tooltips="@node: @text"))
        _count_bytes(plot.xaxis)
        plot.x_range.start = 0
        plot.yaxis.major_label_policy = NoOverlap()
        plot.legend.orientation = "horizontal"
        plot.add_layout(plot.legend[0], "below")

    def show(self, last: Moment) -> None:
        """Show two bars for each node."""
        rows = [_sizes(node) for node in last.nodes]
        self.root.y_range.factors = [node.name for node in reversed(last.nodes)]
        self.source.data = {
            "node": [node.name for node in last.nodes],
            **{name: [row[name] for row in rows] for name in ("used", "warm", "free", "private")},
            "text": [_told(node, row) for node, row in zip(last.nodes, rows, strict=True)],
        }


def _sizes(node: Node) -> dict[str, int]:
    used, capacity = node.state["used"], node.state["capacity"]
    warm = max(0, min(node.state["resident"], capacity) - used)
    return {"used": used, "warm": warm, "free": max(0, capacity - used - warm), "private": sum(node.private.values())}


def _told(node: Node, sizes: dict[str, int]) -> str:
    parts = ", ".join(f"{format_bytes(size)} {name}" for name, size in sizes.items())
    return f"{parts}; {node.state['blocks']} blocks, {node.state['members']} members, {len(node.private)} workers"


class TimePlot(_Part):
    """The used bytes and the number of blocks of all nodes over the last minutes."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self.source = ColumnDataSource({"at": [], "used": [], "blocks": []})
        self.root = column(
            *(
                self._line(name, title, color)
                for name, title, color in (
                    ("used", "Bytes in the arenas", _USED),
                    ("blocks", "Blocks in the arenas", _PRIVATE),
                )
            ),
            sizing_mode="stretch_both",
        )

    def _line(self, name: str, title: str, color: str) -> Any:
        plot = figure(
            title=title,
            x_axis_type="datetime",
            tools="xpan,xwheel_zoom,reset",
            sizing_mode="stretch_both",
            min_height=120,
        )
        plot.varea(x="at", y1=0, y2=name, source=self.source, color=color, alpha=0.3)
        plot.line(x="at", y=name, source=self.source, color=color, line_width=2)
        plot.y_range.start = 0
        if name == "used":
            _count_bytes(plot.yaxis)
        return plot

    def show(self, last: Moment) -> None:
        """Add the moments that are new."""
        shown = self.source.data["at"][-1] / 1000 if len(self.source.data["at"]) else 0.0
        new = [moment for moment in self._history.moments if moment.at > shown + 1e-3]
        totals = {
            name: [sum(node.state[name] for node in moment.nodes) for moment in new] for name in ("used", "blocks")
        }
        self.source.stream({"at": [moment.at * 1000 for moment in new], **totals}, rollover=600)


class MovedPlot(_Part):
    """The bytes that were published, attached, found and adopted, and those that were sent, by reason."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self.source = ColumnDataSource({name: [] for name in ("event", "bytes", "color", "text")})
        self.root = figure(
            title="Values moved since sharing was switched on",
            y_range=FactorRange(),
            tools="",
            sizing_mode="stretch_both",
            min_height=160,
        )
        self.root.hbar(y="event", right="bytes", height=0.8, color="color", source=self.source)
        self.root.add_tools(HoverTool(tooltips="@event: @text"))
        _count_bytes(self.root.xaxis)
        self.root.x_range.start = 0

    def show(self, last: Moment) -> None:
        """Show a bar for each event, and for each reason why values were sent."""
        total: dict[str, Any] = {}
        for node in last.nodes:
            metrics.add(total, node.counters)
        nothing = {"count": 0, "bytes": 0}
        bars = [(event, total.get(event, nothing), _USED) for event in metrics.EVENTS]
        bars += [(f"sent: {reason}", pair, _SENT) for reason, pair in sorted(total.get("sent", {}).items())]
        self.root.y_range.factors = [event for event, _, _ in reversed(bars)]
        self.source.data = {
            "event": [event for event, _, _ in bars],
            "bytes": [pair["bytes"] for _, pair, _ in bars],
            "color": [color for _, _, color in bars],
            "text": [f"{format_bytes(pair['bytes'])} in {pair['count']:,} values" for _, pair, _ in bars],
        }


class ValuesTable(_Part):
    """The largest values in the arenas, with their holders."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self.root = Div(text="", sizing_mode="stretch_both", styles={"overflow": "auto"})

    def show(self, last: Moment) -> None:
        """Show a row for each value."""
        values = sorted(
            ((node.name, value) for node in last.nodes for value in node.values), key=lambda found: -found[1].size
        )
        rows = [
            (_shortened(value.key), value.type, value.shape, format_bytes(value.size), name, _named(value.holders))
            for name, value in values[:_MAX_VALUES]
        ]
        self.root.text = f"<b>Largest values</b>{_table(('key', 'type', 'shape', 'size', 'node', 'held by'), rows)}"


def _named(holders: tuple[str, ...]) -> str:
    more = len(holders) - _MAX_HOLDERS
    return ", ".join(holders[:_MAX_HOLDERS]) + (f" and {more} more" if more > 0 else "")


def _shortened(key: str) -> str:
    return key if len(key) <= _MAX_LABEL else f"{key[: _MAX_LABEL - 1]}…"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(tag: str, cells: Iterable[str]) -> str:
        style = "text-align: left; padding: 2px 12px 2px 0; white-space: nowrap"
        return f"<tr>{''.join(f'<{tag} style={chr(34)}{style}{chr(34)}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{line('th', header)}{''.join(line('td', cells) for cells in rows)}</table>"


class SharedMemoryPage(_Part):
    """All parts together, with a note about Dask's own plots."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self._parts = [kind(history) for kind in (NodesPlot, MovedPlot, TimePlot, ValuesTable)]
        nodes, moved, over_time, values = (part.root for part in self._parts)
        note = Div(text=_NOTE, sizing_mode="stretch_width")
        self.root = column(
            row(column(nodes, moved, sizing_mode="stretch_both"), over_time, sizing_mode="stretch_both"),
            row(column(values, sizing_mode="stretch_both"), sizing_mode="stretch_width", height=260),
            note,
            sizing_mode="stretch_both",
        )

    def show(self, last: Moment) -> None:
        """Show a moment in all parts."""
        for part in self._parts:
            part.update()


def open_pages(scheduler: Any, history: History) -> DashboardPages:
    """Add the page and its plots to the dashboard of a scheduler; ``close`` of the result takes them away."""
    plots = {"nodes": NodesPlot, "over-time": TimePlot, "moved": MovedPlot, "values": ValuesTable}
    return DashboardPages(
        scheduler,
        {"/shared-memory": _fill(SharedMemoryPage, history)},
        {f"/individual-shared-memory-{name}": _fill(kind, history) for name, kind in plots.items()},
        lambda: _panel(history),
    )


def _fill(kind: Callable[[History], _Part], history: History) -> Fill:
    def fill(doc: Document) -> None:
        part = kind(history)
        part.update()
        add_periodic_callback(doc, part, _INTERVAL_MS)
        doc.add_root(part.root)

    return fill


def _panel(history: History) -> TabPanel:
    page = SharedMemoryPage(history)
    page.update()
    return TabPanel(child=page.root, title="Shared Memory")
