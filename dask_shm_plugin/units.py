"""Sizes in bytes that all subpackages use."""

from __future__ import annotations

import os

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
"""Size of a page, in bytes."""
LARGE = 2 << 20
"""Size of a large page, in bytes: one entry in the second level of the page table, with pages of 4 KiB."""


def round_up(size: int, unit: int = PAGE) -> int:
    """Return the smallest multiple of ``unit`` that is not less than ``size``; both in bytes."""
    return -(-size // unit) * unit
