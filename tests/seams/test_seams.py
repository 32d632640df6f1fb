"""The private names of ``distributed`` that the package uses are unchanged, and a change is noticed."""

from __future__ import annotations

import logging
from typing import Any, cast

import distributed.worker
import pytest
from distributed import Client, LocalCluster
from distributed.comm import tcp

from dask_shm_plugin import SharedMemoryPlugin, notices, stats
from dask_shm_plugin.seams import checks, receiving, requests
from dask_shm_plugin.seams.replacement import Replacement, SharedReplacement
from dask_shm_plugin.transfer import receiving as transfer_receiving


@pytest.fixture(autouse=True)
def fresh_check():
    """Clear the result of the check before and after each test."""
    checks.why_not.cache_clear()
    yield
    checks.why_not.cache_clear()


@pytest.mark.parametrize("seam", checks.SEAMS, ids=lambda seam: seam.name)
def test_each_seam_is_in_its_place(seam):
    """A failure means that a version of distributed has moved this seam: ``seams`` must follow."""
    assert seam.holds()


def test_a_seam_that_moved_is_named(monkeypatch):
    """If the check of a seam raises, the seam counts as moved, too."""
    moved = checks.Seam("Worker.gone", "for the test", lambda: distributed.worker.Worker.gone)
    monkeypatch.setattr(checks, "SEAMS", (*checks.SEAMS, moved))
    assert "Worker.gone" in str(checks.why_not())


def test_names_are_found_in_the_code_of_inner_functions_and_only_if_they_are_there():
    """The check needs no source, because some installations have none."""

    def outer(it):
        def inner():
            return {"sender": it.told, **it.more}

        return inner

    assert checks.names(outer, "sender", "told", "more")
    assert not checks.names(outer, "sender", "receiver")


def test_a_moved_seam_turns_the_plugin_off_with_one_warning(monkeypatch, caplog):
    """The cluster then works as without the plugin."""
    monkeypatch.setattr(checks, "SEAMS", (checks.Seam("Worker.gone", "for the test", lambda: False),))
    notices.warn_once.cache_clear()
    with (
        caplog.at_level(logging.WARNING, logger="dask_shm_plugin"),
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(SharedMemoryPlugin())
        client.register_plugin(SharedMemoryPlugin())
        assert client.submit(sum, [1, 2]).result() == 3
        assert stats(client) == {}
    assert [record.message for record in caplog.records if "Worker.gone" in record.message].__len__() == 1


def test_another_platform_is_not_an_error(monkeypatch):
    """On systems other than Linux, the reason is returned, and nothing is raised."""
    monkeypatch.setattr(checks.sys, "platform", "darwin")
    assert "darwin" in str(checks.why_not())


class _Owner:
    def method(self) -> str:
        return "the class's"


def test_a_replacement_is_undone_without_a_trace():
    """An attribute that came from the class comes from the class again."""
    owner = _Owner()
    replacement = Replacement(owner, "method", lambda: "ours")
    assert owner.method() == "ours"
    assert replacement.old() == "the class's"
    replacement.undo()
    assert owner.method() == "the class's"
    assert vars(owner) == {}


def test_undo_leaves_a_later_replacement_in_place():
    """Other code that has replaced the attribute since must undo that itself."""
    owner = _Owner()
    replacement = Replacement(owner, "method", lambda: "ours")
    owner.method = lambda: "theirs"
    replacement.undo()
    assert owner.method() == "theirs"


def test_an_item_is_replaced_and_put_back():
    """Dask keeps its handlers in dicts."""
    handlers = {"op": 1}
    replacement = Replacement(handlers, "op", 2)
    assert (handlers, replacement.old) == ({"op": 2}, 1)
    replacement.undo()
    assert handlers == {"op": 1}


def test_a_shared_replacement_lasts_until_its_last_user():
    """Several roles of one process use the same replacement."""
    owner = _Owner()
    shared = SharedReplacement(owner, "method", lambda: "ours")
    shared.begin()
    shared.begin()
    shared.end()
    assert owner.method() == "ours"
    shared.end()
    assert owner.method() == "the class's"


def test_a_request_names_its_memberships_after_dasks_serializers():
    """Dask's own names come first, so that a worker without the plugin never tries the tags."""
    sent = requests.tagged(["a:1:2"])
    assert sent[:2] == ["dask", "pickle"]
    assert requests.untag(sent) == (["a:1:2"], None)


@pytest.mark.parametrize("serializers", [None, ["pickle"], ["dask", "msgpack"]])
def test_serializers_without_a_tag_are_left_alone(serializers):
    """Serializers that a user has chosen are passed on."""
    assert requests.untag(serializers) == ([], serializers)


@pytest.mark.parametrize("seam", receiving.SEAMS, ids=lambda seam: seam.name)
def test_connections_receive_as_expected(seam: checks.Seam) -> None:
    """The installed version of distributed receives large frames through the function that is replaced."""
    assert seam.holds()


def test_without_its_seam_nothing_is_received_into_the_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning says so; everything else goes on."""
    monkeypatch.setattr(receiving, "SEAMS", (checks.Seam("read_bytes_rw", "for the test", lambda: False),))
    receiving.why_not.cache_clear()
    warnings: list[str] = []
    monkeypatch.setattr(transfer_receiving, "warn_once", warnings.append)
    before = tcp.read_bytes_rw
    try:
        one = transfer_receiving.Receiving(cast("Any", None))
        assert tcp.read_bytes_rw is before
        one.stop()
    finally:
        receiving.why_not.cache_clear()
    (warning,) = warnings
    assert "read_bytes_rw" in warning
