"""The roles of the members and their addresses: entries of fixed size.

Roles only help members to find each other. So a role for which there is no room is left out, and a damaged entry is
decoded without an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dask_shm_plugin.table.members import Member

ENTRIES = 512
_ENTRY = 32
_TEXT_AT = 4
_TEXT_BYTES = (_ENTRY - _TEXT_AT) * 8
WORDS = ENTRIES * _ENTRY
"""Words of eight bytes that all entries take."""

_KINDS = ("nanny", "worker", "client")
_USES = 1 << 60


class RoleEntry(NamedTuple):
    """A role of a member in the cluster, and the address at which it listens."""

    member: Member
    kind: str
    address: str


class RoleEntries:
    """The roles of all members.

    Parameters
    ----------
    words
        ``WORDS`` words; per entry ``[slot + 1, incarnation, uses and kind, bytes of the address, address ...]``, where
        *uses* grows with each role that takes the entry. An entry is free if its first word is zero. That word is written last.
    """

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self._heads = np.frombuffer(words, np.uint64).reshape(-1, _ENTRY)[:, :3]

    def fingerprint(self) -> bytes:
        """Return bytes that differ after a role was added or removed."""
        return self._heads.tobytes()

    def add(self, role: RoleEntry) -> None:
        """Enter a role. It is left out if no entry is free or its address is too long."""
        text = role.address.encode()
        free = next((at for at in range(0, WORDS, _ENTRY) if self._words[at] == 0), None)
        if free is None or len(text) > _TEXT_BYTES:
            return
        uses = (self._words[free + 2] // len(_KINDS) + 1) % _USES
        self._words[free + 1], self._words[free + 2] = (
            role.member.incarnation,
            uses * len(_KINDS) + _KINDS.index(role.kind),
        )
        self._words[free + 3] = len(text)
        self._bytes(free)[: len(text)] = text
        self._words[free] = role.member.slot + 1

    def remove(self, role: RoleEntry) -> None:
        """Clear the entry of a role; harmless if there is none."""
        for at in self._of(role.member):
            if self._read(at) == role:
                self._words[at] = 0
                return

    def remove_all(self, member: Member) -> None:
        """Clear all entries of a member."""
        for at in list(self._of(member)):
            self._words[at] = 0

    def __iter__(self) -> Iterator[RoleEntry]:
        return (self._read(at) for at in range(0, WORDS, _ENTRY) if self._words[at])

    def _of(self, member: Member) -> Iterator[int]:
        for at in range(0, WORDS, _ENTRY):
            if (self._words[at], self._words[at + 1]) == (member.slot + 1, member.incarnation):
                yield at

    def _read(self, at: int) -> RoleEntry:
        text = bytes(self._bytes(at)[: min(self._words[at + 3], _TEXT_BYTES)])
        member = Member(self._words[at] - 1, self._words[at + 1])
        return RoleEntry(member, _KINDS[self._words[at + 2] % len(_KINDS)], text.decode(errors="replace"))

    def _bytes(self, at: int) -> memoryview:
        return self._words[at + _TEXT_AT : at + _ENTRY].cast("B")
