"""The page of the dashboard: it follows the cluster, and is gone after the plugin was unregistered."""

from __future__ import annotations

import json
import logging
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusters import local_cluster, register
from distributed import Client, LocalCluster, performance_report
from observing import array, fresh, wait_until
from processes import command, dask, read_address

from dask_shm_plugin import metrics, notices, unregister
from dask_shm_plugin.monitor import history
from dask_shm_plugin.monitor.nodes import Node, ValueSeen
from dask_shm_plugin.seams.checks import Seam

pytest.importorskip("bokeh")
from jinja2 import TemplateNotFound

from dask_shm_plugin.seams import dashboard as seam

pytestmark = pytest.mark.slow
PAGE = "shared-memory"
PLOTS = [f"individual-shared-memory-{name}" for name in ("moved", "nodes", "over-time", "values")]


@pytest.fixture(scope="module")
def client(nothing_leaks: None) -> Iterator[Client]:
    """Yield a client of two workers that share one value, and have sent one."""
    with local_cluster(2) as client:
        yield client


@pytest.fixture
def sharing(client: Client) -> Any:
    """Keep a value of four MiB on both workers, and return its future."""
    register(client, threshold="64 KiB", capacity="256 MiB")
    return client.scatter(np.random.default_rng(fresh()).random(2**19), broadcast=True)


def get(client: Client, path: str) -> str:
    """Return a page of the dashboard."""
    address = client.dashboard_link.rpartition("/")[0]
    with urllib.request.urlopen(f"{address}/{path}", timeout=20) as page:
        return page.read().decode()


def is_there(client: Client, path: str) -> bool:
    """Return whether the dashboard has a page."""
    try:
        get(client, path)
    except urllib.error.HTTPError:
        return False
    return True


@pytest.mark.parametrize("seam", seam.SEAMS, ids=lambda seam: seam.name)
def test_each_seam_of_the_dashboard_is_in_its_place(seam: Seam) -> None:
    """A failure means that a version of distributed has moved this seam: ``seams`` must follow."""
    assert seam.holds()


def test_the_page_has_a_tab_and_plots_and_is_listed_for_jupyterlab(client: Client, sharing: Any) -> None:
    """All other pages stay, and have the new tab, too."""
    assert f'href="{PAGE}"' in get(client, "status")
    assert f'href="{PLOTS[0]}"' in get(client, PAGE)
    listed = json.loads(get(client, "individual-plots.json")).values()
    assert {f"/{plot}" for plot in PLOTS} < set(listed)
    assert "/individual-cpu" in listed
    assert all(is_there(client, path) for path in [PAGE, *PLOTS, "status", "individual-cpu"])


def test_the_page_is_gone_after_unregistering_and_back_after_registering(client: Client, sharing: Any) -> None:
    """The tab disappears from all pages; to register twice makes one tab."""
    register(client, threshold="64 KiB", capacity="256 MiB")
    assert get(client, "status").count(f'href="{PAGE}"') == 1
    unregister(client)
    assert not any(is_there(client, path) for path in [PAGE, *PLOTS])
    assert PAGE not in get(client, "status")
    assert is_there(client, "individual-cpu")
    register(client, threshold="64 KiB", capacity="256 MiB")
    assert is_there(client, PAGE)


def test_a_performance_report_contains_the_page(client: Client, sharing: Any, tmp_path: Path) -> None:
    """It is a tab behind those of Dask."""
    report = tmp_path / "report.html"
    try:
        with performance_report(str(report)):
            client.submit(array, fresh()).result()
    except TemplateNotFound:
        pytest.skip("this version of Dask makes no reports with this version of Bokeh")
    text = report.read_text()
    assert '"title":"Task Stream"' in text.replace('": "', '":"')
    assert "Memory by node" in text
    assert "Largest values" in text.replace("&lt;b&gt;", "")


def test_only_the_page_is_missing_when_a_name_has_changed(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Values are shared all the same, and one warning is logged."""
    monkeypatch.setattr(seam, "SEAMS", (Seam("dashboard.gone", "for the test", lambda: False),))
    seam.why_not.cache_clear()
    notices.warn_once.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="dask_shm_plugin"):
            register(client, threshold="64 KiB", capacity="256 MiB")
            register(client, threshold="64 KiB", capacity="256 MiB")
        assert [record.getMessage() for record in caplog.records if "dashboard.gone" in record.getMessage()] != []
        assert len(caplog.records) == 1
        assert not is_there(client, PAGE)
        assert client.scatter(np.ones(2**16), broadcast=True).status == "finished"
    finally:
        seam.why_not.cache_clear()


def test_a_scheduler_without_a_dashboard_shares_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is logged."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        register(client)
        assert client.submit(array, fresh()).result() is not None
        unregister(client)
    assert not [record for record in caplog.records if record.name == "dask_shm_plugin"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start the browser of the distribution."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def shown(page: Any) -> dict[str, Any]:
    """Return the data of the plots in a page, and the text of its table, from the browser."""
    return page.evaluate(
        """() => {
        const found = {text: ""};
        for (const model of Bokeh.documents[0]._all_models.values()) {
            if (model.type == "ColumnDataSource") Object.assign(found, model.data);
            if (model.type == "Div") found.text += model.text;
        }
        return JSON.parse(JSON.stringify(found, (_, x) => ArrayBuffer.isView(x) ? Array.from(x) : x));
    }"""
    )


def follow(page: Any, address: str, ready: Any) -> dict[str, Any]:
    """Open a page and return what it shows, once it is ready."""
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.wait_for_function("window.Bokeh && Bokeh.documents.length > 0")
    result = wait_until(
        lambda: (found := shown(page)) and ready(found) and found, "the page shows the values", seconds=60
    )
    assert [problem for problem in problems if "favicon" not in problem] == []
    return result


def test_a_browser_shows_the_page(client: Client, sharing: Any, browser: Any, tmp_path: Path) -> None:
    """The bars, the counters and the table have the figures of the cluster, and follow it."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    address = f"{client.dashboard_link.rpartition('/')[0]}/{PAGE}"
    found = follow(page, address, lambda found: sharing.key[:20] in found["text"])
    assert max(found["used"]) >= 2**22
    assert max(found["private"]) > 2**20
    assert "published" in found["event"]
    assert "524,288 float64" in found["text"]
    more = client.scatter(np.random.default_rng(fresh()).random(2**20), broadcast=True)
    wait_until(lambda: more.key[:20] in shown(page)["text"], "the page follows", seconds=60)
    page.screenshot(path=str(tmp_path / "page.png"))
    assert (tmp_path / "page.png").stat().st_size > 10_000
    page.close()


def test_a_browser_shows_each_plot_alone(client: Client, sharing: Any, browser: Any) -> None:
    """As in the extension of JupyterLab."""
    page = browser.new_page()
    for plot in PLOTS:
        follow(
            page, f"{client.dashboard_link.rpartition('/')[0]}/{plot}", lambda found: len(found) > 1 or found["text"]
        )
    page.close()


def test_the_page_shows_64_workers_with_a_thousand_blocks_each(
    client: Client, sharing: Any, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight nodes have eight workers each."""
    counters = {event: {"count": 9, "bytes": 2**20} for event in metrics.EVENTS} | {
        "sent": {"stale": {"count": 1, "bytes": 1}}
    }
    state = {"capacity": 2**30, "used": 2**29, "resident": 2**29, "blocks": 1000, "members": 9}
    held = tuple(f"tcp://10.0.0.1:{n}" for n in range(8))
    values = [ValueSeen(f"key-{n}", "numpy.ndarray", "3 float64", 2**20 + n, held) for n in range(40)]
    made = [Node(f"node-{n}", state, dict.fromkeys(held, 2**27), counters, values) for n in range(8)]
    monkeypatch.setattr(history, "nodes", lambda scheduler, clients: made)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    address = f"{client.dashboard_link.rpartition('/')[0]}/{PAGE}"
    found = follow(page, address, lambda found: "key-39" in found["text"])
    assert len(found["node"]) == 8
    assert max(found["blocks"]) == 8000
    assert found["text"].count("<tr>") == 21
    assert "sent: stale" in found["event"]
    page.close()


def test_the_page_works_behind_a_prefix_with_a_scheduler_of_its_own(browser: Any, tmp_path: Path) -> None:
    """The scheduler is another process, and all pages lie under the prefix of a proxy."""
    file = tmp_path / "scheduler.json"
    line = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file)]
    line += ["--dashboard-address", "127.0.0.1:0", "--dashboard-prefix", "/proxy"]
    worker = ["worker", "--scheduler-file", str(file), "--nworkers", "2", "--nthreads", "1", "--no-dashboard"]
    with command(*dask(*line)):
        wait_until(lambda: read_address(file), "the scheduler writes its address", seconds=60)
        with command(*dask(*worker)), Client(scheduler_file=str(file)) as client:
            client.wait_for_workers(2)
            register(client)
            future = client.scatter(np.ones(2**19), broadcast=True)
            port = client.scheduler_info()["services"]["dashboard"]
            page = browser.new_page()
            follow(page, f"http://127.0.0.1:{port}/proxy/{PAGE}", lambda found: future.key[:20] in found["text"])
            page.close()
