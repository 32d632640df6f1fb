"""Who plays which role, at which address: entries of fixed size over a part of the table.

They only help members to find each other. So an entry too many is left out, and what cannot be read is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dask_shm_plugin.memberbook import Member

ENTRIES = 512
_ENTRY = 32
_TEXT_AT = 4
_TEXT_BYTES = (_ENTRY - _TEXT_AT) * 8
WORDS = ENTRIES * _ENTRY
"""Words of eight bytes that a book takes."""

_KINDS = ("nanny", "worker", "client")


class Role(NamedTuple):
    """What a member is in the cluster, and where it listens."""

    member: Member
    kind: str
    address: str


class RoleBook:
    """The roles of all members.

    Parameters
    ----------
    words
        ``WORDS`` words; per entry ``[slot + 1, incarnation, kind, bytes of the address, address ...]``, where a first
        word of zero means that the entry is free. That word is written last.
    """

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self._taken_by = np.frombuffer(words, np.uint64).reshape(-1, _ENTRY)[:, :2]

    def fingerprint(self) -> bytes:
        """Return what changes whenever a role comes or goes."""
        return self._taken_by.tobytes()

    def add(self, role: Role) -> None:
        """Enter a role, if there is room."""
        text = role.address.encode()
        free = next((at for at in range(0, WORDS, _ENTRY) if self._words[at] == 0), None)
        if free is None or len(text) > _TEXT_BYTES:
            return
        self._words[free + 1], self._words[free + 2] = role.member.incarnation, _KINDS.index(role.kind)
        self._words[free + 3] = len(text)
        self._bytes(free)[: len(text)] = text
        self._words[free] = role.member.slot + 1

    def remove(self, role: Role) -> None:
        """Cross one entry out."""
        for at in self._of(role.member):
            if self._read(at) == role:
                self._words[at] = 0
                return

    def remove_all(self, member: Member) -> None:
        """Cross out whatever a member is."""
        for at in list(self._of(member)):
            self._words[at] = 0

    def __iter__(self) -> Iterator[Role]:
        return (self._read(at) for at in range(0, WORDS, _ENTRY) if self._words[at])

    def _of(self, member: Member) -> Iterator[int]:
        for at in range(0, WORDS, _ENTRY):
            if (self._words[at], self._words[at + 1]) == (member.slot + 1, member.incarnation):
                yield at

    def _read(self, at: int) -> Role:
        text = bytes(self._bytes(at)[: min(self._words[at + 3], _TEXT_BYTES)])
        member = Member(self._words[at] - 1, self._words[at + 1])
        return Role(member, _KINDS[self._words[at + 2] % len(_KINDS)], text.decode(errors="replace"))

    def _bytes(self, at: int) -> memoryview:
        return self._words[at + _TEXT_AT : at + _ENTRY].cast("B")
