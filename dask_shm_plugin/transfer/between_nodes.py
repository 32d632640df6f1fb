"""What two nodes say to each other about a value: a request of a node, and the answer that sends no bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
from collections.abc import Iterable
from typing import NamedTuple

from distributed.protocol.serialize import Serialized

from dask_shm_plugin import __version__
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.table.members import Member

_NODE = f"node {__version__}:"
"""Begins a request of a node. Workers of other versions do not know it, and send bytes: their parcels may differ."""


class NodeRequest(NamedTuple):
    """A request of a worker whose arena takes what comes from other nodes.

    Attributes
    ----------
    arena_id
        The id of the arena of the requesting worker, in hexadecimal digits.
    member
        The member that asks.
    has
        The versions that the arena has of the requested keys, in hexadecimal digits.
    lost
        Members for which the worker has waited in vain.
    """

    arena_id: str
    member: Member
    has: frozenset[str]
    lost: frozenset[Member]

    @classmethod
    def of(cls, arena: Arena, has: Iterable[bytes], lost: Iterable[Member]) -> NodeRequest:
        """Return the request of a member of an arena."""
        return cls(arena.arena_id.hex(), arena.member, frozenset(version.hex() for version in has), frozenset(lost))

    @property
    def asker(self) -> str:
        """The request as one of the names of the requesting process; it stands behind the memberships."""
        return _NODE + json.dumps([self.arena_id, self.member, sorted(self.has), sorted(self.lost)])

    @classmethod
    def among(cls, asked_by: list[str]) -> NodeRequest | None:
        """Return the request among the names of a requesting process, or None if there is none of a known form."""
        with contextlib.suppress(ValueError, TypeError):
            for asker in asked_by:
                if asker.startswith(_NODE):
                    arena_id, member, has, lost = json.loads(asker[len(_NODE) :])
                    return cls(arena_id, Member(*member), frozenset(has), frozenset(Member(*one) for one in lost))
        return None


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """Travels instead of a value that the arena of the requesting worker has, or is about to have.

    Attributes
    ----------
    version
        The version of the value that would be sent now.
    size
        Its bytes.
    receiver
        The member that is receiving it, or None if the requesting worker has named this version.
    """

    version: bytes
    size: int
    receiver: Member | None

    @property
    def message(self) -> Serialized:
        """The message to send."""
        return Serialized({"serializer": "pickle", "writeable": ()}, [pickle.dumps(self)])
