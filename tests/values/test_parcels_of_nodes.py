"""Parcels carry values from one arena to another, with their versions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from two_arenas import *  # noqa: F403 - pytest looks for fixtures here
from two_arenas import fill, published_in, received

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.values import handles, parcels
from dask_shm_plugin.values.codec import Serialized
from dask_shm_plugin.values.parcels import Parcel
from dask_shm_plugin.values.versions import Versions

VALUES = [
    np.random.default_rng(0).random(100_000),
    np.asfortranarray(np.random.default_rng(0).random((300, 300))),
    pd.DataFrame({"x": np.random.default_rng(0).random(50_000), "date": np.arange(50_000).astype("datetime64[s]")}),
    {"big": np.arange(100_000), "small": "text"},
]


def equal(one: Any, other: Any) -> bool:
    """Return whether two of these values are equal."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return one.equals(other) if isinstance(one, pd.DataFrame) else bool(np.array_equal(one, other))


@pytest.mark.parametrize("value", VALUES, ids=["array", "Fortran", "DataFrame", "dict"])
def test_a_value_lands_with_its_version(two_arenas: tuple[Arena, Arena], value: Any) -> None:
    """Each holder on the other node, and those on the first one, publish it under the same version."""
    here, there = two_arenas
    sent = published_in(here, value)
    parcel = received(parcels.message_of(sent, here))
    assert type(parcel) is Parcel
    landed, arrived = parcel.landed(there)
    assert landed is not None
    assert equal(arrived, value)
    assert landed.handle.version == sent.handle.version
    assert landed.handle.arena_id == there.arena_id
    assert landed.handle.is_from_afar
    for arena, published in ((there, landed), (here, sent)):
        again = published_in(arena, handles.resolve(published.handle))
        assert again.copied == 0
        assert again.handle.version == sent.handle.version


def test_a_value_that_has_changed_has_another_version(two_arenas: tuple[Arena, Arena]) -> None:
    """Also if only its small parts differ: names of columns, a dtype, the order of the axes."""
    here, _ = two_arenas
    frame = pd.DataFrame(np.random.default_rng(0).random((100_000, 2)), columns=["x", "y"])
    first = published_in(here, frame)
    mapped = handles.resolve(first.handle)
    other = mapped.copy(deep=False)
    other.columns = ["y", "x"]
    renamed = published_in(here, other)
    assert renamed.copied == 0
    assert renamed.handle.version != first.handle.version
    array = np.random.default_rng(0).random((300, 300))
    one = published_in(here, array)
    assert published_in(here, handles.resolve(one.handle).view("i8")).handle.version != one.handle.version
    assert published_in(here, handles.resolve(one.handle).T).handle.version != one.handle.version
    written = handles.resolve(one.handle)
    written[0, 0] += 1
    assert published_in(here, written).handle.version != one.handle.version


def test_a_value_arrives_where_there_is_no_room(
    two_arenas: tuple[Arena, Arena], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made from the received memory then, and may be written to."""
    here, there = two_arenas
    value = np.random.default_rng(0).random(100_000)
    parcel = received(parcels.message_of(published_in(here, value), here))

    fill(monkeypatch)
    landed, arrived = parcel.landed(there)
    assert landed is None
    assert np.array_equal(arrived, value)
    assert arrived.flags.writeable


def test_a_scattered_parcel_is_never_seen(two_arenas: tuple[Arena, Arena]) -> None:
    """It becomes the value when it is unpickled, also in a process that is in no arena or in several."""
    value = np.random.default_rng(0).random(100_000)
    arrived = received(parcels.scatter_message_of(Serialized.of(value, {})))
    assert np.array_equal(arrived, value)


def test_few_versions_are_kept() -> None:
    """The oldest one is forgotten: a value is sent once more than needed then."""
    versions = Versions()
    for number in range(5000):
        versions.note(b"%d" % number, b"version")
    assert versions.of(b"4999") == b"version"
    assert versions.of(b"0") == b"0"
