"""Two arenas in one process, in place of those of two nodes."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from distributed.protocol.serialize import deserialize, serialize

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import ArenaFull
from dask_shm_plugin.node import membership
from dask_shm_plugin.values import codec
from dask_shm_plugin.values.codec import Published, Serialized


@pytest.fixture
def two_arenas() -> Iterator[tuple[Arena, Arena]]:
    """Two arenas in this process: those of two nodes."""
    names = [f"tcp://{secrets.token_hex(8)}" for _ in range(2)]
    arenas = [membership.join(name, "nanny", "tcp://here", capacity=lambda: 64 << 20, warm=2**20) for name in names]
    first, second = arenas
    assert first is not None
    assert second is not None
    yield first, second
    for name in names:
        membership.leave(name, "nanny", "tcp://here")


def published_in(arena: Arena, value: object) -> Published:
    """Publish a value."""
    return codec.publish(Serialized.of(value, {}), arena)


def received(message: Any) -> Any:
    """Return what a connection delivers: frames in memory that may be written to."""
    header, frames = serialize(message)
    return deserialize(header, [memoryview(bytearray(frame)) for frame in frames])


def fill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no arena of this process have room for another block."""

    def refuse(*args: Any) -> Any:
        raise ArenaFull("no room")

    monkeypatch.setattr(Arena, "draft", refuse)
