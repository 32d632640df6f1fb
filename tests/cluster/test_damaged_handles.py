"""Changed handles, other versions and damaged tables: values travel as bytes, and one warning gives the reason."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusters import local_cluster
from describing import assert_same
from distributed import Client
from observing import addresses, array, fresh, see_on, wait_until

import dask_shm_plugin
from dask_shm_plugin import notices
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.config import options
from dask_shm_plugin.node import membership, rendezvous
from dask_shm_plugin.roles.role import Role
from dask_shm_plugin.table import layout
from dask_shm_plugin.table.layout import BlockId
from dask_shm_plugin.transfer import fetch
from dask_shm_plugin.values import codec, handles
from dask_shm_plugin.values.codec import Serialized
from dask_shm_plugin.values.handles import Handle, Span, Unresolved

pytestmark = pytest.mark.slow

FUZZ = Path(__file__).parents[1] / "stress" / "fuzz"
VALUE = {"large": np.arange(100_000), "other": np.ones(9_000), "text": "text"}

#: Unique to this run of the tests.
CLUSTER = f"hostile-{os.getpid()}"


@pytest.fixture
def arena(caplog: pytest.LogCaptureFixture) -> Iterator[Arena]:
    """An arena with this process as a member; it must be empty at the end."""
    one = membership.join(CLUSTER, "worker", "here", capacity=lambda: 1 << 24)
    assert one is not None
    # Dask logs the errors of deserializers, and the frames of an error keep views.
    caplog.set_level(logging.CRITICAL, "distributed")
    yield one
    try:
        wait_until(lambda: (gc.collect(), one.holdings.tidy(), one.stats().used)[2] == 0, "the arena is empty")
    finally:
        membership.leave(CLUSTER, "worker", "here")


def fields(handle: Handle, **changed: Any) -> list[Any]:
    """Return the fields of a handle as they travel, some of them changed."""
    return [changed.get(field.name, getattr(handle, field.name)) for field in dataclasses.fields(handle)]


def changed_span(handle: Handle, **changed: Any) -> tuple[Any, ...]:
    """Return the parts of a handle with its first span changed."""
    at = next(n for n, part in enumerate(handle.parts) if isinstance(part, Span))
    return (*handle.parts[:at], handle.parts[at]._replace(**changed), *handle.parts[at + 1 :])


NUMBERS = [-1, 0, 1, 4096, 1 << 40, 1 << 63, 1 << 64, 10**5000, 1.5, "1", None, b"", (), BlockId(0, 1)]
CHANGES: dict[str, Any] = {
    "another arena": lambda h: {"arena_id": bytes(16)},
    "no arena": lambda h: {"arena_id": None},
    "a bit of the header": lambda h: {"header": h.header[:-1] + bytes([h.header[-1] ^ 1])},
    "no header": lambda h: {"header": None},
    "no parts": lambda h: {"parts": ()},
    "parts that are none": lambda h: {"parts": 7},
    "parts the other way round": lambda h: {"parts": h.parts[::-1]},
    "a number for a part": lambda h: {"parts": (*h.parts, 1 << 40)},
    "a part twice": lambda h: {"parts": (*h.parts, h.parts[-1])},
    "the checksum": lambda h: {"checksum": h.checksum ^ 1},
}
for _name in ("size", "in_band", "checksum"):
    for _value in NUMBERS[4:]:
        CHANGES[f"{_name} {str(_value)[:9]!r}" if _value != 10**5000 else f"{_name} huge"] = (
            lambda h, name=_name, value=_value: {name: value}
        )
for _name in ("offset", "length"):
    for _value in NUMBERS[:-1]:
        if (_name, _value) != ("offset", 0):
            CHANGES[f"{_name} {_value if _value != 10**5000 else 'huge'!r}"] = lambda h, name=_name, value=_value: {
                "parts": changed_span(h, **{name: value})
            }
for _row in (
    BlockId(1, 1),
    BlockId(0, 2),
    BlockId(-1, 1),
    BlockId(0, -1),
    BlockId(1 << 64, 1),
    BlockId(0, 1 << 64),
    BlockId("0", 1),
    5,
):  # type: ignore[arg-type]
    CHANGES[f"row {_row}"] = lambda h, row=_row: {"parts": changed_span(h, row=row)}


@pytest.mark.parametrize("change", CHANGES)
def test_a_handle_with_any_change_is_refused(arena: Arena, change: str) -> None:
    """It counts as a handle that cannot be resolved, so that the requesting process asks again, for bytes."""
    published = codec.publish(Serialized.of(VALUE, {}), arena)
    other = codec.publish(Serialized.of(np.zeros(50_000), {}), arena)
    assert_same(handles._receive(*fields(published.handle)), VALUE)
    came = handles._receive(*fields(published.handle, **CHANGES[change](published.handle)))
    assert came == Unresolved("damaged")
    del published, other


@pytest.mark.parametrize("change", [change for change in CHANGES if change not in ("another arena", "no arena")])
def test_a_forged_handle_with_a_valid_checksum_does_no_harm(arena: Arena, change: str) -> None:
    """A wrong span shows no byte of another block, no field crashes the process, and no block is held for long."""
    published = codec.publish(Serialized.of(np.full(100_000, 7, np.uint8), {}), arena)
    other = codec.publish(Serialized.of(np.full(50_000, 8, np.uint8), {}), arena)
    made = fields(published.handle, **CHANGES[change](published.handle))
    with contextlib.suppress(Exception):  # some of these fields have no checksum
        made[-1] = handles._checksum(*made[:-1])
    came = handles._receive(*made)
    if isinstance(came, np.ndarray) and "row" not in change:
        assert set(np.unique(came)) <= {0, 7}
    del published, other, came
    arena.holdings.tidy()
    assert arena.stats().blocks == 0


def test_a_handle_that_is_replayed_is_stale(arena: Arena) -> None:
    """Its block was released, and another block lies in its place."""
    published = codec.publish(Serialized.of(np.full(100_000, 1), {}), arena)
    old = pickle.dumps(published.handle)
    del published
    arena.holdings.tidy()
    again = codec.publish(Serialized.of(np.full(100_000, 2), {}), arena)
    came = pickle.loads(old)
    assert (came.reason, came.size) == ("stale", 800_000)
    del again


@pytest.mark.parametrize(
    "asker", ["", "x", ":", "::", "{id}:x:y", "{id}:1", "{id}:1:2:3", "{id}:-1:1", "{id}:999:1", f"{{id}}:{1 << 70}:1"]
)
def test_a_membership_in_an_unknown_form_counts_as_none(arena: Arena, asker: str) -> None:
    """`is_member` returns False and does not raise, so that the requesting process gets bytes."""
    assert not fetch.is_member(arena, [asker.format(id=arena.arena_id.hex())])
    assert fetch.is_member(arena, fetch.askers())


def test_another_version_causes_one_warning_with_the_remedy(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Several roles find a rendezvous of another version: the process warns once, and names the remedy."""
    file = Path(f"/dev/shm{rendezvous.name_for(CLUSTER)}")
    other = Path(f"/dev/shm{rendezvous.name_for(CLUSTER + '-2')}")
    content = bytearray(file.read_bytes())
    content[12] = layout.VERSION + 1
    notices.warn_once.cache_clear()
    caplog.set_level(logging.WARNING, "dask_shm_plugin")
    try:
        for kind in ("nanny", "worker", "worker"):
            # No process attends this rendezvous: a role that finds it warns, and removes it.
            other.touch(0o600)
            other.write_bytes(content)
            role = Role(kind, None, "there", options({}))
            role.cluster = f"{CLUSTER}-2"
            assert asyncio.run(role.join(create=True)) is None
    finally:
        other.unlink(missing_ok=True)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "another version" in record.getMessage()
    assert "install the same" in record.getMessage()


def damage(dask_worker: Any) -> None:
    """Overwrite a word of the table, in a worker."""
    import os

    from dask_shm_plugin.node import membership
    from dask_shm_plugin.table import layout

    (arena,) = membership.all_arenas()
    os.pwrite(arena.segment.fd, b"\xff" * 8, 8 * layout.CAPACITY_WORD)


def prune(dask_worker: Any) -> None:
    """Do the pruning that a worker does every few seconds."""
    dask_worker.plugins["dask-shm"].half._running.publisher.prune()


def listen(dask_worker: Any) -> None:
    """Begin to record, in a worker, the warnings and errors of the package, of Dask and of tornado."""
    import logging

    heard = dask_worker.heard = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append((record.levelname, record.getMessage()))
    for name in ("dask_shm_plugin", "distributed", "tornado"):
        logging.getLogger(name).addHandler(handler)


def heard_by(client: Client, worker: str) -> list[tuple[str, str]]:
    """Return the messages that a worker has recorded."""
    return client.run(lambda dask_worker: list(dask_worker.heard), workers=[worker])[worker]


def test_a_cluster_with_a_damaged_table_goes_on_with_bytes() -> None:
    """Shared values stay as they are, all others are right, each worker warns once, and `unregister` works."""
    with local_cluster(2) as client:
        a, b = addresses(client)
        seeds = [fresh() for _ in range(4)]
        before = client.scatter(array(seeds[0]), broadcast=True)
        here = client.gather(before)
        client.run(listen)
        client.run(damage, workers=[a])
        for worker in (a, b):
            wait_until(lambda worker=worker: heard_by(client, worker), "the housekeeping thread finds the damage")
        for seed, source, reader in ((seeds[1], a, b), (seeds[2], b, a)):
            made = client.submit(array, seed, workers=[source])
            (seen,) = see_on(client, made, [reader])
            assert not seen.shared
            assert_same(made.result(), array(seed))
        assert_same(client.gather(client.scatter(array(seeds[3]), broadcast=True)), array(seeds[3]))
        assert_same(here, array(seeds[0]))
        assert_same(before.result(), array(seeds[0]))
        for worker in (a, b):
            client.run(prune, workers=[worker])
            ((level, text),) = heard_by(client, worker)
            assert level == "WARNING"
            assert "written into the arena" in text
        assert all(arena["capacity"] == 0 for arena in dask_shm_plugin.stats(client).values())
        dask_shm_plugin.unregister(client)
        assert_same(client.submit(array, seeds[1], workers=[b], pure=False).result(), array(seeds[1]))


@pytest.mark.skipif(not FUZZ.exists(), reason="the wheel is tested without its source")
def test_a_short_fuzzing_run_finds_no_error() -> None:
    """The seed gives the same 6,000 inputs each time; ``python tests/stress/fuzz`` tries a million."""
    line = [sys.executable, str(FUZZ), "--inputs", "6000", "--seed", "4", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["total"] == 6000
    assert report["findings"] == []
    assert report["outcomes"]["handles"]["right"]
    assert report["outcomes"]["handles"]["damaged"]
