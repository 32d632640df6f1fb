"""The layout of an arena's table, in words of eight bytes, native byte order.

::

    header   magic + version, arena id (2 words), capacity, last incarnation, rows in use, trim counter,
             high-water mark (3 words), time of creation, reserved
    members  see ``members``
    roles    see ``roles``
    marks    see ``tags``
    blocks   BLOCKS rows of   [tag | generation | state, offset, extent, size, owner slot, owner incarnation,
                               time of reservation, reserved]; for the first word see ``state_word``
    claims   see ``claims``

The members' directories follow the table, one per slot, each with ``PLACES`` places of ``PLACE_BYTES`` bytes, and the
labels of the member behind these. The blocks follow the directories.

Times are in milliseconds of the system's monotonic clock; zero means unknown. They are only reported.
"""

from __future__ import annotations

from typing import NamedTuple

from dask_shm_plugin.table import members, roles, tags
from dask_shm_plugin.units import LARGE

VERSION = 11
MAGIC = int.from_bytes(b"daskshm" + bytes([VERSION]), "little")

SPREAD = 4
"""Offsets for blocks span this many times the capacity: gaps between blocks take no memory."""

MEMBERS = members.SLOTS
BLOCKS = 16384

MAGIC_WORD, ID_WORD, CAPACITY_WORD, INCARNATION_WORD, ROWS_WORD, TRIMS_WORD, MARK_WORD = 0, 1, 3, 4, 5, 6, 7
CREATED_WORD = 10
HEADER = 16
BLOCK = 8
"""Words of one block's row."""

MEMBERS_AT = HEADER
ROLES_AT = MEMBERS_AT + members.WORDS
MARKS_AT = ROLES_AT + roles.WORDS
BLOCKS_AT = -(-(MARKS_AT + tags.WORDS) // 512) * 512
CLAIMS_AT = BLOCKS_AT + BLOCKS * BLOCK

SHARED_BYTES = CLAIMS_AT * 8
"""Bytes of the common part, which every member reads: header, members, roles, marks, blocks."""
CLAIM_BYTES = BLOCKS * 8
"""Bytes of one member's row of claims."""
TABLE_BYTES = SHARED_BYTES + MEMBERS * CLAIM_BYTES
"""Bytes of the whole table."""
PLACE_BYTES = 2048
"""Bytes of one place of a directory: a handle of a DataFrame takes about 1000 bytes (November 2026)."""
LABELS_BYTES = 256 << 10
"""Bytes for the labels of one member, see ``arena.labels``; only used ones have pages."""
DIRECTORY_BYTES = tags.PLACES * PLACE_BYTES + LABELS_BYTES
"""Bytes of one member's directory; only used places have pages."""
BLOCKS_FROM = -(-(TABLE_BYTES + MEMBERS * DIRECTORY_BYTES) // LARGE) * LARGE
"""Offset of the blocks in the segment, in bytes, aligned to a large page."""


class BlockId(NamedTuple):
    """One generation of one block."""

    # Shadows ``tuple.index``, which is not used here.
    index: int  # type: ignore[assignment]
    generation: int


class Extent(NamedTuple):
    """A part of the arena: offset and length in bytes, aligned to pages."""

    offset: int
    length: int


def claims_offset(slot: int) -> int:
    """Return the offset in the table, in bytes, of the claims of a slot."""
    return SHARED_BYTES + slot * CLAIM_BYTES


def directory_offset(slot: int, place: int = 0) -> int:
    """Return the offset in the segment, in bytes, of a place in the directory of a slot."""
    return TABLE_BYTES + slot * DIRECTORY_BYTES + place * PLACE_BYTES


def labels_offset(slot: int) -> int:
    """Return the offset in the segment, in bytes, of the labels of a slot."""
    return directory_offset(slot, tags.PLACES)
