"""Where in an arena's table everything lies, in words of eight bytes, native order.

::

    header   magic+version, arena id (2 words), capacity, last incarnation, rows in use, how often pages were
             given back, high-water mark (3 words), reserved
    members  see ``memberbook``
    roles    see ``rolebook``
    marks    see ``markbook``
    blocks   BLOCKS rows of   [tag | generation | state, offset, extent, size, owner slot, owner incarnation,
                               reserved x 2]; the first word see ``stateword``
    claims   see ``claimbook``

Behind the table come the members' directories, one after the other, each ``PLACES`` places of ``PLACE_BYTES``; behind
these the blocks themselves.
"""

from __future__ import annotations

from typing import NamedTuple

from dask_shm_plugin import markbook, memberbook, rolebook
from dask_shm_plugin.syscalls import LARGE

VERSION = 7
MAGIC = int.from_bytes(b"daskshm" + bytes([VERSION]), "little")

SPREAD = 4
"""How many times the capacity there are offsets for blocks: gaps between them take no memory."""

MEMBERS = memberbook.SLOTS
BLOCKS = 16384

MAGIC_WORD, ID_WORD, CAPACITY_WORD, INCARNATION_WORD, ROWS_WORD, TRIMS_WORD, MARK_WORD = 0, 1, 3, 4, 5, 6, 7
HEADER = 16
BLOCK = 8
"""Words of one row of blocks."""

MEMBERS_AT = HEADER
ROLES_AT = MEMBERS_AT + memberbook.WORDS
MARKS_AT = ROLES_AT + rolebook.WORDS
BLOCKS_AT = -(-(MARKS_AT + markbook.WORDS) // 512) * 512
CLAIMS_AT = BLOCKS_AT + BLOCKS * BLOCK

SHARED_BYTES = CLAIMS_AT * 8
"""Bytes of the part that every member reads: header, members, roles, marks, blocks."""
CLAIM_BYTES = BLOCKS * 8
"""Bytes of one member's row of claims."""
TABLE_BYTES = SHARED_BYTES + MEMBERS * CLAIM_BYTES
"""Bytes of the whole table."""
PLACE_BYTES = 2048
"""Bytes of one place of a directory: a handle of a DataFrame takes about 1000 (November 2026)."""
DIRECTORY_BYTES = markbook.PLACES * PLACE_BYTES
"""Bytes of one member's directory; only what is used has pages."""
BLOCKS_FROM = -(-(TABLE_BYTES + MEMBERS * DIRECTORY_BYTES) // LARGE) * LARGE
"""Where the blocks begin, in bytes: where a large page does."""


class Row(NamedTuple):
    """One generation of one block."""

    # Shadows the method of tuples, which nobody needs here.
    index: int  # type: ignore[assignment]
    generation: int


class Extent(NamedTuple):
    """A part of the arena, in bytes, aligned to pages."""

    offset: int
    length: int


def claims_offset(slot: int) -> int:
    """Return where in the table, in bytes, the claims of a member lie."""
    return SHARED_BYTES + slot * CLAIM_BYTES


def directory_offset(slot: int, place: int = 0) -> int:
    """Return where in the segment, in bytes, a place of a member's directory lies."""
    return TABLE_BYTES + slot * DIRECTORY_BYTES + place * PLACE_BYTES
