"""An arena as an observer sees it: plain data, which owns nothing. Sizes are in bytes, ages in seconds."""

from __future__ import annotations

from typing import Any, NamedTuple

ALIVE, FORKED, DEAD = "alive", "only a forked child lives", "dead"


class MemberSeen(NamedTuple):
    """A member: its pid, its roles as pairs of kind and address, whether it stands still, and its state."""

    pid: int
    roles: list[tuple[str, str]]
    is_stopped: bool
    state: str

    @property
    def name(self) -> str:
        """Its first worker or client, or its first role at all, with the address."""
        roles = sorted(self.roles, key=lambda role: role[0] == "nanny")
        return " ".join(roles[0]) if roles else f"pid {self.pid}"


class HolderSeen(NamedTuple):
    """A process that keeps a block from being freed, and the reason."""

    pid: int
    name: str
    reason: str


class BlockSeen(NamedTuple):
    """A block: ``size`` of its ``length`` are used; a value that only travelled has no keys, type and shape."""

    block: str
    keys: list[str]
    type: str
    shape: str
    size: int
    length: int
    state: str
    owner: str
    age: float | None
    holders: list[HolderSeen]


class Snapshot(NamedTuple):
    """An arena at one moment.

    Attributes
    ----------
    largest_fit
        The largest value for which it has room.
    large
        The bytes that the member with the most of them has mapped by large pages; None if they were not measured.
    counters
        The counters of the process of each member, by pid.
    """

    arena: str
    cluster: str
    kind: str
    capacity: int
    used: int
    resident: int
    large: int | None
    largest_fit: int
    age: float | None
    members: list[MemberSeen]
    blocks: list[BlockSeen]
    counters: dict[int, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return the snapshot as dicts and lists."""
        blocks = [block._asdict() | {"holders": [one._asdict() for one in block.holders]} for block in self.blocks]
        return self._asdict() | {"members": [member._asdict() for member in self.members], "blocks": blocks}
