"""The private things of ``distributed`` that we touch are still what they were, and are noticed when they are not."""

from __future__ import annotations

import logging

import distributed.worker
import pytest
from distributed import Client, LocalCluster

from dask_shm_plugin import SharedMemoryPlugin, notices, seams, stats


@pytest.fixture(autouse=True)
def looked_for_anew():
    """Let each test look for itself, and nobody go by what it has found."""
    seams.why_not.cache_clear()
    yield
    seams.why_not.cache_clear()


@pytest.mark.parametrize("seam", seams.SEAMS, ids=lambda seam: seam.name)
def test_a_seam_is_where_it_was(seam):
    """Fails when a version of distributed has moved it: then ``seams`` must follow."""
    assert seam.holds()


def test_a_seam_that_moved_is_named(monkeypatch):
    """Also one whose check itself fails."""
    moved = seams.Seam("Worker.gone", "for the test", lambda: distributed.worker.Worker.gone)
    monkeypatch.setattr(seams, "SEAMS", (*seams.SEAMS, moved))
    assert "Worker.gone" in str(seams.why_not())


def test_names_are_found_in_the_code_of_inner_functions_and_only_if_they_are_there():
    """No source is needed: some installations have none."""

    def outer(it):
        def inner():
            return {"sender": it.told, **it.more}

        return inner

    assert seams._names(outer, "sender", "told", "more")
    assert not seams._names(outer, "sender", "receiver")


def test_a_moved_seam_turns_the_plugin_off_with_one_warning(monkeypatch, caplog):
    """The cluster works as without the plugin."""
    monkeypatch.setattr(seams, "SEAMS", (seams.Seam("Worker.gone", "for the test", lambda: False),))
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
    """Elsewhere than on Linux the reason is given, and nothing else happens."""
    monkeypatch.setattr(seams.sys, "platform", "darwin")
    assert "darwin" in str(seams.why_not())


class _Owner:
    def method(self) -> str:
        return "the class's"


def test_a_replacement_is_undone_without_a_trace():
    """An attribute that came from the class does so again."""
    owner = _Owner()
    replacement = seams.Replacement(owner, "method", lambda: "ours")
    assert owner.method() == "ours"
    assert replacement.old() == "the class's"
    replacement.undo()
    assert owner.method() == "the class's"
    assert vars(owner) == {}


def test_a_replacement_by_somebody_else_stays():
    """What others put over ours is theirs to undo."""
    owner = _Owner()
    replacement = seams.Replacement(owner, "method", lambda: "ours")
    owner.method = lambda: "theirs"
    replacement.undo()
    assert owner.method() == "theirs"


def test_an_item_is_replaced_and_put_back():
    """Handlers are kept in dicts."""
    handlers = {"op": 1}
    replacement = seams.Replacement(handlers, "op", 2)
    assert (handlers, replacement.old) == ({"op": 2}, 1)
    replacement.undo()
    assert handlers == {"op": 1}


def test_a_shared_replacement_lasts_until_its_last_user():
    """Several roles of one process use the same one."""
    owner = _Owner()
    shared = seams.SharedReplacement(owner, "method", lambda: "ours")
    shared.begin()
    shared.begin()
    shared.end()
    assert owner.method() == "ours"
    shared.end()
    assert owner.method() == "the class's"


def test_who_asks_is_told_among_the_serializers():
    """Dask's own names come first, so that a worker without us never tries ours."""
    sent = seams.tagged(["a:1:2"])
    assert sent[:2] == ["dask", "pickle"]
    assert seams.untag(sent) == (["a:1:2"], None)


@pytest.mark.parametrize("serializers", [None, ["pickle"], ["dask", "msgpack"]])
def test_a_request_of_somebody_else_is_left_alone(serializers):
    """Serializers that a user chose are handed on."""
    assert seams.untag(serializers) == ([], serializers)
