"""What a user is told about a live cluster: by stats, explain, heartbeats, Prometheus and the command line."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from typing import Any

import numpy as np
import pytest
from clusters import OPTIONS
from distributed import Client, get_worker, wait
from observing import addresses, array, fresh, is_shared, known_workers, pids, shmem, totals, undisturbed, wait_until

from dask_shm_plugin import __version__, config, explain, notices, plugin, stats
from dask_shm_plugin.monitor import arenas
from dask_shm_plugin.monitor.seen import BlockSeen, Snapshot
from dask_shm_plugin.roles import client as halves
from dask_shm_plugin.roles.client import take_part

pytestmark = pytest.mark.slow

MIB = 1 << 20


class Plain:
    """A value of a user's class."""

    def __init__(self) -> None:
        self.array = np.ones(2**16)


def own(client: Client) -> Snapshot:
    """Return the snapshot of the arena of a cluster."""
    [name] = stats(client)
    [found] = [one for one in arenas.snapshots() if one.arena.startswith(name.rpartition("-")[2])]
    return found


def block_of(client: Client, key: str) -> BlockSeen | None:
    """Return the block whose label has a key, or None."""
    return next((block for block in own(client).blocks if key in block.keys), None)


def remember(value: Any) -> None:
    """Let a worker's attribute refer to a value."""
    get_worker().forgotten = value


def forget(dask_worker: Any) -> None:
    """Undo ``remember``."""
    del dask_worker.forgotten


# -- explain


def test_explain_names_the_state_on_each_worker(four: Client) -> None:
    """A result is private until a process asks for it; then its owner adopts it, and the reader maps it."""
    one, other, *rest = addresses(four)
    made = four.submit(array, fresh(), workers=[one])
    wait(made)
    said = explain(made)
    assert said[one]["state"] == "private"
    assert "no process of this machine has asked for it" in said[one]["why"]
    assert {said[address]["state"] for address in (other, *rest)} == {"absent"}
    four.submit(is_shared, made, workers=[other], pure=False).result()
    wait_until(lambda: explain(made)[one]["state"] == "adopted", lambda: f"it is adopted: {explain(made)}")
    assert explain(made)[other]["state"] == "shared"
    assert f"{one}  adopted" in repr(explain(made))


def test_explain_gives_the_reason_for_a_private_copy(four: Client) -> None:
    """The type cannot be rebuilt exactly, or something else reaches the value."""
    one, other, *_ = addresses(four)
    plain = four.submit(Plain, workers=[one], pure=False)
    four.submit(lambda value: value.array.sum(), plain, workers=[other], pure=False).result()
    wait_until(lambda: explain(plain)[one]["state"] == "private copy kept", lambda: f"{explain(plain)}")
    assert "type Plain cannot be rebuilt exactly" in explain(plain)[one]["why"]
    reached = four.submit(array, fresh(), workers=[one])
    four.submit(remember, reached, workers=[one], pure=False).result()
    assert "something else in the worker can reach" in explain(reached)[one]["why"]
    four.run(forget, workers=[one])
    small = four.submit(array, fresh(), 3, workers=[one])
    wait(small)
    assert "less than shm.threshold" in explain(small)[one]["why"]


def test_explain_says_why_a_value_was_sent(four: Client) -> None:
    """A client without the plugin is no member of the arena."""
    one = addresses(four)[0]
    made = four.submit(array, fresh(), workers=[one])
    wait(made)
    with Client(four.scheduler.address, set_as_default=False) as outsider:
        outsider.sync(outsider.scheduler.gather, keys=[made.key])
    assert "it was sent as bytes: not-co-located" in explain(made)[one]["why"]


# -- stats


def test_stats_are_a_dict_with_a_readable_text_and_table(four: Client) -> None:
    """In a notebook, the table uses the colours of the text around it."""
    future = four.scatter(array(fresh()), broadcast=True)
    found = stats(four)
    assert isinstance(found, dict)
    assert json.loads(json.dumps(found)) == found
    [name] = found
    text, page = repr(found), found._repr_html_()
    assert re.match(rf"{name}: \d+\.\d\d kiB of 256\.00 MiB used in \d+ blocks by 5 members, 4 workers; room", text)
    assert "published" in text
    assert "<table>" in page
    assert "currentColor" in page
    assert "color: #" not in page
    del future


def test_a_worker_with_another_version_is_named(four: Client, caplog: pytest.LogCaptureFixture) -> None:
    """One warning says which worker has which version."""
    notices.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="dask_shm_plugin"):
        plugin._warn_of_versions([{"worker": "tcp://one", "version": __version__}])
        plugin._warn_of_versions([{"worker": "tcp://other", "version": "0.0.1"}])
    [record] = caplog.records
    assert "tcp://other has 0.0.1" in record.getMessage()
    assert all("version" in worker["metrics"]["shm"] for worker in known_workers(four).values())


# -- heartbeats and Prometheus


def test_heartbeats_describe_the_arena_and_the_largest_values(four: Client) -> None:
    """They are plain data, and name the processes that hold a value."""
    future = four.scatter(array(fresh()), broadcast=True)

    def told() -> list[tuple[dict[str, Any], dict[str, Any]]]:
        metrics = [worker["metrics"].get("shm", {}) for worker in known_workers(four).values()]
        values = [(one, value) for one in metrics for value in one.get("values", ()) if value["key"] == future.key]
        # A heartbeat in the middle of the broadcast tells about fewer holders.
        return [(one, value) for one, value in values if len(value["holders"]) >= 4]

    wait_until(lambda: len(told()) == 4, "each worker tells about the value, and who holds it")
    one, value = told()[0]
    assert (value["type"], value["shape"], value["bytes"]) == ("numpy.ndarray", "32,768 float64", 256 << 10)
    assert one["state"]["used"] >= 256 << 10
    assert one["private"] > MIB


def metrics_page(address: str) -> str:
    """Return the lines of a page of metrics that are about this package."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as page:
        return "".join(line for line in page.read().decode().splitlines(keepends=True) if "dask_shm_" in line)


def metrics_of(address: str) -> dict[str, float]:
    """Return the metrics of this package on a page."""
    lines = [line for line in metrics_page(address).splitlines() if not line.startswith("#")]
    return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_workers_and_the_scheduler_have_metrics_for_prometheus(four: Client) -> None:
    """The names follow Prometheus's conventions: a unit at the end, and ``_total`` behind the unit of a counter."""
    client_module = pytest.importorskip("prometheus_client")
    future = four.scatter(array(fresh()), broadcast=True)
    workers = known_workers(four)
    pages = [f"127.0.0.1:{worker['services']['dashboard']}" for worker in workers.values()]
    pages.append(four.dashboard_link.split("/")[2])
    for page in pages:
        found = wait_until(
            lambda page=page: (seen := metrics_of(page)).get("dask_shm_arena_used_bytes", 0) >= 256 << 10 and seen,
            "the metrics have the value",
        )
        for name in found:
            assert name.endswith(("_bytes", "_blocks", "_members", "_bytes_total", "_values_total")), name
        assert found["dask_shm_arena_members"] == 5
    with urllib.request.urlopen(f"http://{pages[0]}/metrics", timeout=20) as page:
        from prometheus_client.parser import text_string_to_metric_families

        families = {one.name: one for one in text_string_to_metric_families(page.read().decode())}
    assert families["dask_shm_published_bytes"].type == "counter"
    assert families["dask_shm_arena_used_bytes"].type == "gauge"
    assert all(one.documentation for name, one in families.items() if name.startswith("dask_shm_"))
    assert client_module
    del future


def test_the_scheduler_counts_what_clients_move(four: Client) -> None:
    """A scatter copies into the arena in the client, and a gather maps there. The counts outlast the client."""
    pytest.importorskip("prometheus_client")
    address = four.dashboard_link.split("/")[2]

    def moved() -> list[float]:
        found = metrics_of(address)
        return [found[f"dask_shm_{event}_bytes_total"] for event in ("published", "attached")]

    def is_quiet() -> bool:
        before = moved()
        time.sleep(1.5)  # three heartbeats, or pauses between what a client tells
        [counters] = [half._counters for half in halves._HALVES if half.client is four]
        return counters._timer is None and counters._task.done() and moved() == before

    wait_until(lambda: metrics_of(address), "the scheduler knows the arena")
    wait_until(is_quiet, "what was done before is told", seconds=60)
    published, attached = moved()
    size = array(0).nbytes
    future = four.scatter(array(fresh()))
    wait_until(lambda: moved()[0] == published + size, lambda: f"{moved()}")
    assert is_shared(future.result())
    wait_until(lambda: moved()[1] >= attached + size, lambda: f"{moved()}")
    with Client(four.scheduler.address, set_as_default=False) as other:
        other.sync(take_part, other, config.options(OPTIONS))
        other.scatter(array(fresh()))
        wait_until(lambda: moved()[0] == published + 2 * size, lambda: f"{moved()}")
    time.sleep(1.2)
    assert moved()[0] == published + 2 * size


def test_promtool_finds_nothing_to_improve(four: Client) -> None:
    """Prometheus's own tool checks names, types and help texts on the pages of the scheduler and a worker."""
    promtool = shutil.which("promtool") or pytest.skip("promtool is not installed")
    sender = four.submit(Plain, pure=False)  # sent as bytes, for a reason
    four.gather(sender)
    worker = next(iter(known_workers(four).values()))
    pages = [four.dashboard_link.split("/")[2], f"127.0.0.1:{worker['services']['dashboard']}"]
    for page in pages:
        text = wait_until(lambda page=page: metrics_page(page), "the page has metrics")
        done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


# -- the command line


def test_the_command_line_sees_the_cluster_as_the_cluster_sees_itself(four: Client) -> None:
    """Another process prints the same bytes, and knows keys and holders."""
    future = four.scatter(array(fresh()), broadcast=True)
    block = wait_until(lambda: block_of(four, future.key), "the block has a label")
    assert (block.type, block.shape, block.size) == ("numpy.ndarray", "32,768 float64", 256 << 10)
    wait_until(
        lambda: sum("holds key" in one.reason for one in block_of(four, future.key).holders) == 4, "all four hold it"
    )
    done = subprocess.run(
        [sys.executable, "-m", "dask", "shm", "list", "--json"], capture_output=True, text=True, timeout=60, check=True
    )
    arena = own(four).arena
    [listed] = [one for one in json.loads(done.stdout) if one["arena"] == arena]
    figures = totals(four)
    assert (listed["used"], len(listed["blocks"]), len(listed["members"])) == (figures.used, figures.blocks, 5)
    assert {pid for one in listed["members"] for pid in [one["pid"]]} == {os.getpid(), *pids(four).values()}


def test_a_forgotten_variable_of_the_client_is_found(four: Client) -> None:
    """The view is in this process; the key is gone."""
    one = addresses(four)[0]
    future = four.submit(array, fresh(), workers=[one])
    key, forgotten = future.key, future.result()
    wait_until(lambda: block_of(four, key), "the block has a label")
    del future
    wait_until(
        lambda: [[holder.pid for holder in block.holders] for block in own(four).blocks] == [[os.getpid()]],
        lambda: f"only this process holds it: {own(four).blocks}",
    )
    [block] = own(four).blocks
    assert block.keys == []
    assert block.holders[0].reason == f"a view lives in pid {os.getpid()}"
    del forgotten
    gc.collect()
    wait_until(lambda: own(four).used == 0, "the block is freed")


def test_used_and_resident_bytes_agree_with_the_kernel(four: Client) -> None:
    """The growth of shared memory on the machine is that of the arena, apart from other programs."""
    data = np.random.default_rng(fresh()).random(4 * MIB)

    def difference() -> int:
        wait_until(lambda: own(four).used == 0, "the arena is empty")
        before, machine = own(four), shmem()
        future = four.scatter(data, broadcast=True, hash=False)
        after, grown = own(four), shmem() - machine
        assert after.used - before.used == 32 * MIB
        del future
        return abs(after.resident - before.resident - grown)

    assert undisturbed(difference, lambda found: found < 16 * MIB) < 16 * MIB
